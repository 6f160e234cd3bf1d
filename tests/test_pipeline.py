"""The pipeline: stages, resume after any interruption, state that is not trained."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_models as jom
from jaxopt_models import codebook, prune, quant

RECIPE = [
    jom.Rule("a", jom.chain(prune.Magnitude(sparsity=0.8), codebook.KMeans(bits=3))),
    jom.Rule("b", jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4))),
]
STEPS = jom.Steps(train=7, prune=12, tune=6, every=2)


def params():
    k1, k2 = jax.random.split(jax.random.key(1))
    return {
        "a": jax.random.normal(k1, (12, 16)),
        "b": jax.random.normal(k2, (16, 4)),
        "c": jnp.zeros(4),
    }


def loss_fn(p, batch):
    x, y = batch
    h = jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None, :]
    return jnp.mean((h - y) ** 2)


def batch(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(8, 12)).astype(np.float32)
    return x, x[:, :4]


def run(path=None, **kwargs):
    options = {"recipe": RECIPE, "steps": STEPS, "path": path, "progress": False} | kwargs
    return jom.deep_compression(params(), loss_fn, options.pop("batches", batch), **options)


def test_stages_and_final_tree(tmp_path):
    out = run(tmp_path / "m.jom", evaluate=lambda p: float(loss_fn(p, batch(0))))
    assert out.stages.column("stage") == ["train", "prune", "share", "tune", "code"]
    assert out.stages[-1]["bytes"] == os.path.getsize(tmp_path / "m.jom")
    assert out.stages[-1]["error"] == out.stages[-2]["error"]
    assert int((out.small["a"].materialize() != 0).sum()) == 12 * 16 - int(0.8 * 12 * 16 + 0.5)
    assert out.small["b"].kind() == "Masked(Quantized)"
    jom.verify(out.small)
    # The mask that retraining ended with is the one that was shipped.
    kept = np.asarray(out.params["a"]) != 0
    assert np.array_equal(kept, np.asarray(out.small["a"].keep()))


def test_tuning_trains_centroids_scales_and_dense():
    before = run(steps=jom.Steps(train=7, prune=12)).small
    after = run().small
    assert np.array_equal(before["a"].mask, after["a"].mask)
    assert np.array_equal(before["a"].values.codes, after["a"].values.codes)
    assert not np.array_equal(before["a"].values.codebook, after["a"].values.codebook)
    assert not np.array_equal(before["b"].values.scale, after["b"].values.scale)
    assert not np.array_equal(before["c"], after["c"])


def test_the_callers_parameters_survive():
    mine = params()
    jom.deep_compression(mine, loss_fn, batch, recipe=RECIPE, steps=STEPS, progress=False)
    assert bool(jnp.isfinite(mine["a"]).all())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The file of a run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole") / "whole.jom"
    run(path)
    return path


@pytest.mark.parametrize(
    "at", [pytest.param(i, marks=[] if i in (6, 11, 21) else pytest.mark.full) for i in range(25)]
)
def test_interrupt_and_resume_gives_the_same_file(whole, tmp_path, at):
    again = tmp_path / "again.jom"

    def interrupted(step):
        if step == at:
            raise KeyboardInterrupt
        return batch(step)

    with pytest.raises(KeyboardInterrupt):
        run(again, batches=interrupted, checkpoint=tmp_path / "ckpt", save_every=4)
    assert not again.exists()
    seen = []

    def recorded(step):
        seen.append(step)
        return batch(step)

    run(again, batches=recorded, checkpoint=tmp_path / "ckpt", save_every=4)
    assert seen[0] == at, "work was done twice"
    assert whole.read_bytes() == again.read_bytes()


def test_kill_and_resume_gives_the_same_file(whole, tmp_path):
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import conftest, test_pipeline as t
        def batch(step):
            if step == 15:
                os.kill(os.getpid(), signal.SIGKILL)
            return t.batch(step)
        t.run({str(tmp_path / "again.jom")!r}, batches=batch,
              checkpoint={str(tmp_path / "ckpt")!r}, save_every=4)
    """)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    run(tmp_path / "again.jom", checkpoint=tmp_path / "ckpt", save_every=4)
    assert whole.read_bytes() == (tmp_path / "again.jom").read_bytes()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"of another run.*\n.*steps"):
        run(checkpoint=tmp_path / "c", steps=jom.Steps(train=8, prune=12, tune=6, every=2))


def test_batches_from_an_iterable():
    out = run(batches=[batch(i) for i in range(5)])
    same = run(batches=lambda step: batch(step % 5))
    for x, y in zip(jax.tree.leaves(out.small), jax.tree.leaves(same.small), strict=True):
        assert np.array_equal(x, y)
    with pytest.raises(ValueError, match="ended at step 5"):
        run(batches=(batch(i) for i in range(5)))


def test_a_recipe_that_prunes_nothing_is_refused():
    with pytest.raises(ValueError, match="no rule of the recipe prunes"):
        run(recipe=[jom.Rule("a", quant.Int(bits=4))])


def test_batch_statistics_are_taken_over():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(12, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.b = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.b(self.norm(self.a(x)))

    fn, state = jom.functional(Net(nnx.Rngs(0)), mutable=True)

    def loss(p, batch):
        out, new = fn(p, batch[0])
        return jnp.mean((out - batch[1]) ** 2), new

    recipe = [jom.Rule("a/kernel", RECIPE[0].encoder), jom.Rule("b/kernel", quant.Int(bits=8))]
    out = jom.deep_compression(
        state, loss, batch, recipe=recipe, steps=STEPS, stateful=True, progress=False
    )
    assert not np.allclose(out.small["norm"]["mean"].get_value(), 0)
    assert out.small["a"]["kernel"].get_value().kind() == "Masked(Clustered)"


def test_one_compilation_a_stage():
    traced = []

    def counted(p, b):
        traced.append(1)
        return loss_fn(p, b)

    jom.deep_compression(params(), counted, batch, recipe=RECIPE, steps=STEPS, progress=False)
    assert len(traced) == 3


def test_other_optimizers():
    out = run(optimizer=lambda stage, steps: optax.adamw(1e-3, weight_decay=0.1))
    assert int((out.small["a"].materialize() != 0).sum()) == 38

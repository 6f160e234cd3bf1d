"""Options off by a little say so at once, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_models as jom
from jaxopt_models import prune, quant

W = {"w": jnp.ones((4, 4))}


@pytest.mark.parametrize(
    ("make", "kind", "why"),
    [
        (lambda: jom.Axes(stack=-1), ValueError, "stack=-1"),
        (lambda: jom.Axes(stack="1"), TypeError, "Axes: stack='1'"),
        (lambda: jom.Steps(prune=2.5), TypeError, "Steps: prune=2.5"),
        (lambda: jom.Steps(ramp="a"), TypeError, "Steps: ramp='a'"),
        (lambda: jom.Steps(every=0), ValueError, "Steps: every=0"),
        (lambda: prune.Magnitude("0.5"), TypeError, "Magnitude: sparsity='0.5'"),
        (lambda: prune.Magnitude(), TypeError, "Magnitude: sparsity=None"),
        (lambda: prune.Magnitude(False), TypeError, "Magnitude: sparsity=False"),
        (lambda: prune.Magnitude(1), ValueError, "Magnitude: sparsity=1.0"),
        (lambda: prune.Block(2.5), TypeError, "Block: rows=2.5"),
        (lambda: prune.NofM(1.5, 4), TypeError, "NofM: n=1.5"),
        (
            lambda: prune.allocate_global(W, sparsity="0.5"),
            TypeError,
            "allocate_global: sparsity='0.5'",
        ),
        (lambda: prune.cubic_schedule("0.8", begin=0, end=9), TypeError, "cubic_schedule: spars"),
        (lambda: prune.gradual(lambda s: 0.5, every=2.5), TypeError, "gradual: every=2.5"),
        (lambda: jom.Rule(b"w", None), TypeError, "Rule: path=b'w'"),
        (
            lambda: jom.deep_compression(W, None, None, recipe=[], steps=3),
            TypeError,
            "deep_compression: steps=3",
        ),
        (
            lambda: jom.deep_compression(W, None, None, recipe=[], steps=jom.Steps(), save_every=0),
            ValueError,
            "deep_compression: save_every=0",
        ),
        (
            lambda: prune.Magnitude(0.5, structure=prune.Block(2), across_stack=True),
            ValueError,
            "across_stack",
        ),
        (lambda: prune.allocate_global(W, sparsity=0.5, only="("), ValueError, "only='\\('"),
        (lambda: prune.gradual(lambda s: 0.5, only="(").init(W), ValueError, "gradual: only='\\('"),
        (
            lambda: prune.gradual(lambda s: 0.5).init(W | {"t": 1.0}),
            TypeError,
            "gradual: t is float",
        ),
        (
            lambda: quant.Int(bits=8)(jnp.ones((4, 4)), keep=jnp.ones((4,), bool)),
            ValueError,
            "keep has shape",
        ),
        (lambda: quant.Int(bits=8)(jnp.ones((4, 4)), keep=[True]), TypeError, "keep must be"),
        (
            lambda: jom.deep_compression(
                W, None, None, recipe=[], steps=jom.Steps(), optimizer=optax.adam(1e-3)
            ),
            TypeError,
            "function of stage and steps",
        ),
    ],
)
def test_said_by_name(make, kind, why):
    with pytest.raises(kind, match=why):
        make()


def test_numpy_numbers_are_numbers():
    for half in (np.float32(0.5), jnp.float32(0.5), np.float64(0.5)):
        rule = jom.Rule("w", prune.Magnitude(sparsity=half), jom.Axes(out=(np.int64(0),)))
        want = jom.Rule("w", prune.Magnitude(sparsity=0.5), jom.Axes(out=(0,)))
        assert jom.recipe_to_json([rule]) == jom.recipe_to_json([want])
    assert prune.NofM(np.int64(2), np.int64(4)) == prune.NofM(2, 4)
    assert quant.Int(bits=np.int32(4), group=np.int64(2)) == quant.Int(bits=4, group=2)


def test_keep_on_a_leaf_is_checked_too():
    leaf = prune.Magnitude(sparsity=0.5)(jnp.arange(16.0).reshape(4, 4))
    with pytest.raises(ValueError, match="keep has shape"):
        quant.Int(bits=8)(leaf, keep=jnp.ones((4,), bool))


def test_a_report_of_two_compressed_trees():
    small = jom.compress(W, [jom.Rule("w", quant.Int(bits=8))])
    assert jom.report(small, small)[0]["error"] == 0


def test_verify_finds_dropped_values_and_halves():
    leaf = prune.Magnitude(sparsity=0.5)(jnp.arange(16.0).reshape(4, 4))
    wrong = jom.Masked(leaf.mask, leaf.values + 1, leaf.core)
    with pytest.raises(jom.VerifyError, match="not zero where the mask drops"):
        jom.verify({"w": wrong})
    for half in jom.partition(jom.compress(W, [jom.Rule("w", quant.Int(bits=8))])):
        with pytest.raises(jom.VerifyError, match="combine the halves"):
            jom.verify(half)


def test_a_checkpoint_knows_its_key(tmp_path):
    def run(seed):
        jom.deep_compression(
            W,
            lambda p, b: jnp.sum(p["w"] ** 2),
            lambda step: 0,
            recipe=[jom.Rule("w", quant.Int(bits=8))],
            steps=jom.Steps(train=1),
            key=jax.random.key(seed),
            checkpoint=tmp_path,
            progress=False,
        )

    run(0)
    with pytest.raises(ValueError, match="of another run"):
        run(1)


def test_rigl_leaves_factored_moments_alone():
    tx = prune.rigl(optax.adafactor(1e-3), sparsity=0.5, key=jax.random.key(0), until=10)
    params = {"w": jnp.ones((128, 256))}
    state = tx.init(params)
    shapes = jax.tree.map(jnp.shape, state)
    updates, state = tx.update(params, state, params)
    assert jax.tree.map(jnp.shape, state) == shapes
    assert int(jnp.sum(optax.apply_updates(params, updates)["w"] != 0)) == 128 * 128

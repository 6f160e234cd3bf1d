"""Gradients that travel compressed, and training with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import Rule, parallel, quant

RNG = np.random.default_rng(0)
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
SHAPES = {"a": (8, 40, 30), "b": (8, 7)}
CODECS = [parallel.Int8(block=64), parallel.TopK(share=0.05)]


def mapped(fn):
    spec = P("data")
    return jax.jit(jax.shard_map(fn, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False))


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def stacked(tree):
    return jax.tree.map(lambda x: x[None], tree)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_what_is_not_sent_is_sent_later(codec):
    """All that was sent and all that is kept make up all gradients."""
    tx = parallel.all_reduce(codec)
    start = mapped(lambda g: stacked(tx.init(first(g))))
    step = mapped(lambda g, s: jax.tree.map(stacked, tx.update(first(g), first(s))))
    total, sent, state = np.zeros(1207), np.zeros(1207), None
    for _ in range(5):
        grads = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
        state = start(grads) if state is None else state
        updates, state = step(grads, state)
        flat = [np.float64(t[k]).reshape(8, -1) for t in (grads, updates) for k in SHAPES]
        total += np.concatenate(flat[:2], axis=1).mean(0)
        got = np.concatenate(flat[2:], axis=1)
        assert (got == got[0]).all()  # every device has the same
        sent += got[0]
    lost = {k: np.float64(v) for k, v in state.lost.items()}
    kept = lost["device"].mean(0)[:1207]
    if "mean" in lost:
        kept = kept + lost["mean"].reshape(-1)[:1207]
    np.testing.assert_allclose(sent + kept, total, rtol=1e-5, atol=2e-6)
    assert np.abs(kept).max() > 0
    if isinstance(codec, parallel.Int8):  # at most half a step of both roundings
        assert np.abs(kept).max() < 4 / 127


def test_largest_numbers_of_each_device():
    tx = parallel.all_reduce(parallel.TopK(share=0.25), feedback=False)
    grads = jnp.asarray(RNG.normal(size=(8, 1, 16)), jnp.float32)
    run = mapped(lambda g: stacked(tx.update(first(g), tx.init(first(g)))[0]))
    want = np.zeros(16)
    for row in np.float64(grads)[:, 0]:
        chosen = np.argsort(-np.abs(row))[:4]
        want[chosen] += row[chosen] / 8
    np.testing.assert_allclose(run(grads)[3, 0], want, rtol=1e-6, atol=1e-8)


def loss(params, batch):
    x, y = batch
    out = (
        jnp.tanh(x @ jom.materialize(params["a"])["w"]) @ params["b"]["w"] + params["b"]["c"][None]
    )
    return jnp.mean((out - y) ** 2), {"largest": jnp.max(jnp.abs(out))}


PARAMS = {
    "a": {"w": jnp.asarray(RNG.normal(size=(16, 256)), jnp.float32)},
    "b": {"w": jnp.asarray(RNG.normal(size=(256, 4)) / 16, jnp.float32), "c": jnp.zeros(4)},
}
BATCHES = [
    tuple(jnp.asarray(RNG.normal(size=(64, n)), jnp.float32) for n in (16, 4)) for _ in range(4)
]


def trained(params, tx):
    """Trains on one device."""
    t, rest = jom.partition(params)
    opt = tx.init(t)

    @jax.jit
    def step(t, opt, batch):
        grads = jax.grad(lambda t: loss(jom.combine(t, rest), batch)[0])(t)
        updates, opt = tx.update(grads, opt, t)
        return optax.apply_updates(t, updates), opt

    for batch in BATCHES:
        t, opt = step(t, opt, batch)
    return jom.combine(t, rest)


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("encoder", [None, quant.Int(bits=4, group=8)], ids=repr)
def test_training_is_that_of_one_device(micro, encoder):
    params = PARAMS if encoder is None else jom.compress(PARAMS, [Rule("a/w", encoder)])
    tx = optax.adam(1e-2)
    run = parallel.data_parallel(loss, tx, MESH, micro=micro)
    state = run.init(params)
    for batch in BATCHES:
        state, metrics = jax.block_until_ready(run.step(state, batch))
    assert int(state.step) == len(BATCHES)
    assert set(metrics) == {"loss", "largest"}
    got, want = map(jom.materialize, (state.params, trained(params, tx)))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert isinstance(state.params["a"]["w"], type(params["a"]["w"]))


def test_integers_travel_as_integers():
    bytes_, kinds = {}, {}
    for codec in (None, *CODECS):
        run = parallel.data_parallel(loss, optax.sgd(1e-2), MESH, codec=codec)
        state = run.init(PARAMS)
        sent = parallel.collectives(run.compiled(state, BATCHES[0]))
        wide = [c for c in sent if c.bytes > 64]  # the metrics are numbers
        bytes_[codec], kinds[codec] = sum(c.sent for c in wide), {(c.kind, c.dtype) for c in wide}
    int8, top = CODECS
    assert {("all-to-all", "int8"), ("all-gather", "int8")} <= kinds[int8]
    assert {kind for kind, _ in kinds[top]} == {"all-gather"}
    assert bytes_[int8] <= 0.3 * bytes_[None]
    assert bytes_[top] <= 0.41 * bytes_[None]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_training_with_feedback_goes_as_far(codec):
    tx, ends = optax.sgd(0.05), {}
    for name, options in (("float32", {}), ("sent", {"codec": codec})):
        run = parallel.data_parallel(loss, tx, MESH, **options)
        state = run.init(PARAMS)
        for i in range(60):
            state, metrics = jax.block_until_ready(run.step(state, BATCHES[i % len(BATCHES)]))
        ends[name] = float(metrics["loss"])
    assert ends["sent"] <= 1.05 * ends["float32"]


def test_pmap_does_the_same():
    tx = optax.chain(parallel.all_reduce(parallel.Int8()), optax.sgd(0.1))

    def start(p):
        return p, tx.init(p)

    def step(p, opt, batch):
        grads = jax.grad(lambda p: loss(p, batch)[0])(p)
        updates, opt = tx.update(grads, opt, p)
        return optax.apply_updates(p, updates), opt

    parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), BATCHES[0])
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), PARAMS)
    p, opt = jax.pmap(start, axis_name="data")(copies)
    p, _ = jax.pmap(step, axis_name="data")(p, opt, parts)
    run = parallel.data_parallel(loss, optax.sgd(0.1), MESH, codec=parallel.Int8())
    state, _ = run.step(run.init(PARAMS), BATCHES[0])
    for a, b in zip(*map(jax.tree.leaves, (p, state.params)), strict=True):
        np.testing.assert_allclose(a[5], b, rtol=1e-6, atol=1e-7)


def test_without_feedback_nothing_is_kept():
    tx = parallel.all_reduce(parallel.Int8(), axis="data", feedback=False)
    init = jax.pmap(tx.init, axis_name="data", devices=jax.devices()[:2])
    assert jax.tree.leaves(init({"w": jnp.ones((2, 8))})) == []
    with pytest.raises(TypeError, match=r"give parallel.Int8\(\)"):
        parallel.all_reduce(parallel.Int8)


def test_wrong_options():
    with pytest.raises(TypeError, match=r"codec='int8'; give parallel.Int8\(\)"):
        parallel.all_reduce("int8")
    with pytest.raises(ValueError, match="Int8: block=0"):
        parallel.Int8(block=0)
    with pytest.raises(ValueError, match="TopK: share"):
        parallel.TopK(share=1.5)
    with pytest.raises(TypeError, match="mesh is None"):
        parallel.data_parallel(loss, optax.sgd(1), None)
    with pytest.raises(ValueError, match=r"axis='model' is none of the mesh's \('data',\)"):
        parallel.data_parallel(loss, optax.sgd(1), MESH, axis="model")
    run = parallel.data_parallel(loss, optax.sgd(1), MESH, micro=3)
    with pytest.raises(ValueError, match=r"shape \(64, 16\), which does not divide into 3 pieces"):
        run.step(run.init(PARAMS), BATCHES[0])
    with pytest.raises(TypeError, match="nothing floating"):
        run.init({"n": jnp.int32(3)})


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_a_step_with_nan_does_not_spoil_the_next(codec):
    tx = parallel.all_reduce(codec)
    start = mapped(lambda g: stacked(tx.init(first(g))))
    step = mapped(lambda g, s: jax.tree.map(stacked, tx.update(first(g), first(s))))
    grads = jnp.asarray(RNG.normal(size=(8, 1, 600)), jnp.float32)
    state = start(grads)
    _, state = step(grads, state)
    updates, spoilt = step(grads.at[3, 0, 5].set(jnp.nan), state)
    assert bool(jnp.isnan(updates).any())
    for a, b in zip(jax.tree.leaves(spoilt), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_that_was_given_up():
    run = parallel.data_parallel(loss, optax.sgd(1e-2), MESH)
    state = run.init(PARAMS)
    run.step(state, BATCHES[0])
    with pytest.raises(ValueError, match="given up to an earlier step"):
        run.step(state, BATCHES[0])

"""The table of what each parameter meets, the errors, and the calls that are kept."""

import dataclasses
import inspect
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

import jaxopt_models as jom
from jaxopt_models import _kernels, models, quant
from jaxopt_models._kernels import Kernel
from jaxopt_models._tracked import track
from jaxopt_models._walk import Walk, deferred

RNG = np.random.default_rng(7)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"w": normal(4, 6), "b": normal(6), "unused": normal(3), "v": normal(3, 6, 6)}
X = normal(5, 4)


def fn(p, x):
    """Says what it does."""
    h = x @ p["w"] + p["b"][None]
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["v"])[0]
    return h @ h.T


def small():
    rules = [jom.Rule("w", quant.Int(bits=8)), jom.Rule("v", quant.Int(bits=4), jom.Axes(stack=1))]
    return jom.compress(PARAMS, rules)


def test_the_table():
    table = jom.accelerate(fn).explain(small(), X)
    rows = {(r["path"], r["operation"]): r for r in table}
    w = rows["w", "dot_general"]
    assert (w["axes"], w["parameter"], w["input"], w["output"]) == (
        "in out",
        [4, 6],
        [5, 4],
        [5, 6],
    )
    assert (w["multiply-adds"], w["times"]) == (120, 1)
    assert w["runs"] == "scales after the product on cuda"
    assert w["note"].endswith("it is not laid out: call jaxopt_models.pack(tree)")
    v = rows["v", "dot_general"]
    assert (v["axes"], v["multiply-adds"], v["times"]) == ("stack in out", 3 * 180, 3)
    assert rows["b", "add"]["runs"] == "dense"
    assert rows["", "dot_general"]["multiply-adds"] == 150
    assert rows["unused", ""]["note"] == "never reaches the program"
    assert table.data["multiply_adds"] == 120 + 540 + 150
    assert "660 with parameters, 150 between other values" in str(table)


def test_what_a_custom_rule_hides_is_told():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, None), lambda r, g: (g @ PARAMS["w"].T, 0 * PARAMS["w"]))
    p = jom.compress(PARAMS, [jom.Rule("w", jom.chain(quant.Int(bits=8), quant.Input(bits=4)))])
    row = jom.accelerate(lambda p, x: product(x, p["w"])).explain(p, X)[0]
    assert row["multiply-adds"] == 120
    assert row["note"].startswith("rebuilt before a custom_vjp_call, whose rule is kept")
    assert row["note"].endswith("its input is not rounded here")


def test_nothing_is_lost_in_silence():
    def carried(p, x):
        w, _ = lax.scan(lambda w, _: (0.5 * w, None), p["w"], length=2)
        h = lax.scan(lambda h, v: (h @ v, None), x @ w, p["v"][:, ::-1])[0]
        return h, p["b"].reshape(2, 3)

    table = jom.accelerate(carried).explain(small(), X)
    notes = {r["path"]: (r["runs"], r["note"]) for r in table}
    assert notes["w"] == ("", "it is carried by a loop, which changes it")
    assert notes["b"] == ("", "it is returned")
    assert notes["v"] == ("rebuilt", "rebuilt whole before the loop")
    assert notes["unused"] == ("", "never reaches the program")
    stats = jom.calibrate(carried, PARAMS, [(X,)])
    assert stats.missing["w"] == "it is carried by a loop, which changes it"
    assert list(stats) == ["v"]


def test_it_needs_shapes_only():
    shapes = jax.eval_shape(lambda: (small(), X))
    table = jom.accelerate(fn).explain(*shapes)
    assert table.rows == jom.accelerate(fn).explain(small(), X).rows


def test_name_signature_and_docstring_are_kept():
    run = jom.accelerate(fn)
    assert (run.__name__, run.__doc__) == ("fn", "Says what it does.")
    assert inspect.signature(run) == inspect.signature(fn)


def test_eager_calls_of_the_same_shapes_trace_once():
    traced = []

    def counted(p, x, factor=1, *, mode="a"):
        traced.append(mode)
        return factor * (x @ p["w"])

    run, p = jom.accelerate(counted), small()
    for _ in range(3):
        run(p, X)
        run(jax.tree.map(lambda a: a + 0, p), X + 1)
    assert traced == ["a"]
    run(p, X, mode="b")
    run(p, X, 2)
    run(p, X[:2])
    assert len(traced) == 4
    np.testing.assert_allclose(run(p, X, 3.0), 3 * run(p, X), rtol=1e-6)


def test_equal_values_of_another_type_are_another_program():
    def scaled(p, x, k):
        return k * jnp.arange(3), x @ p["w"]

    run, p = jom.accelerate(scaled), small()
    for k, kind in ((2, "int32"), (2.0, "float32"), (True, "int32"), (2, "int32")):
        assert run(p, X, k)[0].dtype == kind
    signs = jom.accelerate(lambda p, x, z: (jnp.copysign(1.0, z), x @ p["w"]))
    assert (signs(p, X, 0.0)[0], signs(p, X, -0.0)[0]) == (1, -1)


def test_what_cannot_be_hashed_is_run_anew():
    traced = []

    class Options:
        __hash__ = None
        factor = 2

    def scaled(p, x, options):
        traced.append(1)
        return options.factor * (x @ p["w"])

    run, p, options = jom.accelerate(scaled), small(), Options()
    first = run(p, X, options)
    options.factor = 3
    np.testing.assert_allclose(run(p, X, options), 1.5 * first, rtol=1e-6)
    assert len(traced) == 2


def test_parameters_may_be_given_by_name():
    p, run = small(), jom.accelerate(fn)
    np.testing.assert_array_equal(run(x=X, p=p), run(p, X))
    assert run.explain(x=X, p=p).rows == run.explain(p, X).rows


def test_a_value_that_is_no_array_stays_what_it_is():
    def typed(p, x, dtype, flag):
        assert flag is True
        return (x @ p["w"]).astype(dtype)

    assert jom.accelerate(typed)(small(), X, jnp.bfloat16, True).dtype == jnp.bfloat16


def test_export_runs_elsewhere_without_the_library():
    pytest.importorskip("flatbuffers")
    run = jax.jit(jom.accelerate(fn))
    p = small()
    leaves, treedef = jax.tree.flatten(p)
    flat = jax.jit(lambda leaves, x: jom.accelerate(fn)(treedef.unflatten(leaves), x))
    again = export.deserialize(export.export(flat)(leaves, X).serialize())
    np.testing.assert_allclose(again.call(leaves, X), run(p, X), rtol=1e-6)


def test_inside_scan_vmap_and_shard_map():
    p, run = small(), jom.accelerate(lambda p, x: jnp.sin(x @ p["w"]))
    want = jnp.sin(X @ p["w"].materialize())
    np.testing.assert_allclose(jax.vmap(run, (None, 0))(p, X), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        lax.scan(lambda c, x: (c, run(p, x)), 0, X)[1], want, rtol=1e-5, atol=1e-6
    )
    mesh = jax.make_mesh((5,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:5])
    spec = jax.sharding.PartitionSpec
    f = jax.shard_map(run, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec("d"))
    np.testing.assert_allclose(f(p, X), want, rtol=1e-5, atol=1e-6)


def test_values_that_were_captured_are_an_error():
    p = small()
    with pytest.raises(ValueError, match=r"accelerate: no parameter reached the program of lost"):

        def lost(params, x):
            return x @ PARAMS["w"]

        jom.accelerate(lost)(p, X)
    model = models.nnx.LeNet300(rngs=nnx.Rngs(0))
    _, params = jom.functional(model)
    compressed = jom.compress(params, [jom.Rule(".*kernel", quant.Int(bits=8))])
    with pytest.raises(ValueError, match="no parameter reached"):
        jom.accelerate(lambda params, x: model(x))(compressed, jnp.zeros((1, 28, 28)))


def test_a_module_with_compressed_parameters_inside_says_what_to_call():
    model = models.nnx.LeNet300(rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    merged = nnx.merge(graphdef, jom.compress(state, [jom.Rule(".*kernel", quant.Int(bits=8))]))
    with pytest.raises(TypeError, match=r"Quantized.*accelerate\(fn\).*materialize"):
        merged(jnp.zeros((1, 28, 28)))
    for use in (lambda w: X @ w, lambda w: jnp.dot(X, w), lambda w: np.asarray(w), jnp.sum):
        with pytest.raises(TypeError, match=r"materialize\(params\)"):
            use(small()["w"])
    images = jnp.zeros((1, 28, 28))
    got = jom.accelerate(lambda m, x: m(x))(merged, images)  # and the module itself goes, too
    np.testing.assert_allclose(got, model(images), rtol=0.05, atol=0.05)


def test_a_rule_is_added_by_a_line():
    class Summing(Walk):
        rules: ClassVar = {**Walk.rules, "cumsum": deferred}

    def running(p, x):
        return x @ jnp.cumsum(p["w"], axis=0)

    w = small()["w"]
    closed = jax.make_jaxpr(running)({"w": PARAMS["w"]}, X)
    [out] = Summing().run(closed.jaxpr, closed.consts, [track("w", w), X])
    np.testing.assert_allclose(out, running({"w": w.materialize()}, X), rtol=1e-5)
    jaxpr = jax.make_jaxpr(
        lambda w, x: Summing().run(closed.jaxpr, closed.consts, [track("w", w), x])
    )(w, X)
    assert [e.primitive.name for e in jaxpr.eqns] == ["remat2"]  # not summed before it is used


@pytest.fixture
def halving():
    """A kernel that says who computed: half of the product."""
    kernel = Kernel(
        "halves",
        "dot_general",
        quant.Quantized,
        ("cpu",),
        run=lambda eqn, operands: [0.5 * (operands[0] @ operands[1].materialize())],
        refuses=lambda eqn, operands: "" if operands[0].shape[0] > 1 else "one row only",
    )
    _kernels.KERNELS.append(kernel)
    yield kernel
    _kernels.KERNELS.remove(kernel)


def test_a_kernel_runs_where_it_fits_and_the_table_says_so(halving):
    p = small()

    def product(p, x):
        return x @ p["w"]

    run = jom.accelerate(product)
    np.testing.assert_allclose(run(p, X), 0.5 * product(jom.materialize(p), X), rtol=1e-6)
    assert run.explain(p, X)[0]["runs"] == "scales after the product on cuda, halves on cpu"
    np.testing.assert_allclose(run(p, X[:1]), product(jom.materialize(p), X[:1]), rtol=1e-6)
    row = run.explain(p, X[:1])[0]
    assert (row["runs"], row["note"]) == (
        "scales after the product on cuda",
        "halves: one row only",
    )
    simulated = jom.simulate(product)
    np.testing.assert_allclose(simulated(p, X), product(jom.materialize(p), X), rtol=1e-6)
    assert simulated.explain(p, X)[0]["runs"] == "rebuilt"
    wrapped = jom.compress(PARAMS, [jom.Rule("w", quant.Input(bits=8))])
    halving_input = dataclasses.replace(halving, leaf=quant.WithInput)
    _kernels.KERNELS.append(halving_input)
    try:
        got = jax.jit(jax.vmap(run, (None, 0)))(wrapped, X[None])[0]
        np.testing.assert_allclose(got, 0.5 * product(PARAMS, X), rtol=1e-6)
        other = dataclasses.replace(halving_input, platforms=("tpu",), name="elsewhere")
        _kernels.KERNELS[-1] = other
        got = jom.accelerate(product)(wrapped, X)
        np.testing.assert_allclose(got, jom.simulate(product)(wrapped, X), rtol=1e-6)
    finally:
        _kernels.KERNELS.pop()

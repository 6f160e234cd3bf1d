"""Plans on meshes of simulated devices, against counts by hand."""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import parallel, quant
from jaxopt_models.parallel import _estimate, _work

ROOT = pathlib.Path(__file__).parents[2]
CHIP = parallel.Chip(
    name="toy",
    operations=(("bfloat16", 4e9), ("float32", 1e9), ("int8", 8e9)),
    memory=1e6,
    bandwidth=1e8,
    ring=1e7,
    hop=1e-4,
)
WIDE, NARROW, ROWS = 128, 64, 16
PARAMS = {
    "up": jax.ShapeDtypeStruct((NARROW, WIDE), jnp.float32),
    "down": jax.ShapeDtypeStruct((WIDE, NARROW), jnp.float32),
    "bias": jax.ShapeDtypeStruct((NARROW,), jnp.float32),
}
X = jax.ShapeDtypeStruct((ROWS, NARROW), jnp.float32)
MEGATRON = [("up", P(None, "model")), ("down", P("model"))]
SHARDED = [("up", P(None, ("model", "data"))), ("down", P("model", "data"))]


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None]


def small(bits, group=None):
    rules = [jom.Rule("up|down", quant.Int(bits=bits, group=group))]
    return jax.eval_shape(lambda p: jom.compress(p, rules), PARAMS)


def mesh(*sizes):
    names = ("data", "model")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


@pytest.fixture(scope="module")
def plan():
    layouts = [
        parallel.Layout({"data": 2, "model": 4}, MEGATRON, name="megatron"),
        parallel.Layout({"data": 2, "model": -1}, SHARDED, name="sharded"),
    ]
    others = {"int8": small(8), "int4": small(4, 32)}
    return parallel.estimate(fn, PARAMS, X, on=mesh(8), layouts=layouts, others=others, chip=CHIP)


def test_an_estimate_for_each_layout_and_tree(plan):
    found = [(e.layout, e.tree) for e in plan]
    trees = ("dense", "int8", "int4")
    assert found == [(layout, t) for layout in ("megatron", "sharded") for t in trees]
    assert len(plan) == 6 and plan[1].tree == "int8"


def test_bytes_of_parameters_by_hand(plan):
    n, bias = WIDE * NARROW, 4 * NARROW
    columns, rows = 4 * WIDE, 4 * NARROW  # scales of up and of down
    want = {
        ("megatron", "dense"): 2 * 4 * n / 4 + bias,
        # The scales of down belong to outputs, which rows do not divide.
        ("megatron", "int8"): 2 * n / 4 + columns / 4 + rows + bias,
        # A scale for each group of 32 inputs.
        ("megatron", "int4"): 2 * n / 8 + 2 * 4 * n / 32 / 4 + bias,
        ("sharded", "dense"): 2 * 4 * n / 8 + bias,
        ("sharded", "int8"): 2 * n / 8 + columns / 8 + rows / 2 + bias,
        ("sharded", "int4"): 2 * n / 16 + 2 * 4 * n / 32 / 8 + bias,
    }
    assert {(e.layout, e.tree): e.parameters for e in plan} == want
    assert plan[0].whole == 2 * 4 * n + bias


def test_operations_are_counted_once_and_divided(plan):
    for e in plan:
        assert e.once == 2 * 2 * ROWS * WIDE * NARROW
        assert e.operations == e.once / 8


def test_sums_of_megatron_and_codes_that_travel_as_codes(plan):
    for e in plan:
        sums = [c for c in e.collectives if c.kind == "all-reduce" and c.bytes > 64]
        assert [(c.dtype, c.shape, c.devices) for c in sums] == [
            ("float32", (ROWS // 2, NARROW), 4)
        ]
    gathered = {
        e.tree: [c for c in e.collectives if c.kind == "all-gather" and c.bytes >= 512]
        for e in plan.estimates[3:]
    }
    n = WIDE * NARROW // 4
    assert sum(c.bytes for c in gathered["dense"]) == 2 * 4 * n
    assert {c.dtype for c in gathered["int8"] if c.bytes >= n} == {"int8"}
    assert all(c.devices == 2 for found in gathered.values() for c in found)


def test_weights_may_travel_rebuilt():
    layout = parallel.Layout({"data": 2, "model": 4}, SHARDED, gather=False)
    [e] = parallel.estimate(fn, small(8), X, on=mesh(8), layouts=layout, chip=CHIP)
    assert e.tree == "compressed"
    big = [c for c in e.collectives if c.kind == "all-gather" and c.bytes > WIDE * NARROW // 4]
    assert big and {c.dtype for c in big} == {"float32"}


def test_an_argument_that_every_device_has_whole():
    layout = parallel.Layout(inputs=[None])
    [whole] = parallel.estimate(fn, PARAMS, X, on=mesh(8), chip=CHIP, layouts=layout)
    [parts] = parallel.estimate(fn, PARAMS, X, on=mesh(8), chip=CHIP)
    assert whole.operations == 8 * parts.operations


def test_the_time_of_a_step_by_the_stated_model(plan):
    e = plan[0]
    assert e.compute == e.operations / 1e9
    assert e.moving == e.traffic / 1e8
    [one] = e.collectives
    assert e.exchange == pytest.approx(1.5 * one.bytes / 1e7 + 2 * 3 * 1e-4)
    assert e.seconds == max(e.compute, e.moving) + e.exchange
    assert e.bound == "exchange"


def test_traffic_is_no_less_than_what_must_be_read_and_written(plan):
    e = plan[0]
    least = e.parameters + 4 * (X.size + X.size) / 2
    assert least <= e.traffic <= 3 * least


def test_the_best_that_fits(plan):
    best = min(plan, key=lambda e: e.seconds)
    assert plan.best is best
    least = min(e.memory for e in plan)
    tight = parallel.Plan(tuple(shrunk(e, least) for e in plan))
    assert tight.best.memory == least < best.memory
    with pytest.raises(ValueError, match=r"nothing fits into the 1e-06 GB of toy"):
        _ = parallel.Plan(tuple(shrunk(e, 1e3) for e in plan)).best


def shrunk(e, memory):
    chip = dataclasses.replace(CHIP, memory=memory)
    return dataclasses.replace(e, topology=dataclasses.replace(e.topology, chip=chip))


def test_it_prints_and_draws(plan):
    text = str(plan)
    assert "megatron" in text and "ring 0.01 GB/s and 1e+02 us a hop" in text
    assert "best that fits" in text
    assert "all-reduce" in str(plan[0].sends())
    assert "<table>" in plan._repr_html_()
    ax = plan.plot()
    assert next(t.get_text() for t in ax.get_yticklabels()) == "dense, megatron"
    plt.close(ax.figure)


def test_numbers_and_flags_are_part_of_the_program():
    def scaled(params, x, twice, options):
        return x @ params["w"] * (2 if twice else 1) + options["add"]

    params = {"w": jnp.ones((4, 4)), "label": "kept"}
    [e] = parallel.estimate(
        scaled, params, jnp.ones((8, 4)), True, {"add": 0.5}, on=mesh(8), chip="h100"
    )
    assert (e.parameters, e.operations) == (64, 2 * 4 * 4)


def test_a_step_of_training_whose_state_is_given_up():
    def step(params, x):
        grads = jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(params)
        return jax.tree.map(lambda p, g: p - g, params, grads)

    layout = parallel.Layout(inputs=(P("data"),))
    [e] = parallel.estimate(step, PARAMS, X, on=mesh(8), layouts=layout, chip=CHIP, donate=True)
    sums = [c for c in e.collectives if c.kind == "all-reduce"]
    assert sum(c.bytes for c in sums) == e.whole
    assert e.operations == e.once / 8 == 2 * 5 * ROWS * WIDE * NARROW / 8
    assert e.aliased == e.whole


# ------------------------------------------------------------------ what is counted


def test_products_in_loops_branches_and_maps():
    w = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    each = 2 * 8 * 8 * 8

    def looped(w, x):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert _estimate._operations(looped, w, (w,)) == 7 * each
    on = mesh(8)

    @functools.partial(jax.shard_map, mesh=on, in_specs=(P(), P("data")), out_specs=P("data"))
    def mapped(w, x):
        return x @ w

    assert (
        _estimate._operations(mapped, w, (jax.ShapeDtypeStruct((64, 8), jnp.float32),)) == 8 * each
    )


def taps(n, k, stride, low, high, into, by):
    """Multiply-adds along one axis with entries that are there."""
    there = np.zeros(low + (n - 1) * into + 1 + high)
    there[low : low + (n - 1) * into + 1 : into] = 1
    reach = (k - 1) * by + 1
    starts = range(0, len(there) - reach + 1, stride)
    return sum(there[s : s + reach : by].sum() for s in starts), len(starts)


@pytest.mark.parametrize(
    ("n", "k", "stride", "pads", "into", "by"),
    [(9, 3, 2, (1, 1), 1, 1), (7, 3, 1, (2, 1), 2, 1), (11, 3, 1, (0, 3), 1, 2)],
)
def test_operations_of_convolutions_leave_out_padding(n, k, stride, pads, into, by):
    x = jax.ShapeDtypeStruct((2, n, 6), jnp.float32)
    w = jax.ShapeDtypeStruct((k, 3, 10), jnp.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,), [pads], (into,), (by,), ("NHC", "HIO", "NHC"), 2
        )

    program = jax.jit(convolve).lower(x, w).compile()
    [(dtype, count)] = _work.work(program).operations.items()
    assert (dtype, count) == ("float32", 2 * 2 * 10 * 3 * taps(n, k, stride, *pads, into, by)[0])


def test_a_product_as_a_tpu_writes_it():
    # Four products of [8, 16] and [16, 32] as a convolution over the four.
    text = """HloModule m

ENTRY %main (x: bf16[4,8,16], w: bf16[4,16,32]) -> bf16[4,8,32] {
  %x = bf16[4,8,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = bf16[4,16,32]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %y = f32[4,8,32]{2,1,0:T(8,128)} convolution(%x, %w), \
window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf, operand_precision={highest,highest}
}
"""
    found = _work.work(text)
    assert found.operations == {"bfloat16": 6 * 2 * 4 * 8 * 16 * 32}
    # What lies in the near memory is not counted.
    assert found.traffic == 4 * 16 * 32 * 2 + 4 * 8 * 32 * 4


def test_of_a_stack_in_a_loop_each_layer_is_read_once():
    layers = 64
    w = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32)

    def looped(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x = jax.ShapeDtypeStruct((4, 64), jnp.float32)
    found = _work.work(jax.jit(looped).lower(x, w).compile())
    assert found.operations == {"float32": 2 * layers * 4 * 64 * 64}
    assert 4 * w.size <= found.traffic <= 4 * 4 * w.size


# ------------------------------------------------------------------ machines


def stand_in(count, sides):
    return parallel.Topology("toy", tuple(range(count)), CHIP, sides)


def test_messages_on_a_grid_go_along_one_side_and_then_the_other():
    grid = stand_in(64, (8, 8))
    assert [grid.hops(n) for n in (1, 2, 4, 8, 16, 64)] == [0, 1, 3, 7, 8, 14]
    assert stand_in(8, (8,)).hops(8) == 7
    one = parallel.Collective("all-reduce", "int8", (1000,), 64, times=3, bits=8, name="a")
    both = [one, parallel.Collective("all-reduce", "int8", (600,), 64, times=3, bits=8, name="a")]
    assert _estimate.launches([*both, one]) != [both]
    seconds = _estimate.seconds_of(both, grid)
    assert seconds == pytest.approx(3 * (2 * 63 / 64 * 1600 / 1e7 + 2 * 14 * 1e-4))


def test_rates_of_types_that_are_not_named():
    assert [CHIP.rate(t) for t in ("float8_e4m3fn", "uint4", "float16", "float32")] == [
        *(8e9, 8e9),
        *(4e9, 1e9),
    ]
    assert "819" in str(parallel.chips())


@pytest.mark.parametrize("name", ["v5e:3x3", "v5e:4", "tpu", "h100:9", 7])
def test_a_name_of_no_machine(name):
    with pytest.raises(ValueError, match=r"give one of 'v5e:1x1'.*'h100:8'"):
        parallel.topology(name)


@pytest.mark.parametrize(("name", "needs"), [("v5e:4x4", "libtpu"), ("h100:8", "jax_cuda12")])
def test_a_topology_that_is_not_installed(name, needs, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"needs {needs}.*pip install 'jaxopt_models\[aot\]'"):
        parallel.estimate(fn, PARAMS, X, on=name)


def test_a_topology_whose_compiler_is_taken(monkeypatch):
    from jax.experimental import topologies

    def taken(**options):
        raise jax.errors.JaxRuntimeError("ABORTED: accessing libtpu multi-process lockfile.")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", taken)
    with pytest.raises(RuntimeError, match="'v5e:2x2': another process has libtpu"):
        parallel.topology("v5e:2x2")


BAD = {
    "has 8 devices, which axes {'data': 3} do not make up": {"layouts": {"axes": {"data": 3}}},
    "names ['model']; the mesh has {'data': 8}": {
        "layouts": {"axes": {"data": 8}, "rules": MEGATRON}
    },
    "estimate: down of shape (128, 12): axis 1 of 12 does not divide over": {
        "layouts": {"rules": [("down", P(None, "data"))]},
        "narrow": 12,
    },
    "argument 0 after params of shape (12, 64): axis 0 of 12 does not divide": {"rows": 12},
    "the rules ['side'] divide nothing": {"layouts": {"rules": [("side", P("data"))]}},
    "bias of shape (64,) has fewer axes than": {"layouts": {"rules": [("bias", P(None, "data"))]}},
    "batch names ['rows']; the mesh has {'data': 8}": {"layouts": {"batch": "rows"}},
    "inputs has 2 specs for 1 arguments": {"layouts": {"inputs": (P(), P())}},
    "would split a group": {"layouts": {"rules": [("down", P("data"))]}, "group": 32},
    "nothing is known of devices of kind 'cpu'": {"chip": None},
    "chip='h200' is none of v5e, h100": {"chip": "h200"},
}


@pytest.mark.parametrize("message", BAD, ids=lambda m: m[:24])
def test_what_cannot_be_planned(message):
    options = {"chip": CHIP, **BAD[message]}
    group, rows = options.pop("group", None), options.pop("rows", ROWS)
    params = PARAMS if group is None else small(4, group)
    if narrow := options.pop("narrow", None):
        params = {**params, "down": jax.ShapeDtypeStruct((WIDE, narrow), jnp.float32)}
    layout = parallel.Layout(**options.pop("layouts", {}))
    x = jax.ShapeDtypeStruct((rows, NARROW), jnp.float32)
    with pytest.raises(ValueError) as e:
        parallel.estimate(fn, params, x, on=mesh(8), layouts=layout, **options)
    assert message in str(e.value)


def test_a_place_that_is_none():
    with pytest.raises(TypeError, match="on is int; give 'v5e:4x4', 'h100:8' or a Mesh"):
        parallel.estimate(fn, PARAMS, X, on=4)
    with pytest.raises(TypeError, match="layouts hold dict"):
        parallel.estimate(fn, PARAMS, X, on=mesh(8), chip=CHIP, layouts=[{"data": 8}])
    with pytest.raises(TypeError, match="others is list"):
        parallel.estimate(fn, PARAMS, X, on=mesh(8), chip=CHIP, others=[PARAMS])


def test_groups_of_a_1x1_convolution_are_divided_with_its_inputs():
    w = jax.random.normal(jax.random.key(0), (1, 1, 64, 6))
    leaf = quant.Int(bits=4, group=8)(w)
    specs = leaf.specs(P(None, None, "model"), (1, 1, 16, 6))
    place = lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh(2, 4), s))  # noqa: E731
    parts = jax.tree.map(place, leaf, specs)
    want = leaf.materialize()
    for i in range(4):
        shard = jax.tree.map(lambda x: x.addressable_shards[i].data, parts)  # noqa: B023
        got = shard.resized((1, 1, 16, 6)).materialize()
        np.testing.assert_array_equal(got, want[:, :, 16 * i : 16 * i + 16])


@pytest.mark.full
@pytest.mark.parametrize("name", ["v5e:4x4", "h100:8"])
def test_models_on_machines_that_are_not_there(name):
    python = os.environ.get("JAXOPT_MODELS_AOT_PYTHON")
    if not python:
        pytest.skip("JAXOPT_MODELS_AOT_PYTHON names no Python with the extra 'aot'")
    done = subprocess.run(
        [python, "-m", "benchmarks._parallel_aot", "layouts", name, "--quick"],
        cwd=ROOT,
        env={
            **{k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sys.path.insert(0, str(ROOT))
    from benchmarks import _parallel_layouts

    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 12
    for plan in found:
        assert plan["part"] <= 1.05 * plan["even"]
        assert _parallel_layouts._sums(plan) == 0

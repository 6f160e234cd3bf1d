"""What is read from compiled programs, against what the program was written to send."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_models import parallel


def grid(*sizes):
    names = ("d", "m", "k")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def compiled(fn, mesh, *args):
    given = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
        for shape, dtype, spec in args
    ]
    return jax.jit(fn).lower(*given).compile()


def summed(found):
    """Bytes, devices and times by kind and type."""
    return {(c.kind, c.dtype): (c.bytes, c.devices, c.times, c.sent) for c in found}


@pytest.fixture(scope="module")
def exchange():
    """Every kind of exchange over one axis of two."""
    mesh = grid(2, 4)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("d", "m"),) * 2,
        out_specs=P("d", "m"),
        check_vma=False,
    )
    def fn(x, q):
        a = jax.lax.all_gather(x, "m", tiled=True)
        b = jax.lax.psum_scatter(jnp.sin(a), "m", scatter_dimension=0, tiled=True)
        c = jax.lax.all_to_all(jnp.cos(b).reshape(4, -1), "m", 0, 0).reshape(b.shape)
        d = jax.lax.ppermute(jnp.tan(c), "m", [(i, (i + 1) % 4) for i in range(4)])
        e = jax.lax.pmax(d, "d")
        return e + jnp.sum(jax.lax.all_gather(q, "m", axis=1, tiled=True).astype(jnp.float32))

    return compiled(fn, mesh, ((64, 256), "float32", "dm"), ((64, 256), "int8", "dm"))


def test_kinds_types_sizes_and_groups(exchange):
    local = 32 * 64 * 4
    assert summed(parallel.collectives(exchange)) == {
        ("all-gather", "float32"): (4 * local, 4, 1, 3 * local),
        ("reduce-scatter", "float32"): (4 * local, 4, 1, 3 * local),
        ("all-to-all", "float32"): (local, 4, 1, 0.75 * local),
        ("collective-permute", "float32"): (local, 4, 1, local),
        ("all-reduce", "float32"): (local, 2, 1, local),
        ("all-gather", "int8"): (local, 4, 1, 0.75 * local),
    }


def test_the_text_does_as_well_as_the_program(exchange):
    assert parallel.collectives(exchange.as_text()) == parallel.collectives(exchange)


def test_loops_count_as_often_as_they_run():
    mesh = grid(8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    def fn(x):
        def inner(_, x):
            return jnp.sin(jax.lax.psum(x, "d"))

        def outer(x, _):
            return jax.lax.fori_loop(2, 5, inner, x), None

        x, _ = jax.lax.scan(outer, x, None, length=7)
        return x + jax.lax.pmin(x, "d")

    found = parallel.collectives(compiled(fn, mesh, ((64,), "float32", "d")))
    assert sorted((c.times, c.devices, c.shape, c.open) for c in found) == [
        (1, 8, (8,), False),
        (21, 8, (8,), False),
    ]


def test_a_loop_of_unknown_length_is_said_to_be_one():
    mesh = grid(8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    def fn(x):
        return jax.lax.while_loop(
            lambda x: jnp.sum(x) < 100, lambda x: jnp.exp(jax.lax.psum(x, "d")), x
        )

    found = parallel.collectives(compiled(fn, mesh, ((64,), "float32", "d")))
    assert [(c.times, c.open) for c in found] == [(1, True)]
    assert "unknown length" in str(parallel.collectives_table(found))


def test_two_products_in_a_row_need_one_all_reduce_a_layer():
    mesh = grid(2, 4)

    def fn(x, up, down):
        def layer(x, w):
            return jnp.tanh(x @ w[0]) @ w[1], None

        return jax.lax.scan(layer, x, (up, down))[0]

    program = compiled(
        fn,
        mesh,
        ((16, 32), "float32", "d"),
        ((6, 32, 64), "float32", (None, None, "m")),
        ((6, 64, 32), "float32", (None, "m")),
    )
    [one] = parallel.collectives(program)
    assert (one.kind, one.shape, one.devices, one.times) == ("all-reduce", (8, 32), 4, 6)
    assert one.sent == 6 * 1.5 * 8 * 32 * 4
    assert one.steps == 6 * 6


def test_arrays_that_are_sent_at_once_share_a_name():
    mesh = grid(8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False)
    def fn(x):
        return jax.lax.psum((x, x[:, 0]), "d")

    found = parallel.collectives(compiled(fn, mesh, ((64, 2), "float32", "d")))
    assert sum(math.prod(c.shape) for c in found) == 24
    assert len({c.name for c in found}) == 1


def module(body, partitions=16):
    return (
        f"HloModule m, is_scheduled=true, num_partitions={partitions}\n\n"
        "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n"
        "  %b = f32[] parameter(1)\n  ROOT %c = f32[] add(%a, %b)\n}\n\n"
        "ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n  %x = f32[8,4]{1,0} parameter(0)\n"
        f"{body}\n}}\n"
    )


GROUPS = {
    "{{0,1,2,3},{4,5,6,7}}": 4,
    "{{0},{1}}": 1,
    "{}": 16,
    "[2,8]<=[16]": 8,
    "[4,4]<=[4,4]T(1,0)": 4,
    "[1,16]<=[16]": 16,
    "mesh['a'=4,'b'=1,'c'=4] {'a'}": 4,
    "mesh['a'=4,'b'=2,'c'=2] {'a','c'}": 8,
    "mesh['a'=4,'b'=4] {'a':(1)2}": 2,
    "mesh['a'=4,'b'=4], device_ids=([4,4]T(1,0)) {'b'}": 4,
}


@pytest.mark.parametrize("groups", GROUPS)
def test_every_way_of_writing_groups(groups):
    line = f"  ROOT %y = f32[8,4]{{1,0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    [one] = parallel.collectives(module(line))
    assert (one.devices, one.shape) == (GROUPS[groups], (8, 4))


RING = "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
WRITTEN = {
    # As XLA writes them for a GPU, and for a TPU.
    "%y = f32[8,4]{1,0} all-reduce-start(%x), replica_groups=[4,4]<=[16], to_apply=%add": [
        ("all-reduce", "float32", (8, 4), 4)
    ],
    "%y = ((f32[8,4]{1,0}, s4[8,2]{1,0}), (f32[32,4]{1,0}, s4[32,2]{1,0})) "
    "all-gather-start(%x, %q), replica_groups=[4,4]<=[16], dimensions={0}": [
        ("all-gather", "float32", (32, 4), 4),
        ("all-gather", "int4", (32, 2), 4),
    ],
    "%y = ((f32[32,4]{1,0}), f32[8,4]{1,0}) reduce-scatter-start(%x), "
    "replica_groups=[4,4]<=[16], dimensions={0}, to_apply=%add": [
        ("reduce-scatter", "float32", (32, 4), 4)
    ],
    "%y = ((f32[4,512]{1,0}), f32[4,512]{1,0}) all-to-all-start(%x), "
    "replica_groups=[4,4]<=[16], dimensions={0}": [("all-to-all", "float32", (4, 512), 4)],
    "%y = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/u32[]{:S(2)}, "
    f"u32[]{{:S(2)}}) collective-permute-start(%x), {RING}": [
        ("collective-permute", "float32", (8, 4), 4)
    ],
    "%y = (f8e4m3fn[1,4]{1,0}, f8e4m3fn[1,4]{1,0}) all-to-all(%x, %x), "
    "replica_groups=[8,2]<=[16]": [("all-to-all", "float8_e4m3fn", (2, 1, 4), 2)],
}


@pytest.mark.parametrize("line", WRITTEN, ids=lambda line: line.split("(%x")[0].split()[-1])
def test_every_way_of_writing_a_collective(line):
    kind = line.split("(%x")[0].split()[-1]
    text = module("  " + line)
    if kind.endswith("-start"):
        done = kind.replace("start", "done")
        text = module(f"  {line}\n  ROOT %z = f32[8,4]{{1,0}} {done}(%y)")
    found = [(c.kind, c.dtype, c.shape, c.devices) for c in parallel.collectives(text)]
    assert found == WRITTEN[line]


def test_half_bytes_count_as_such():
    [one] = parallel.collectives(
        module(
            "  %y = s4[8,4]{1,0:E(4)} all-gather(%x), replica_groups=[8,2]<=[16], dimensions={0}"
        )
    )
    assert (one.bytes, one.sent) == (16, 8)


COUNTED = """HloModule m, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %copy.2 = s32[]{:T(128)} copy(%i)
  %one = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%copy.2, %one), metadata={op_name="jit(f)/while/body/add"}
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %y = f32[8]{0:T(128)S(1)} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next, %y)
}

%test (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(11)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: f32[8]) -> (s32[], f32[8]) {
  %x.1 = f32[8]{0} parameter(0)
  %zero = s32[]{:T(128)} constant(FIRST)
  %copy.8 = s32[]{:T(128)} copy(%zero)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%copy.8, %x.1)
  ROOT %w = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%start), condition=%test, body=%body
}
"""


@pytest.mark.parametrize(("first", "step", "times"), [(0, 1, 11), (3, 1, 8), (0, 2, 6), (20, 1, 0)])
def test_a_counter_is_read_where_the_compiler_says_nothing(first, step, times):
    text = COUNTED.replace("FIRST", str(first)).replace("STEP", str(step))
    assert len(range(first, 11, step)) == times
    [one] = parallel.collectives(text)
    assert (one.times, one.open) == (times, False)


def test_what_is_no_program():
    with pytest.raises(ValueError, match=r"give jax.jit\(fn\)\.lower\(\.\.\.\)\.compile\(\)"):
        parallel.collectives("x = 1")


def test_ring_shares_add_up_to_what_a_ring_sends():
    # A ring all-reduce, played through: n - 1 rounds that add, n - 1 that hand on.
    n, size = 6, 12
    data = np.arange(n * size, dtype=float).reshape(n, n, size // n)
    want, sent = data.sum(0), 0
    for add in (True, False):
        for r in range(n - 1):
            parts = [(i, (i - r + (not add)) % n) for i in range(n)]
            moved = [data[i, p].copy() for i, p in parts]
            sent += moved[0].size
            for (i, p), m in zip(parts, moved, strict=True):
                data[(i + 1) % n, p] = data[(i + 1) % n, p] + m if add else m
    np.testing.assert_allclose(data, np.broadcast_to(want, data.shape))
    one = parallel.Collective("all-reduce", "uint8", (size,), n)
    assert (one.sent, one.steps) == (sent, 2 * (n - 1))

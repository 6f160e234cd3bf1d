"""One file for a tree: bit for bit, self-describing, and nothing lost on failure."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from artifact_trees import (
    Scaled,
    assert_same,
    bits,
    clustered,
    lenet,
    mixed,
    quantized,
    stranger,
    tiny,
)
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models._bits import pack_bits
from jaxopt_models._bits import pack_codes as jax_pack_codes
from jaxopt_models.artifact import ArtifactError, Coder, inspect, load_recipe, size
from jaxopt_models.artifact import _packing as packing
from jaxopt_models.artifact._symbols import encode
from jaxopt_models.codebook._clustered import Clustered
from jaxopt_models.quant._quantized import Quantized

DTYPES = [
    *("bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"),
    *("uint32", "int64", "uint64", "float16", "bfloat16", "float32", "float64", "complex64"),
    *("complex128", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4"),
    *("float8_e4m3", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float8_e4m3b11fnuz", "float8_e8m0fnu"),
]


def trip(tmp_path, tree, **options):
    path = tmp_path / "tree.jom"
    n = jom.save(path, tree)
    assert n == path.stat().st_size
    return jom.load(path, **options)


def any_bits(name, shape, rng):
    """An array of random bits: NaN of any payload, infinities, denormals, -0.0."""
    if name == "bool":
        return rng.random(shape) < 0.5
    if name.startswith(("int", "uint")) and name.strip("uint") in ("2", "4"):
        n = int(name[-1])
        low = 0 if name[0] == "u" else -(1 << n - 1)
        return rng.integers(low, low + (1 << n), shape).astype(np.int8).astype(np.dtype(name))
    dtype = np.dtype(name)
    raw = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), np.uint8)
    if name.startswith(("float4", "float6")):
        raw &= (1 << int(name[5])) - 1
    return raw.reshape(-1).view(dtype).reshape(shape)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (40, 9)], ids=str)
def test_every_type_bit_for_bit(tmp_path, name, shape):
    x = any_bits(name, shape, np.random.default_rng(0))
    assert_same(trip(tmp_path, {"x": x}), {"x": x})


def test_special_values(tmp_path):
    tiny32 = np.float32([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, -1e-40, 3.4e38])
    payload = np.uint32([0x7F800001, 0xFFC12345, 0x7FFFFFFF]).view(np.float32)
    tree = {"a": jnp.asarray(tiny32), "b": payload, "c": np.float64([5e-324, -0.0, np.nan])}
    tree["big_endian"] = np.arange(5).astype(">f4")
    back = trip(tmp_path, tree)
    tree["big_endian"] = np.arange(5, dtype=np.float32)
    assert_same(back, tree)
    assert isinstance(back["a"], jax.Array) and isinstance(back["c"], np.ndarray)


def test_values_that_are_no_tensors(tmp_path):
    nan = float("nan")
    tree = {
        "none": None,
        "numbers": [1, -(2**63), True, 2.5, -0.0, nan, float("-inf"), "", "ä\n"],
        "empty": [{}, [], (), {"a": {"b": {}}}],
        "tuple": (1, (2, [3, {"x": None}])),
        "keys": {0: jnp.zeros(1), 10: jnp.ones(1), -3: {"a/b": jnp.ones(2)}},
        "a/b": {"c/": jnp.ones(3)},
        "numpy": np.float32(2.5),
    }
    back = trip(tmp_path, tree)
    assert_same(back.pop("numpy"), jnp.float32(2.5))
    tree.pop("numpy")
    assert_same(back, tree)
    for root in (jnp.arange(3.0), None, {}, [], 5, "text"):
        assert_same(trip(tmp_path, root), root)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_random_keys(tmp_path, impl):
    one = jax.random.key(7, impl=impl)
    tree = {"one": one, "many": jax.random.split(one, (2, 3)), "old": jax.random.PRNGKey(1)}
    back = trip(tmp_path, tree)
    assert_same(back, tree)
    assert (jax.random.normal(back["one"], 4) == jax.random.normal(one, 4)).all()


class Point(NamedTuple):
    x: jax.Array
    y: dict


def test_other_nodes_become_dicts_and_come_back_with_like(tmp_path):
    point = Point(jnp.ones(2), {"z": jnp.zeros(1)})
    back = trip(tmp_path, [point])
    assert_same(back, [{"x": point.x, "y": point.y}])
    again = trip(tmp_path, [point], like=[point])
    assert isinstance(again[0], Point)
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    state = optax.adam(1e-3).init(params)
    again = trip(tmp_path, state, like=state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert list(map(bits, jax.tree.leaves(again))) == list(map(bits, jax.tree.leaves(state)))
    with pytest.raises(ValueError, match=r"like= does not fit: not in the file \['v'\]"):
        trip(tmp_path, params, like={"w": 0, "b": 0, "v": 0})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        x = nn.Dense(16, kernel_init=init)(x)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x))


def test_linen_variables(tmp_path):
    x = jnp.ones((2, 8))
    variables = Net().init(jax.random.key(0), x)
    small = jom.compress(variables, [jom.Rule(".*/kernel", jom.quant.Int(bits=4))])
    back = trip(tmp_path, small)
    again = trip(tmp_path, small, like=small)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    y = Net().apply(jom.materialize(small), x)
    for tree in (back, again):
        assert (Net().apply(jom.materialize(tree), x) == y).all()
    part = trip(tmp_path, small, only="Dense_0/kernel|batch_stats/.*")
    assert set(part) == {"params", "batch_stats"} and set(part["params"]) == {"Dense_0"}
    assert_same(part["params"]["Dense_0"]["kernel"], back["params"]["Dense_0"]["kernel"])


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](self.dropout(self.norm(self.layers[0](x))))


def test_nnx_state(tmp_path):
    model = Twin(nnx.Rngs(0))
    graph, state = nnx.split(model)
    small = jom.compress(state, [jom.Rule(".*/kernel", jom.quant.Int(bits=3))])
    back = trip(tmp_path, small, like=nnx.state(model))
    assert type(back) is type(state)
    x = jnp.ones((2, 8))
    y = nnx.merge(graph, jom.materialize(small))(x)
    assert (nnx.merge(graph, jom.materialize(back))(x) == y).all()
    want = [bits(v) for v in jax.tree.leaves(small)]
    assert [bits(v) for v in jax.tree.leaves(back)] == want
    plain = trip(tmp_path, small)
    assert set(plain["layers"]) == {0, 1} or set(plain["layers"]) == {"0", "1"}


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape, core", [((5,), ()), ((), ()), ((3, 11), (11,)), ((2, 3, 8), (8,))])
def test_numpy_packs_as_jax_does(width, signed, shape, core):
    low = -(1 << width - 1) if signed else 0
    rng = np.random.default_rng(width)
    codes = rng.integers(low, low + (1 << width), shape).astype(np.int8 if signed else np.uint8)
    packed = packing.pack_codes(codes, core, bits=width, signed=signed)
    wide = jnp.asarray(codes.astype(np.int32) if core else codes.astype(np.int32)[..., None])
    assert bits(packed) == bits(jax_pack_codes(wide, bits=width, signed=signed))
    back = packing.unpack_codes(packed, core, shape, bits=width, signed=signed)
    assert back.dtype == codes.dtype and (back == codes).all()
    keep = codes > 0
    mask = packing.pack_mask(keep, core)
    assert bits(mask) == bits(pack_bits(jnp.asarray(keep if core else keep[..., None])))
    assert (packing.unpack_mask(mask, core, shape) == keep).all()


def draw_leaf(kind, stack, core, width, seed):
    """A leaf of random parts, dropped entries zero."""
    rng = np.random.default_rng(seed)
    shape = (*stack, *core)
    keep = rng.random(shape) < rng.random()
    out = tuple(a for a in range(len(core)) if rng.random() < 0.5)
    per = (*stack, *(core[a] for a in out))
    rows = int(np.prod([core[a] for a in range(len(core)) if a not in out]))
    signed = kind != "clustered" and rng.random() < 0.5
    low = -(1 << width - 1) if signed else 0
    codes = rng.integers(low, low + (1 << width), shape).astype(np.int8 if signed else np.uint8)
    if kind.startswith("masked"):
        codes = np.where(keep, codes, codes.dtype.type(0))
    packed = packing.to_jax(packing.pack_codes(codes, core, bits=width, signed=signed))
    if "clustered" in kind:
        book = jnp.asarray(any_bits("float32", (*per, 1 << width), rng))
        x = Clustered(packed, book, core, out, width, "bfloat16")
        x = x if not signed else None
    elif "quantized" in kind:
        groups = int(rng.choice([g for g in range(1, rows + 1) if rows % g == 0] or [1]))
        scale = jnp.asarray(any_bits("float32", (*per, groups), rng))
        zero = None if signed else jnp.asarray(any_bits("uint8", scale.shape, rng))
        x = Quantized(packed, scale, zero, core, out, width, "float16")
    else:
        name = str(rng.choice(["float32", "bfloat16", "float8_e5m2", "float64", "int4"]))
        values = any_bits(name, shape, rng)
        zeros = np.frombuffer(bytes(values.nbytes), values.dtype).reshape(shape)
        x = packing.to_jax(np.where(keep, values, zeros))
    if kind.startswith("masked"):
        x = jom.Masked(jnp.asarray(packing.pack_mask(keep, core)), x, core)
    return x


DIMS = st.lists(st.integers(0, 5), max_size=3).map(tuple)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=4),
    st.builds(
        lambda name, shape, seed: packing.to_jax(
            any_bits(name, shape, np.random.default_rng(seed))
        ),
        st.sampled_from(DTYPES),
        DIMS,
        st.integers(0, 2**32),
    ),
    st.builds(
        draw_leaf,
        st.sampled_from(["quantized", "masked quantized", "masked", "masked quantized"]),
        st.lists(st.integers(1, 3), max_size=2).map(tuple),
        st.lists(st.integers(1, 9), max_size=3).map(tuple),
        st.integers(1, 8),
        st.integers(0, 2**32),
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda s: st.one_of(
        st.lists(s, max_size=3),
        st.lists(s, max_size=3).map(tuple),
        st.dictionaries(st.text("ab/é", max_size=2), s, max_size=3),
        st.dictionaries(st.integers(-3, 12), s, max_size=3),
    ),
    max_leaves=8,
)


@given(TREES)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_random_trees(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "tree.jom"
    try:
        n = jom.save(path, tree)
    except ValueError as e:
        assert "two leaves have the path" in str(e)
        return
    assert_same(jom.load(path), tree)
    assert inspect(path).data["file_bytes"] == n == os.path.getsize(path) == size(tree)


@pytest.mark.parametrize("kind", ["quantized", "masked quantized", "masked clustered"])
@pytest.mark.parametrize("core", [(), (7,), (4, 9), (3, 2, 5)], ids=str)
@pytest.mark.parametrize("stack", [(), (2,)], ids=str)
def test_every_width(tmp_path, kind, core, stack):
    tree = {}
    for width in range(1, 9):
        seed = width
        while (leaf := draw_leaf(kind, stack, core, width, seed)) is None or (
            getattr(leaf, "values", 0) is None
        ):
            seed += 100
        tree[str(width)] = leaf
    assert_same(trip(tmp_path, tree), tree)


def test_deep_nesting_of_leaves(tmp_path):
    rng = np.random.default_rng(0)
    inner = clustered(rng, (8, 9), 0.5, 3)
    outer = jom.Masked(pack_bits(jnp.asarray(rng.random((8, 9)) < 0.5)), inner, (8, 9))
    assert_same(trip(tmp_path, {"w": outer}), {"w": outer})


def test_paths_of_only_and_bytes_read(tmp_path):
    path = tmp_path / "large.jom"
    noise = np.random.default_rng(0).integers(0, 256, 2_000_000, np.uint8)
    tree = {"a": {"x": noise, "y": jnp.ones(3)}, "b": [noise, jnp.zeros(2)], "c": {"d": None}}
    jom.save(path, tree)

    def bytes_read():
        with open("/proc/self/io") as f:
            return int(f.readline().split()[1])

    before = bytes_read()
    part = jom.load(path, only="a/y|b/1")
    read = bytes_read() - before
    assert_same(part, {"a": {"y": tree["a"]["y"]}, "b": [tree["b"][1]], "c": {"d": None}})
    assert read < 100_000
    # A damaged tensor that is not asked for does no harm.
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert_same(jom.load(path, only="a/y"), {"a": {"y": tree["a"]["y"]}, "c": {"d": None}})
    with pytest.raises(ArtifactError, match="is damaged: its checksum"):
        jom.load(path)
    with pytest.raises(ValueError, match="only='z' matches no tensor; paths are: a/x, a/y, b/0"):
        jom.load(path, only="z")


def test_the_leaf_of_a_stranger(tmp_path):
    tree = stranger()
    path = tmp_path / "a.jom"
    jom.save(path, tree)
    assert_same(jom.load(path, types=[Scaled]), tree)
    assert inspect(path, types=[Scaled]).data["parameters"] == 2 * 96 + 2
    words = r"leaf of class 'artifact_trees:Scaled'; if you trust it, pass types="
    for call in (jom.load, inspect):
        with pytest.raises(ArtifactError, match=words):
            call(path)
    with pytest.raises(TypeError, match="is no leaf class"):
        jom.load(path, types=[dict])


@jom.leaf
class Coded(Quantized):
    """The coded fields of a class that is derived from ours."""


def test_a_leaf_derived_from_ours(tmp_path):
    q = quantized(np.random.default_rng(0), (16, 8), 4, stack=(2,))
    leaf = Coded(q.codes, q.scale, None, q.core, q.out, q.bits, q.dtype_name)
    path = tmp_path / "a.jom"
    n = jom.save(path, {"w": leaf})
    assert_same(jom.load(path, types=[Coded]), {"w": leaf})
    assert inspect(path, types=[Coded]).rows[0]["kind"] == "Coded" and n < 400


def test_a_stranger_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, {"w": Scaled(jnp.ones((8, 4)), jnp.float32(2), (8, 3))})
    with pytest.raises(ArtifactError, match=r"w: .*do not fit together"):
        jom.load(path, types=[Scaled])


@pytest.mark.parametrize("dense", ["bfloat16", "float16"])
def test_dense_in_fewer_bits(tmp_path, dense):
    rng = np.random.default_rng(0)
    tree = mixed() | {"w": clustered(rng, (30, 20), 0.2, 4), "b": jnp.asarray([1e-9, 1 / 3])}
    path = tmp_path / "a.jom"
    assert jom.save(path, tree, dense=dense) < size(tree) - 200
    back = jom.load(path)

    def rounded(x):
        return x.astype(dense).astype(jnp.float32)

    masked = tree["masked"]
    want = dict(tree, b=rounded(tree["b"]), dense=[rounded(tree["dense"][0]), *tree["dense"][1:]])
    want["masked"] = jom.Masked(
        masked.mask, jnp.where(masked.keep(), rounded(masked.values), 0), masked.core
    )
    assert_same(back, want)
    assert size(back) <= size(tree)
    if dense == "float16":
        with pytest.raises(ValueError, match="save: x/big: values beyond the range of float16"):
            jom.save(path, {"x": {"big": jnp.asarray([1.0, 1e5])}}, dense=dense)
        with pytest.raises(ValueError, match="save: w: values beyond the range"):
            mask = pack_bits(jnp.ones((2, 2), bool))
            jom.save(path, {"w": jom.Masked(mask, jnp.full((2, 2), 1e6), (2, 2))}, dense=dense)
    inf = {"x": jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1.0])}
    jom.save(path, inf, dense=dense)
    assert_same(jnp.isnan(jom.load(path)["x"]), jnp.isnan(inf["x"]))
    with pytest.raises(ValueError, match="dense='int8'"):
        jom.save(path, tree, dense="int8")


@pytest.mark.parametrize("make", [lenet, mixed, tiny])
def test_the_parts_sum_to_the_file(tmp_path, make):
    path = tmp_path / "a.jom"
    n = jom.save(path, make())
    table = inspect(path)
    assert sum(row["bytes"] for row in table.rows) == n == os.path.getsize(path)
    assert sum(table.data["bytes_by_part"].values()) == table.data["file_bytes"] == n
    assert table.data["ratio"] == 4 * table.data["parameters"] / n
    assert str(n) in str(table).replace(",", "")


def test_what_inspect_says(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, lenet())
    table = inspect(path)
    assert table.data["parameters"] == 266_610
    rows = {(row["path"], row["part"]): row for row in table.rows}
    index = rows["ip1/kernel", "index"]
    assert (index["kind"], index["shape"], index["coder"]) == (
        "Masked(Clustered)",
        [784, 300],
        "lines",
    )
    assert {rows[f"ip{i}/kernel", "codes"]["coder"] for i in (1, 2)} == {"range"}
    assert (rows["ip1/bias", "scale"]["coder"], rows["ip1/bias", "scale"]["bytes"]) == (
        "float32",
        4,
    )
    jom.save(path, mixed())
    # Integers, keys and counts are no parameters.
    dense = 13 * 17 + 40 + 9
    assert inspect(path).data["parameters"] == 64 * 24 + 3 * 16 * 12 + 600 + dense


def test_the_stated_coder_is_the_smallest(tmp_path):
    """Streams by their symbols: what inspect states is the best of all coders."""
    rng = np.random.default_rng(1)
    streams = {
        "same": np.full(500, 3),
        "flat": rng.integers(0, 256, 4000),
        "skewed": np.minimum(rng.geometric(0.3, 4000) - 1, 255),
        "short": np.array([0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0, 1]),
    }
    path = tmp_path / "a.jom"
    jom.save(path, {k: v.astype(np.uint8) for k, v in streams.items()})
    stated: dict[str, tuple[str, int]] = {}
    for row in inspect(path).rows:
        if row["kind"] == "dense":
            before = stated.get(row["path"], ("", 0))[1]
            stated[row["path"]] = row["coder"], before + row["bytes"]
    for name, symbols in streams.items():
        fits = []
        for coder in Coder:
            try:
                s = encode(symbols, 256, coders=(coder,))
            except ValueError:
                continue
            fits.append((s.nbytes, s.coder.name.lower()))
        assert stated[name] == min(fits)[::-1]
    assert {c for c, _ in stated.values()} >= {"constant", "plain", "range"}


RECIPE = [
    jom.Rule("ip3/kernel", jom.chain(jom.prune.Magnitude(0.8), jom.codebook.KMeans(bits=5))),
    jom.Rule(".*/kernel", jom.chain(jom.prune.Magnitude(0.937), jom.codebook.KMeans(bits=5))),
    jom.Rule(".*/bias", jom.quant.Int(bits=8, per="tensor")),
]


def lenet5():
    rng = np.random.default_rng(0)
    shapes = {"conv1": (5, 5, 1, 20), "conv2": (5, 5, 20, 50), "ip1": (800, 500), "ip2": (500, 10)}
    return {
        k: {"kernel": clustered(rng, s, 0.1, 5), "bias": quantized(rng, s[-1:], 8, out=())}
        for k, s in shapes.items()
    }


def transformer(layers=12):
    """100 tensors as transformers have them."""
    rng = np.random.default_rng(0)
    tree = {"wte": quantized(rng, (100, 16), 8), "wpe": jnp.ones((8, 16)), "ln_f": jnp.ones(16)}
    tree["lm_head"] = quantized(rng, (16, 100), 4)
    for i in range(layers):
        tree[f"block_{i}"] = {
            "attention": {
                k: {"kernel": quantized(rng, (16, 16), 4)} for k in ("query", "key", "value", "out")
            },
            "mlp": {
                "up": {"kernel": quantized(rng, (16, 64), 4)},
                "down": {"kernel": quantized(rng, (64, 16), 4)},
            },
            "ln_1": {"scale": jnp.ones(16)},
            "ln_2": {"scale": jnp.ones(16)},
        }
    return tree


def linen(tree):
    return {"params": tree, "batch_stats": {"norm": {"mean": jnp.zeros(3)}}}


@pytest.mark.parametrize(
    "make, most",
    [
        (lenet, 160 + 24 * 6),
        (lenet5, 160 + 24 * 8),
        (lambda: linen(lenet()), 160 + 24 * 7),
        (transformer, 160 + 24 * 100),
    ],
    ids=["lenet300", "lenet5", "linen", "transformer"],
)
def test_the_container_is_lean(tmp_path, make, most):
    jom.save(tmp_path / "a.jom", make(), recipe=RECIPE)
    assert inspect(tmp_path / "a.jom").data["container_bytes"] <= most


def test_recipes_come_back(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, lenet(), recipe=RECIPE)
    assert load_recipe(path) == RECIPE
    jom.save(path, tiny())
    assert load_recipe(path) is None


def test_the_same_tree_gives_the_same_bytes(tmp_path):
    a, b = tmp_path / "a.jom", tmp_path / "b.jom"
    tree = mixed()
    jom.save(a, tree, recipe=RECIPE)
    jom.save(b, dict(reversed(tree.items())), recipe=RECIPE)
    assert a.read_bytes() == b.read_bytes()
    jom.save(b, jom.load(a), recipe=load_recipe(a))
    assert a.read_bytes() == b.read_bytes()


def test_equal_codes_are_padded(tmp_path):
    """A tensor of nothing costs a byte for every 4096 entries, or it could not be believed."""
    path = tmp_path / "a.jom"
    tree = {"w": np.zeros((4096, 512), np.uint8)}
    n = jom.save(path, tree)
    assert 512 <= n < 700
    assert inspect(path).data["bytes_by_part"]["padding"] == 511
    assert_same(jom.load(path), {"w": jnp.asarray(tree["w"])})


class Colour(int):
    pass


@pytest.mark.parametrize(
    "tree, error, words",
    [
        ({"a": {"b": object()}}, TypeError, "a/b is a object"),
        ({"a": {"b": 1j}}, TypeError, "a/b is a complex"),
        ({"a": [b"bytes"]}, TypeError, "a/0 is a bytes"),
        ({"a": Colour(3)}, TypeError, "a is a Colour"),
        ({"a": 2**63}, ValueError, "a: 9223372036854775808 has more than 64 bits"),
        ({"a": np.array(["x"])}, TypeError, "a: a file cannot hold arrays of str"),
        ({"a": np.array([None])}, TypeError, "a: a file cannot hold arrays of object"),
        ({"a": {(1, 2): jnp.ones(1)}}, TypeError, "keys of a are strings or integers"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, ValueError, "two leaves have the path"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, TypeError, "a is a ShapeDtypeStruct"),
        ({"a": Scaled(jnp.ones(2), jnp.ones(()), (2,), 1j)}, TypeError, "a: static field 1j"),
        (
            {"a": Scaled(jnp.ones(2), jnp.ones(()), (2,), np.inf)},
            ValueError,
            "a: inf is not finite",
        ),
        (
            {
                "a": Quantized(
                    jnp.ones((2, 3), jnp.int8), jnp.ones((3, 7)), None, (2, 3), (1,), 8, "float32"
                )
            },
            ValueError,
            "a: a description is malformed",
        ),
        (
            jom.partition({"a": clustered(np.random.default_rng(0), (8, 9), 0.5, 3)})[0],
            TypeError,
            "half",
        ),
        ({"a": jom.Masked(None, jnp.ones(2), (2,))}, TypeError, "a: a Masked without mask is half"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, tree, error, words):
    path = tmp_path / "a.jom"
    jom.save(path, tiny())
    old = path.read_bytes()
    with pytest.raises(error, match=words):
        jom.save(path, tree)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.jom"]


def test_tracers_and_depth(tmp_path):
    with pytest.raises(TypeError, match="save: x: "):
        jax.jit(lambda x: jom.save(tmp_path / "a.jom", {"x": x}))(jnp.ones(2))
    tree = jnp.ones(1)
    for _ in range(64):
        tree = {"a": tree}
    assert_same(trip(tmp_path, tree), tree)
    with pytest.raises(ValueError, match="deeper than 64"):
        jom.save(tmp_path / "a.jom", {"a": tree})


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The system stops the writing in the middle; here by a limit on the size of files."""
    path = tmp_path / "a.jom"
    jom.save(path, tiny())
    old = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            jom.save(path, {"x": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.jom"]


READ_ONLY = """
import os, sys
import jax.numpy as jnp
import jaxopt_models as jom
folder, path = sys.argv[1:]
tree = {"x": jnp.ones(3)}
jom.save(path, tree)  # before the rights are given up, and everything is imported
jom.load(path)
os.chmod(folder, 0o555)
os.chmod(path, 0o000)
if os.geteuid() == 0:
    os.setuid(65534)
for call in (lambda p: jom.save(p, tree), jom.load, jom.artifact.inspect):
    try:
        call(path)
    except PermissionError as e:
        print("refused", e.filename.startswith(folder))
"""


def test_missing_rights_are_system_errors():
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:
        os.chmod(outer, 0o755)
        folder = os.path.join(outer, "folder")
        os.mkdir(folder)
        path = os.path.join(folder, "a.jom")
        child = subprocess.run(
            [sys.executable, "-c", READ_ONLY, folder, path], capture_output=True, text=True
        )
        assert child.stdout.splitlines() == ["refused True"] * 3, child.stderr
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == ["a.jom"]
    with pytest.raises(FileNotFoundError):
        jom.load("/nowhere/a.jom")
    with pytest.raises(FileNotFoundError):
        jom.save("/nowhere/a.jom", {})


KILLED = """
import sys
import numpy as np
import jaxopt_models as jom
noise = np.random.default_rng(0).integers(0, 256, 1_000_000, np.uint8)
print("ready", flush=True)
jom.save(sys.argv[1], [noise] * 500)
"""


def test_a_kill_in_the_middle_of_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, tiny())
    old = path.read_bytes()
    child = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    while not any(os.path.getsize(tmp_path / name) > 1 << 20 for name in os.listdir(tmp_path)):
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert_same(jom.load(path), tiny())

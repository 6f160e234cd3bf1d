"""One file for a tree: bit for bit, self-describing, and nothing lost on failure."""

import os
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from artifact_trees import (
    assert_same,
    bits,
    clustered,
    mixed,
)
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxopt_models as jom
from jaxopt_models._bits import pack_bits
from jaxopt_models.artifact import ArtifactError, inspect, size
from jaxopt_models.artifact import _packing as packing
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


def draw_leaf(kind, stack, core, width, seed):
    """A leaf of random parts, dropped entries zero."""
    rng = np.random.default_rng(seed)
    shape = (*stack, *core)
    keep = rng.random(shape) < rng.random()
    out = tuple(a for a in range(len(core)) if rng.random() < 0.5)
    per = (*stack, *(core[a] for a in out))
    rows = int(np.prod([core[a] for a in range(len(core)) if a not in out]))
    signed = "clustered" not in kind and rng.random() < 0.5
    low = -(1 << width - 1) if signed else 0
    codes = rng.integers(low, low + (1 << width), shape).astype(np.int8 if signed else np.uint8)
    if kind.startswith("masked"):
        codes = np.where(keep, codes, codes.dtype.type(0))
    packed = packing.to_jax(packing.pack_codes(codes, core, bits=width, signed=signed))
    if "clustered" in kind:
        book = jnp.asarray(any_bits("float32", (*per, 1 << width), rng))
        x = Clustered(packed, book, core, out, width, "bfloat16")
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


KINDS = ["quantized", "clustered", "masked quantized", "masked clustered", "masked"]
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
        st.sampled_from(
            ["quantized", "clustered", "masked quantized", "masked clustered", "masked"]
        ),
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
    tree = {str(width): draw_leaf(kind, stack, core, width, width) for width in range(1, 9)}
    assert_same(trip(tmp_path, tree), tree)


def test_any_character_in_a_path(tmp_path):
    tree = {"a\nb": jnp.ones(2), "c": {"": jnp.zeros(1), "(": jnp.arange(3)}}
    assert_same(trip(tmp_path, tree), tree)
    assert_same(jom.load(tmp_path / "tree.jom", only="a.b"), {"a\nb": tree["a\nb"]})
    with pytest.raises(ValueError, match=r"only='\(' is no regular expression"):
        jom.load(tmp_path / "tree.jom", only="(")


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

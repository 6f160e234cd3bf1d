"""Reading safetensors files and artifacts as checkpoints: the reference writes, we read."""

import json
import mmap
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import jaxopt_models as jom
from jaxopt_models._checkpoint import ACCEPTED, read_checkpoint

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
    "bool": "BOOL",
}


def write(path, tensors):
    """Writes through the reference implementation."""
    save_file({name: np.asarray(x) for name, x in tensors.items()}, path)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def is_mapped(x):
    while isinstance(x, np.ndarray):
        x = x.base
    return isinstance(getattr(x, "obj", x), mmap.mmap)


@pytest.mark.parametrize("name", NAMES)
def test_every_type_is_read_bit_for_bit_and_mapped(tmp_path, name):
    bits = np.random.default_rng(0).integers(0, 256, 7 * 5 * 8, np.uint8)
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    x = (bits % 2 if name == "bool" else bits).view(dtype)[:35].reshape(7, 5)
    write(tmp_path / "m.safetensors", {"a.b": x, "a.c": np.float32(3), "e": np.empty((0, 4))})
    tree = read_checkpoint(tmp_path / "m.safetensors")
    got = tree["a"]["b"]
    assert got.dtype == dtype and got.shape == (7, 5)
    assert got.tobytes() == x.tobytes()
    assert is_mapped(got) and not got.flags.writeable
    assert tree["a"]["c"].shape == () and tree["a"]["c"] == 3
    assert tree["e"].shape == (0, 4)


def test_numpy_file_with_metadata_equals_the_reference(tmp_path):
    x = {"encoder.layer.0.weight": np.arange(6.0).reshape(2, 3), "step": np.int64(7).reshape(1)}
    save_file(x, tmp_path / "m.safetensors", metadata={"format": "np"})
    tree = read_checkpoint(str(tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(
        tree["encoder"]["layer"]["0"]["weight"], x["encoder.layer.0.weight"]
    )
    assert list(tree["step"]) == [7]


def test_unaligned_data_becomes_a_jax_array(tmp_path):
    x = np.arange(5, dtype=np.float32)
    header = json.dumps({"w": entry(shape=(5,), offsets=(0, 20))}).encode()
    header += b" " * (3 - len(header) % 4)  # any number but a multiple of four
    assert len(header) % 4
    (tmp_path / "m").write_bytes(raw(header, x.tobytes()))  # known by content, not by name
    got = read_checkpoint(tmp_path / "m")["w"]
    assert not got.flags.aligned
    np.testing.assert_array_equal(jnp.asarray(got), x)


def test_torch_layout_gives_one_scale_per_row(tmp_path):
    w = np.random.default_rng(0).standard_normal((3, 8)).astype(ml_dtypes.bfloat16)
    write(tmp_path / "m.safetensors", {"ip1.weight": w})
    tree = read_checkpoint(tmp_path / "m.safetensors")
    rule = jom.Rule("ip1/weight", jom.quant.Int(bits=8), jom.Axes.torch())
    small = jom.compress(tree, [rule])["ip1"]["weight"]
    assert small.scale.shape == (3, 1) and small.dtype == jnp.bfloat16
    step = np.abs(w.astype(np.float32)).max(1, keepdims=True) / 127
    miss = np.abs(np.asarray(small.materialize(), np.float32) - w.astype(np.float32))
    assert (miss <= step / 2 + np.abs(w.astype(np.float32)) / 128).all()


@pytest.mark.parametrize(
    "header, data, says",
    [
        (b"[]", b"", "not an object"),
        (b"{", b"", "malformed header"),
        (b"\xff{}", b"", "malformed header"),
        (b"[" * 100_000, b"", "malformed header"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        ({"\ud800": entry()}, bytes(8), "malformed header"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ({"w": 3}, b"", "'w'.*expected dtype"),
        ({"w": {**entry(), "more": 1}}, bytes(8), "'w'.*expected dtype"),
        ({"w": entry("F4")}, bytes(8), "'w'.*dtype 'F4' is none of BF16"),
        ({"w": entry(["F32"])}, bytes(8), "'w'.*dtype"),
        ({"w": entry(shape=(-2,))}, bytes(8), "'w'.*shape"),
        ({"w": entry(shape=(True, 2))}, bytes(8), "'w'.*shape"),
        ({"w": entry(shape=(2.0,))}, bytes(8), "'w'.*shape"),
        ({"w": entry(shape=[1] * 40 + [2])}, bytes(8), "'w'.*shape"),
        ({"w": entry(shape=(3,))}, bytes(8), "'w'.*8 bytes for F32"),
        ({"w": entry(shape=(0, 1 << 62, 1 << 62), offsets=(0, 0))}, b"", "'w'"),
        ({"w": entry(offsets=(0, 16))}, bytes(8), "'w'.*data_offsets"),
        ({"w": entry(offsets=(8, 0))}, bytes(8), "'w'.*data_offsets"),
        ({"w": entry(offsets=(-8, 0))}, bytes(8), "'w'.*data_offsets"),
        ({"w": entry(offsets=(0,))}, bytes(8), "'w'.*data_offsets"),
        ({"w": entry(), "v": entry(offsets=(4, 12))}, bytes(12), "'v'.*overlaps"),
        ({"w": entry(), "v": entry()}, bytes(8), "'w'.*overlaps"),
        ({"w": entry(), "v": entry(offsets=(12, 20))}, bytes(20), "'v'.*hole"),
        ({"w": entry()}, bytes(9), "end at 8 of 9"),
        ({"w": entry("BOOL", (2,), (0, 2))}, b"\1\2", "'w'.*booleans"),
        ({"a": entry(), "a.b": entry(offsets=(8, 16))}, bytes(16), "'a' is a tensor and the pre"),
        ({"a.b": entry(), "a": entry(offsets=(8, 16))}, bytes(16), "'a' is a tensor and the pre"),
        ({"a.b.c": entry(), "a.b": entry(offsets=(8, 16))}, bytes(16), "'a.b' is a tensor"),
        ({"." * 99: entry()}, bytes(8), "dotted parts"),
    ],
)
def test_hostile_headers_name_file_and_tensor(tmp_path, header, data, says):
    (tmp_path / "bad.safetensors").write_bytes(raw(header, data))
    with pytest.raises(ValueError, match=rf"(?s)bad\.safetensors.*{says}"):
        read_checkpoint(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("blob", [b"", b"1234567", (1 << 63).to_bytes(8, "little"), bytes([9] * 9)])
def test_header_lengths_beyond_the_file_are_refused(tmp_path, blob):
    (tmp_path / "bad.safetensors").write_bytes(blob)
    with pytest.raises(ValueError, match=r"bad\.safetensors: no safetensors file: a header of"):
        read_checkpoint(tmp_path / "bad.safetensors")


def test_a_header_above_the_cap_is_not_read(tmp_path):
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as f:
        f.write((100_000_001).to_bytes(8, "little"))
        f.truncate(200_000_000)  # sparse
    with pytest.raises(ValueError, match="at most 100000000"):
        read_checkpoint(path)


@settings(max_examples=200, deadline=None)
@given(header=st.binary(max_size=60), data=st.binary(max_size=40), cut=st.integers(0, 4))
def test_random_bytes_are_a_value_error(tmp_path_factory, header, data, cut):
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    blob = raw(header, data)
    path.write_bytes(blob[: len(blob) - cut])
    with pytest.raises(ValueError, match=r"random\.safetensors"):
        read_checkpoint(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
SMALL = st.integers(-1, 24)
FIELD = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from([*NAMES.values(), "C64"])),
    st.tuples(st.just("shape"), st.lists(SMALL, max_size=3)),
    st.tuples(st.just("data_offsets"), st.lists(SMALL, min_size=2, max_size=2)),
    st.tuples(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), JSON),
)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.sampled_from(["a", "b.c", "d"]), FIELD), max_size=3))
def test_what_we_accept_the_reference_accepts_alike(tmp_path_factory, changes):
    header = {
        "a": entry(shape=(2, 1), offsets=(0, 8)),
        "b.c": entry("BF16", (4,), (8, 16)),
        "d": entry("U8", (8,), (16, 24)),
    }
    for name, (field, value) in changes:
        header[name][field] = value
    blob = raw(header, bytes(range(24)))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(blob)
    try:
        tree = read_checkpoint(path)
    except ValueError as e:
        assert changes and "mutated.safetensors" in str(e)  # what is unchanged is read
        return
    want = dict(safetensors.deserialize(blob))
    found = {"a": tree["a"], "b.c": tree["b"]["c"], "d": tree["d"]}
    assert {k: (NAMES[x.dtype.name], list(x.shape), x.tobytes()) for k, x in found.items()} == {
        k: (v["dtype"], v["shape"], bytes(v["data"])) for k, v in want.items()
    }


def sharded(folder, where=None, **more):
    """Two shards and their index."""
    write(folder / "m-1.safetensors", {"a.w": np.ones((2, 2), np.float32)})
    write(folder / "m-2.safetensors", {"b.w": np.zeros(3, np.float16), "b.v": np.int8([1])})
    where = {"a.w": "m-1.safetensors", "b.w": "m-2.safetensors", "b.v": "m-2.safetensors"} | (
        where or {}
    )
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 23}, "weight_map": where} | more))
    return index


def test_shards_are_one_tree_by_folder_or_index(tmp_path):
    index = sharded(tmp_path)
    for tree in (read_checkpoint(index), read_checkpoint(tmp_path)):
        assert jax.tree.map(lambda x: x.shape, tree) == {
            "a": {"w": (2, 2)},
            "b": {"w": (3,), "v": (1,)},
        }
        assert is_mapped(tree["b"]["w"])


@pytest.mark.parametrize(
    "where, says",
    [
        ({"c": "m-3.safetensors"}, "shard 'm-3.safetensors' is missing"),
        ({"c": "m-1.safetensors"}, r"m-1\.safetensors: holds no tensor 'c'"),
        ({"b.v": "m-1.safetensors"}, r"m-1\.safetensors: holds no tensor 'b.v'"),
        ({"c": "../m.safetensors"}, "outside the folder"),
        ({"c": "..\\m.safetensors"}, "outside the folder"),
        ({"c": "/etc/passwd"}, "outside the folder"),
        ({"c": "a\0b"}, "outside the folder"),
        ({"c": ""}, "outside the folder"),
        ({"c": 3}, "weight_map"),
    ],
)
def test_bad_indexes_say_what_is_wrong(tmp_path, where, says):
    folder = tmp_path / "in"
    folder.mkdir()
    write(tmp_path / "m.safetensors", {"c": np.ones(1)})  # outside, and must not be reached
    with pytest.raises(ValueError, match=says):
        read_checkpoint(sharded(folder, where))


def test_a_tensor_that_no_index_names_is_not_dropped(tmp_path):
    index = sharded(tmp_path, weight_map={"a.w": "m-1.safetensors", "b.w": "m-2.safetensors"})
    with pytest.raises(ValueError, match=r"m-2\.safetensors: tensor 'b\.v' is not in this shard"):
        read_checkpoint(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"m\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)


def test_folders_of_one_or_several_files(tmp_path):
    write(tmp_path / "m.safetensors", {"a": np.ones(1)})
    assert list(read_checkpoint(tmp_path)) == ["a"]
    write(tmp_path / "n.safetensors", {"a": np.ones(1)})
    with pytest.raises(ValueError, match=r"2 files .*name one of m\.safetensors, n\.safetensors"):
        read_checkpoint(tmp_path)


def test_everything_else_is_refused_with_what_is_accepted(tmp_path):
    (tmp_path / "m.pt").write_bytes(b"PK\3\4 a torch pickle")
    for path in (tmp_path / "m.pt", tmp_path):
        with pytest.raises(ValueError) as error:
            read_checkpoint(path)
        assert ACCEPTED in str(error.value) and str(path) in str(error.value)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_checkpoint(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.safetensors")


def test_an_artifact_is_loaded(tmp_path):
    small = jom.compress({"w": jnp.eye(4)}, [jom.Rule("w", jom.quant.Int(bits=4))])
    jom.save(tmp_path / "m.jom", small)
    got = read_checkpoint(tmp_path / "m.jom")
    assert got["w"].kind() == "Quantized"
    (tmp_path / "m.jom").write_bytes((tmp_path / "m.jom").read_bytes()[:-1])
    with pytest.raises(jom.artifact.ArtifactError):
        read_checkpoint(tmp_path / "m.jom")

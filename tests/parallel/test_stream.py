"""Checkpoints that are compressed from file to file."""

import contextlib
import json
import mmap
import os

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, parallel, prune, quant
from jaxopt_models.parallel import _disk, _parts, _sections

RNG = np.random.default_rng(0)
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8"}
NAMES |= {"bool": "BOOL", "int64": "I64"}


def write(file, tensors):
    """Writes a safetensors file by its specification."""
    header, at = {}, 0
    for name, x in tensors.items():
        span = [at, at + x.nbytes]
        header[name] = {"dtype": NAMES[x.dtype.name], "shape": x.shape, "data_offsets": span}
        at += x.nbytes
    text = json.dumps(header).encode()
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(np.ascontiguousarray(x).tobytes())


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape, np.float32).astype(dtype)


@pytest.fixture
def small_slices(monkeypatch):
    """A few rows only, so that small tensors are cut."""
    monkeypatch.setattr(_sections, "SLICE", 2048)


def tensors():
    return {
        "a.kernel": normal(96, 16),
        "b.kernel": normal(4, 32, 10),
        "c.kernel": normal(64, 12, dtype=ml_dtypes.bfloat16),
        "d.kernel": normal(3, 3, 8, 6),
        "e.kernel": normal(40, 16),
        "f.kernel": normal(48, 7),
        "f.bias": normal(700),
        "f.small": np.arange(30, dtype=np.int8),
        "g.flags": np.array([True, False, True]),
        "g.wide": normal(5, 5, dtype=np.float64),
        "g.empty": np.zeros((0, 4), np.float32),
        "g.one": np.float32(3.0).reshape(()),
    }


RECIPE = [
    Rule("a/kernel", quant.Int(bits=4, group=32)),
    Rule("b/kernel", quant.Int(bits=3, group=16, symmetric=False), Axes(stack=1)),
    Rule("c/kernel", quant.Int(bits=8, block=2), Axes.torch()),
    Rule("d/kernel", quant.Int(bits=2, group=12, scale="power_of_two")),
    Rule("e/kernel", jom.chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=3))),
    Rule("f/kernel", quant.Int(bits=4, group=8, scale="bfloat16")),
]


@pytest.mark.parametrize(
    ("rules", "coding"),
    [
        (slice(0, 2), False),
        pytest.param(slice(0, None), True, marks=pytest.mark.full),
        pytest.param(slice(0, None), False, marks=pytest.mark.full),
    ],
)
def test_file_of_the_tree(tmp_path, small_slices, rules, coding):
    write(tmp_path / "m.safetensors", tensors())
    recipe, options = RECIPE[rules], {"coding": coding, "dense": "bfloat16"}
    size = parallel.compress_checkpoint(
        tmp_path / "m.safetensors", tmp_path / "m.jom", recipe, progress=False, **options
    )
    tree = jom.compress(jom.read_checkpoint(tmp_path / "m.safetensors"), recipe)
    jom.save(tmp_path / "all.jom", tree, recipe=recipe, **options)
    data = (tmp_path / "m.jom").read_bytes()
    assert data == (tmp_path / "all.jom").read_bytes() and len(data) == size
    assert sorted(os.listdir(tmp_path)) == ["all.jom", "m.jom", "m.safetensors"]
    jom.verify(tmp_path / "m.jom")
    jax.tree.map(np.testing.assert_array_equal, jom.load(tmp_path / "m.jom")["a"], tree["a"])


def test_taken_up_where_it_was_left(tmp_path, small_slices, monkeypatch):
    source, path = tmp_path / "m.safetensors", tmp_path / "m.jom"
    write(source, {f"{i}.w": normal(32, 16) for i in range(6)})
    recipe = [Rule(".*", quant.Int(bits=4, group=16))]
    run = lambda **more: parallel.compress_checkpoint(  # noqa: E731
        source, path, recipe, coding=False, progress=False, **more
    )
    run()
    wanted = path.read_bytes()
    path.write_bytes(b"old")
    seen = []
    encode = _sections._encode

    def failing(*args):
        seen.append(args)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(_sections, "_encode", failing)
    with pytest.raises(KeyboardInterrupt):
        run()
    folder = tmp_path / ".m.jom.streaming"
    assert path.read_bytes() == b"old"
    # What a kill leaves behind: half a section, and half a record.
    with open(folder / "0.sections", "ab") as f:
        f.write(b"torn")
    with open(folder / "0.journal", "ab") as f:
        f.write((folder / "0.journal").read_bytes()[:20])
    with pytest.raises(ValueError, match=r"unfinished=.*another(.|\n)*key: .*(.|\n)*Finish"):
        run(key=jax.random.key(1))
    before = len(seen)
    assert run() == len(wanted) and path.read_bytes() == wanted
    assert len(seen) == before + 3  # one slice a tensor, three of which were there


def test_leftovers_of_others(tmp_path):
    source, path = tmp_path / "m.safetensors", tmp_path / "m.jom"
    write(source, {"w": normal(8, 8)})
    recipe = [Rule("w", quant.Int(bits=4))]
    with pytest.raises(ValueError, match="compressed already"):
        jom.save(path, {"w": np.ones(3, np.float32)})
        parallel.compress_checkpoint(path, tmp_path / "n.jom", recipe)
    with pytest.raises(ValueError, match=r"compress_checkpoint: rule 0 \('v'\)"):
        parallel.compress_checkpoint(source, path, [Rule("v", quant.Int(bits=4))])
    with pytest.raises(FileNotFoundError, match="make it first"):
        parallel.compress_checkpoint(source, tmp_path / "no" / "m.jom", recipe)
    with pytest.raises(IsADirectoryError):
        parallel.compress_checkpoint(source, tmp_path, recipe)
    with pytest.raises(TypeError, match="coding"):
        parallel.compress_checkpoint(source, path, recipe, coding=0.5)
    with pytest.raises(ValueError, match="is a file of the source"):
        parallel.compress_checkpoint(source, source, recipe)
    with pytest.raises(TypeError, match="stats is list"):
        parallel.compress_checkpoint(source, path, recipe, stats=[1])
    bad = normal(8, 8)
    bad[3, 3] = np.nan
    write(source, {"w": bad})
    with pytest.raises(ValueError, match="compress_checkpoint: w: 1 of 64 entries are NaN") as e:
        parallel.compress_checkpoint(source, path, recipe)
    assert "remove that folder" in e.value.__notes__[0]
    write(source, {"w": normal(8, 8)})
    # What shapes tell is told before the first tensor is finished.
    write(source, {"v": normal(8, 8), "w": normal(10, 8)})
    wrong = [Rule("v", quant.Int(bits=4)), Rule("w", quant.Int(bits=4, group=4))]
    with pytest.raises(ValueError, match="w: group=4 does not divide the 10 inputs"):
        parallel.compress_checkpoint(source, path, wrong)
    parallel.compress_checkpoint(source, path, [Rule(".*", quant.Int(bits=4))], progress=False)


def test_from_orbax(tmp_path):
    tree = {"a": {"kernel": normal(32, 16)}, "l": [normal(5), np.int32(3)], "step": 7}
    ocp.PyTreeCheckpointer().save(tmp_path / "o", tree)
    recipe = [Rule("a/kernel", quant.Int(bits=4, group=32))]
    parallel.compress_checkpoint(tmp_path / "o", tmp_path / "m.jom", recipe, progress=False)
    read = jom.read_checkpoint(tmp_path / "o")
    jom.save(tmp_path / "all.jom", jom.compress(read, recipe), recipe=recipe)
    assert (tmp_path / "m.jom").read_bytes() == (tmp_path / "all.jom").read_bytes()


@pytest.mark.parametrize("cold", [True, False])
def test_pieces_of_a_file(tmp_path, cold):
    data = RNG.integers(0, 256, 50_001, np.uint8).tobytes()
    path = tmp_path / "file"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    if cold:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    with contextlib.closing(_disk.File(str(path))) as file:
        for at, size in [(0, 1), (4096, 4096), (4095, 9000), (45_000, 5001), (7, 49_994)]:
            buffer = memoryview(mmap.mmap(-1, size + _disk.SPARE))
            assert bytes(file.read(at, size, buffer)) == data[at : at + size]
        with pytest.raises(ValueError, match="ends early"):
            file.read(50_000, 2, memoryview(mmap.mmap(-1, 2 + _disk.SPARE)))


def test_one_run_at_a_time(tmp_path):
    (tmp_path / "0.sections").write_bytes(b"")
    part = _parts.Part(tmp_path, 0)
    with pytest.raises(BlockingIOError, match="another process is writing"):
        _parts.Part(tmp_path, 0)
    part.close()
    _parts.Part(tmp_path, 0).close()

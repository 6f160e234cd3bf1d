"""Reading checkpoints: safetensors, Orbax and our own artifacts as plain trees of arrays.

Safetensors files are memory-mapped: an array costs memory when it is used, and the system
may take that memory back at any time, since the file holds it too.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from . import artifact
from ._orbax import OrbaxTree

ACCEPTED = (
    "a .safetensors file, a *.safetensors.index.json or the folder of its shards, an Orbax "
    "checkpoint folder, or a .jom artifact"
)
_MOST_HEADER = 100_000_000
_MOST_AXES = 32
_MOST_PARTS = 60
_INDEX = ".safetensors.index.json"
_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(bool),
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (64, 32, 16)},
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (64, 32, 16, 8)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (64, 32, 16, 8)},
}


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint as a tree of arrays, without the model that made it.

    Safetensors: dotted names become nested dicts, `encoder.layer.0.weight` the path
    `encoder/layer/0/weight`; arrays are read-only views of the memory-mapped file, which must
    not be changed while they live. Weights of torch are stored `(out, in, ...)`: say so with
    ``Rule(..., axes=Axes.torch())``. Orbax: the folder of a tree, or a step of a
    ``CheckpointManager`` with one tree in it (the items ``default`` and ``params`` go first);
    restored to the host, tuples as lists; an nnx variable is a dict with the key ``value``.

    Args:
      path: a ``.safetensors`` file; a ``*.safetensors.index.json``, or the folder of it and
        its shards; an Orbax checkpoint folder; an artifact written by :func:`save`.

    Returns:
      Nested dicts (from Orbax also lists) of NumPy arrays, or what :func:`load` returns.

    Raises:
      ValueError: for a damaged, hostile, incomplete or unknown checkpoint; names file and tensor.
      OSError: if it cannot be read.

    Example:
      >>> import json, os, tempfile, numpy as np, jaxopt_models as jom
      >>> from jaxopt_models import read_checkpoint
      >>> about = {"ip1.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
      >>> header = json.dumps(about).encode()
      >>> folder = tempfile.TemporaryDirectory()
      >>> file = os.path.join(folder.name, "model.safetensors")
      >>> with open(file, "wb") as f:
      ...     _ = f.write(len(header).to_bytes(8, "little") + header)
      ...     _ = f.write(np.float32([1, 2]).tobytes())
      >>> tree = read_checkpoint(file)
      >>> tree["ip1"]["weight"].tolist()
      [1.0, 2.0]
      >>> del tree; folder.cleanup()
    """
    kind, path = find_checkpoint(path)
    if kind == "orbax":
        return OrbaxTree(path).read()
    return artifact.load(path) if kind == "artifact" else nest(_views(spans(path)), path)


def find_checkpoint(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Says what a path is: ``"safetensors"``, ``"orbax"`` or ``"artifact"``, and where it lies.

    Raises:
      ValueError: for an unknown checkpoint, or several.
      OSError: if it cannot be read.
    """
    path = os.fsdecode(path)
    if os.path.isdir(path):
        return _find_in(path)
    if path.endswith(_INDEX):
        return "safetensors", path
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: neither a file nor a folder; a checkpoint is {ACCEPTED}")
    with open(path, "rb") as f:
        start = f.read(9)
    if start.startswith(b"jom"):
        return "artifact", path
    if path.endswith(".safetensors") or start[8:] == b"{":
        return "safetensors", path
    raise ValueError(
        f"{path}: no checkpoint of a known format; a checkpoint is {ACCEPTED} (pickles are not "
        "opened: convert them to safetensors)"
    )


def _find_in(folder: str) -> tuple[str, str]:
    names = sorted(os.listdir(folder))
    if "_METADATA" in names:
        return "orbax", folder
    for end in (_INDEX, ".safetensors"):
        found = [name for name in names if name.endswith(end)]
        if len(found) == 1:
            return "safetensors", os.path.join(folder, found[0])
        if found:
            raise ValueError(f"{folder}: {len(found)} files *{end}; name one of {_some(found)}")
    items = [n for n in names if os.path.isfile(os.path.join(folder, n, "_METADATA"))]
    first = [n for n in ("default", "params") if n in items]
    if first or len(items) == 1:
        return "orbax", os.path.join(folder, (first or items)[0])
    if items:
        raise ValueError(f"{folder}: an Orbax step with several trees; name one of {_some(items)}")
    if steps := sorted((n for n in names if n.isdecimal()), key=int):
        raise ValueError(f"{folder}: holds several steps; name one of the folders {_some(steps)}")
    raise ValueError(f"{folder}: no checkpoint in this folder; a checkpoint is {ACCEPTED}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")


class Span(NamedTuple):
    """Where a tensor lies: in C order and little-endian, from a byte of a file on."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def spans(path: str) -> dict[str, Span]:
    """Returns where the tensors of a safetensors file, or of an index of them, lie.

    Raises:
      ValueError: for a damaged or incomplete checkpoint; names file and tensor.
    """
    return _sharded(path) if path.endswith(_INDEX) else _spans(path)


def _views(found: Mapping[str, Span]) -> dict[str, np.ndarray]:
    """Maps the files of tensors; reads none but those of booleans."""
    maps: dict[str, mmap.mmap] = {}
    for span in found.values():
        if span.file not in maps:
            with open(span.file, "rb") as f:
                maps[span.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, span in found.items():
        try:
            tensors[name] = _view(maps[span.file], span.dtype, span.shape, span.offset)
        except ValueError as e:
            raise ValueError(f"{span.file}: tensor {name!r:.200}: {e}") from None
    return tensors


def _spans(path: str) -> dict[str, Span]:
    """Checks all of the header of one file."""
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(_MOST_HEADER, size - 8):
            raise ValueError(
                f"{path}: no safetensors file: a header of {length} bytes in a file of {size} "
                f"(at most {_MOST_HEADER} are allowed)"
            )
        header = _parse(f.read(length), path)
    places = []
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
                raise ValueError(f"{path}: __metadata__ is not an object of texts")
            continue
        try:
            dtype, shape, begin, end = _check_tensor(about, size - 8 - length)
        except (ValueError, OverflowError) as e:
            raise ValueError(f"{path}: tensor {name!r:.200}: {e}") from None
        tensors[name] = Span(path, dtype, shape, 8 + length + begin)
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a hole before it"
            raise ValueError(f"{path}: tensor {name!r:.200}: begins at {begin}, {what} (ends {at})")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"{path}: the tensors end at {at} of {size - 8 - length} bytes of data")
    return tensors


def _parse(text: bytes, path: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        for name in found:
            name.encode("utf-8")  # a lone surrogate could neither be printed nor stored
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: malformed header: {e!s:.200}") from None
    return found


def _check_tensor(about: Any, room: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected dtype, shape and data_offsets, got {about!r:.80}")
    name, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"dtype {name!r:.40} is none of {', '.join(sorted(_DTYPES))}")
    if not _naturals(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"shape {shape!r:.80} is no list of at most {_MOST_AXES} lengths")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        raise ValueError(f"data_offsets {offsets!r:.80} are not in the {room} bytes of data")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for {name}{shape!s:.80}")
    return dtype, tuple(shape), begin, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _view(data: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    count = math.prod(shape)
    if not count:
        return np.empty(shape, dtype)
    view = np.frombuffer(data, dtype, count, offset).reshape(shape)
    # NumPy takes any byte for a boolean on trust, and then computes nonsense with it.
    if dtype.kind == "b" and view.view(np.uint8).max() > 1:
        raise ValueError("holds bytes that are no booleans")
    return view


def _sharded(path: str) -> dict[str, Span]:
    """Looks into all shards of an index; they must hold what it says, no more and no less."""
    if os.path.getsize(path) > _MOST_HEADER:
        raise ValueError(f"{path}: an index of more than {_MOST_HEADER} bytes")
    with open(path, "rb") as f:
        where = _parse(f.read(), path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise ValueError(f"{path}: weight_map is not an object of tensor and file names")
    tensors: dict[str, Span] = {}
    for shard in sorted(set(where.values())):
        names = {name for name, file in where.items() if file == shard}
        parts = shard.replace("\\", "/").split("/")
        if not shard or "\0" in shard or ".." in parts or os.path.isabs(shard):
            raise ValueError(f"{path}: the shard {shard!r:.200} is outside the folder of the index")
        file = os.path.join(os.path.dirname(path), shard)
        if not os.path.isfile(file):
            raise ValueError(f"{path}: the shard {shard!r:.200} is missing")
        found = _spans(file)
        if missing := sorted(names - set(found)):
            raise ValueError(f"{file}: holds no tensor {missing[0]!r:.200}, which {path} says")
        if extra := sorted(set(found) - names):
            raise ValueError(f"{file}: tensor {extra[0]!r:.200} is not in this shard by {path}")
        tensors |= found
    return tensors


def nest(tensors: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Makes nested dicts of dotted names."""
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *folders, last = name.split(".")
        if len(folders) >= _MOST_PARTS:
            raise ValueError(f"{path}: tensor {name!r:.200}: more than {_MOST_PARTS} dotted parts")
        node = tree
        for i, key in enumerate(folders):
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                both = ".".join(folders[: i + 1])
                raise ValueError(
                    f"{path}: {both!r:.200} is a tensor and the prefix of {name!r:.200}"
                )
        if last in node:
            raise ValueError(f"{path}: {name!r:.200} is a tensor and the prefix of others")
        node[last] = value
    return tree

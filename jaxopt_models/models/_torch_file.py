"""Reading `.pt` and `.pth` files of torch without torch, and without running what they say.

Both forms, zip archives and the older streams of pickles, hold a pickle that describes tensors
and the bytes of their storages. Python's unpickler is not used: a small machine knows the
operations that describe containers and tensors, and refuses all others.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from ._torch_pickle import Global, Pickle

_MAGIC = 119547037146038801333356
_PROTOCOL = 1001
_MOST_AXES = 32
_MOST_DEPTH = 64
# What zipfile raises for a damaged archive, most of it by no promise.
_DAMAGED = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    struct.error,
    KeyError,
    IndexError,
    ValueError,
)
_DTYPES: dict[str, np.dtype] = {
    name + "Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "BFloat16": ml_dtypes.bfloat16,
        "ComplexFloat": "<c8",
        "ComplexDouble": "<c16",
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
    }.items()
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """What a pickle says of a storage, all that tensors need but its bytes."""

    key: str
    dtype: np.dtype
    count: int


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    r"""Reads a file that `torch.save` wrote, as containers of NumPy arrays.

    Nothing in the file is run: it can give numbers, texts, lists, tuples, dicts (an
    `OrderedDict` is one) and tensors; whatever else it asks for is an error. Tensors are
    read-only views of their storages, so shared ones stay shared, and the memory taken is a
    small multiple of the file. A tensor with more entries than its storage (`expand`) is refused.

    Args:
      path: the file, a zip archive (torch 1.6 and later) or the older stream of pickles.

    Returns:
      What was saved, usually a dict from names to arrays.

    Raises:
      ValueError: if the file is damaged, is none of torch, or holds anything but tensors and
        containers of them; names the file.
      OSError: if it cannot be read.

    Example:
      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "weights.pth")
      ...     with open(path, "wb") as file:
      ...         _ = file.write(b"cos\nsystem\n.")
      ...     try:
      ...         read_torch_file(path)
      ...     except ValueError as error:
      ...         print(str(error).replace(path, "weights.pth"))
      weights.pth: it asks for 'os.system'; only tensors and containers are read
    """
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        content = file.read()
    read = _read_zip if content[:2] == b"PK" else _read_stream
    try:
        value = read(content)
        _measure(value, len(content), {}, 0)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error!s:.300}") from None
    return value


def _read_zip(content: bytes) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [n for n in records if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1 or len(records) != len(archive.infolist()):
                raise ValueError(f"{len(pickles)} records data.pkl, expected one")
            # Stored records cannot be larger than the file; together they could, overlapping.
            for info in records.values():
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(content):
                    raise ValueError(f"the record {info.filename!r:.80} is compressed")
            if sum(info.file_size for info in records.values()) > len(content):
                raise ValueError("the records overlap")
            folder = pickles[0][: -len("data.pkl")]
            parts = {n[len(folder) :]: archive.read(n) for n in records if n.startswith(folder)}
    except _DAMAGED as error:
        raise ValueError(f"no zip archive of torch, or a damaged one: {error}") from None
    if parts.get("byteorder", b"little") != b"little":
        raise ValueError(f"byteorder is {parts['byteorder']!r:.40}, only little is read")

    def data(key: str) -> bytes:
        if f"data/{key}" not in parts:
            raise ValueError(f"the storage {key!r:.80} is missing")
        return parts[f"data/{key}"]

    return Pickle(parts["data.pkl"], 0, _tensors(_fill(data)), _reference).run()


def _read_stream(content: bytes) -> Any:
    at = 0
    header = []
    for _ in range(3):
        value, at = _plain(content, at)
        header.append(value)
    order = header[2].get("little_endian") if isinstance(header[2], dict) else None
    if header[:2] != [_MAGIC, _PROTOCOL] or order is not True:
        raise ValueError("no file of torch: its header is another one")
    described: dict[str, _Storage] = {}

    def note(storage: _Storage, *_: Any) -> None:
        if described.setdefault(storage.key, storage) != storage:
            raise ValueError(f"the storage {storage.key!r:.80} is described in two ways")

    # Run once for the sizes of the storages, whose bytes come later, and once for the value.
    first = Pickle(content, at, _tensors(note), _reference)
    first.run()
    parts = _storages(content, first.at, described)
    return Pickle(content, at, _tensors(_fill(parts.__getitem__)), _reference).run()


def _plain(content: bytes, at: int) -> tuple[Any, int]:
    """Runs a pickle in which no tensor may be."""
    pickle = Pickle(content, at, lambda name: None, _reference)
    return pickle.run(), pickle.at


def _storages(content: bytes, at: int, described: Mapping[str, _Storage]) -> dict[str, bytes]:
    """Reads the list of keys and, in its order, the length and the bytes of each storage."""
    keys, at = _plain(content, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the keys of the storages are no list of texts")
    if len(set(keys)) != len(keys) or set(keys) != set(described):
        raise ValueError("the keys of the storages are not those of the tensors")
    parts = {}
    for key in keys:
        storage = described[key]
        size = storage.count * storage.dtype.itemsize
        stated = content[at : at + 8]
        if len(stated) < 8 or int.from_bytes(stated, "little") != storage.count:
            raise ValueError(f"the storage {key!r:.80} has no length of {storage.count} entries")
        parts[key] = content[at + 8 : at + 8 + size]
        at += 8 + size
    if at != len(content):
        raise ValueError(f"the storages end at byte {at} of {len(content)}")
    return parts


def _reference(value: Any) -> _Storage:
    """Reads the persistent id of a storage."""
    parts = list(value) if isinstance(value, tuple) else []
    # The sixth part, of the older form, says which part of another storage this one is.
    if len(parts) == 6 and parts[5] is None:
        del parts[5]
    if [type(part) for part in parts] != [str, Global, str, str, int] or parts[0] != "storage":
        raise ValueError("a reference to other than a whole storage")
    _, kind, key, _, count = parts
    dtype = _DTYPES.get(kind.name.removeprefix("torch."))
    if dtype is None or not _natural(count):
        raise ValueError(f"the storage {key!r:.80} is {count} entries of {kind.name!r}")
    return _Storage(key, dtype, count)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _naturals(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= _MOST_AXES and all(map(_natural, value))


def _tensors(make: Callable[..., Any]) -> Callable[[str], Global | None]:
    """The names that describe tensors, `make` being called with storage, offset, size, stride."""

    def tensor(args: tuple[Any, ...]) -> Any:
        if len(args) < 4 or not isinstance(args[0], _Storage):
            raise ValueError("a tensor of other than a storage")
        return make(*args[:4])

    def ordered(args: tuple[Any, ...]) -> dict[Any, Any]:
        if args:
            raise ValueError("an OrderedDict made of something")
        return {}

    def parameter(args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], np.ndarray | None):
            raise ValueError("a parameter of other than a tensor")
        return args[0]

    makers = {
        "collections.OrderedDict": ordered,
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": parameter,
    }

    def known(name: str) -> Global | None:
        if name in makers or (name.startswith("torch.") and name[6:] in _DTYPES):
            return Global(name, makers.get(name))
        return None

    return known


def _fill(data: Callable[[str], bytes]) -> Callable[..., np.ndarray]:
    """Makes tensors that are views of the bytes of their storages."""

    def make(storage: _Storage, offset: Any, size: Any, stride: Any) -> np.ndarray:
        raw = data(storage.key)
        key, dtype, count = storage.key, storage.dtype, storage.count
        if len(raw) != count * dtype.itemsize:
            raise ValueError(f"the storage {key!r:.80} has {len(raw)} bytes for {count} {dtype}")
        # NumPy takes any byte for a boolean on trust, and then computes nonsense with it.
        if dtype.kind == "b" and raw.translate(None, b"\0\1"):
            raise ValueError(f"the storage {key!r:.80} holds bytes that are no booleans")
        if not _naturals(size) or not _naturals(stride) or not _natural(offset):
            raise ValueError(f"a tensor of {key!r:.80} whose size, stride or offset is no number")
        if len(size) != len(stride):
            raise ValueError(f"a tensor of {key!r:.80} of size {size}, but stride {stride}")
        entries = math.prod(size)
        if not entries:
            return np.empty(size, dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= count or entries > count:
            raise ValueError(
                f"a tensor of {entries} entries up to {last} in the storage {key!r:.80} of {count}"
            )
        # The step along an axis of length one is never taken, and may be any number.
        steps = [step * dtype.itemsize * (n > 1) for n, step in zip(size, stride, strict=True)]
        return as_strided(np.frombuffer(raw, dtype)[offset:], size, steps, writeable=False)

    return make


def _measure(value: Any, room: int, seen: dict[int, tuple[int, int]], depth: int) -> None:
    """Refuses what is no tree of tensors; notes entries, as if none were shared, and height."""
    if isinstance(value, (np.ndarray, str, int, float)) or value is None:
        return
    if not isinstance(value, (dict, list, tuple)):
        raise ValueError(f"it holds a {type(value).__name__}, no tensor and no container")
    if id(value) not in seen:
        # A container that holds itself runs into the limit of depth.
        if depth > _MOST_DEPTH:
            raise ValueError(f"more than {_MOST_DEPTH} containers in one another")
        entries, height = 1, 0
        for part in value.values() if isinstance(value, dict) else value:
            _measure(part, room, seen, depth + 1)
            more, below = seen.get(id(part), (1, 0))
            entries, height = entries + more, max(height, below + 1)
        if entries > room or height > _MOST_DEPTH:
            raise ValueError("the same containers are used again and again")
        seen[id(value)] = entries, height

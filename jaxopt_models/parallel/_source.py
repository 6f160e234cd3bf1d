"""Checkpoints whose tensors are read one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .._checkpoint import Span, find_checkpoint, nest, spans
from .._orbax import OrbaxTree
from ._disk import SPARE, File


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint that was not read yet.

    Args:
      blank: an array of its shape and type, which takes no memory and is its key in the tree.
      load: reads all of it.
      span: where its bytes lie; ``None`` where only :attr:`load` knows.
    """

    blank: np.ndarray
    load: Callable[[], np.ndarray]
    span: Span | None = None

    @property
    def nbytes(self) -> int:
        """Its bytes in memory."""
        return self.blank.size * self.blank.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint: the tree of its tensors, and how each is read.

    Args:
      tree: what :func:`jaxopt_models.read_checkpoint` returns, blank arrays in the tensors' place.
      tensors: the tensors by `id` of their blank arrays.
      content: a checksum of names, types, shapes and places.
      written: a checksum of the files' sizes and times, to notice that they were changed.
      files: all of them.
    """

    tree: Any
    tensors: dict[int, Tensor]
    content: str
    written: str
    files: list[str]


def open_source(path: str | os.PathLike[str], who: str) -> Source:
    """Looks into a checkpoint and reads no tensor of it.

    Raises:
      ValueError: for a damaged or unknown checkpoint, or one that is compressed already.
      OSError: if it cannot be read.
    """
    kind, where = find_checkpoint(path)
    if kind == "artifact":
        raise ValueError(
            f"{who}: {where} is compressed already; use jaxopt_models.load, compress and save"
        )
    return _of_safetensors(where) if kind == "safetensors" else _of_orbax(where)


def _of_safetensors(path: str) -> Source:
    found = spans(path)
    tensors = {name: Tensor(_blank(s.shape, s.dtype), _reader(s), s) for name, s in found.items()}
    files = sorted({s.file for s in found.values()})
    # Where the folder lies does not matter, nor on which host.
    parts = [
        (n, str(s.dtype), s.shape, os.path.basename(s.file), s.offset) for n, s in found.items()
    ]
    return Source(
        nest({name: t.blank for name, t in tensors.items()}, path),
        {id(t.blank): t for t in tensors.values()},
        _checksum(parts),
        _stamps(files),
        files,
    )


def _of_orbax(folder: str) -> Source:
    tree = OrbaxTree(folder)
    leaves: list[Any] = []
    tensors = {}
    for i, about in enumerate(tree.about):
        if not hasattr(about, "dtype"):
            leaves += tree.leaves([i])
            continue
        blank = _blank(tuple(about.shape), np.dtype(about.dtype))
        tensors[id(blank)] = Tensor(blank, lambda i=i: tree.leaves([i])[0])
        leaves.append(blank)
    files = sorted(os.path.join(f, n) for f, _, names in os.walk(folder) for n in names)
    parts = [
        " ".join(str(getattr(a, n, "")) for n in ("name", "shape", "dtype")) for a in tree.about
    ]
    arrays = tree.treedef.unflatten(leaves)
    return Source(arrays, tensors, _checksum(parts), _stamps(files), files)


def _blank(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


def _reader(span: Span) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        size = math.prod(span.shape) * span.dtype.itemsize
        with contextlib.closing(File(span.file)) as file:
            found = file.read(span.offset, size, memoryview(mmap.mmap(-1, size + SPARE)))
        out = np.frombuffer(found, span.dtype).reshape(span.shape)
        if span.dtype.kind == "b" and out.view(np.uint8).max(initial=0) > 1:
            raise ValueError(f"{span.file}: holds bytes that are no booleans")
        return out

    return load


def _checksum(parts: Any) -> str:
    return f"{len(parts)} tensors, {zlib.crc32(repr(sorted(parts)).encode()):08x}"


def _stamps(files: list[str]) -> str:
    stamps = [(os.path.basename(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    return f"{sum(s[1] for s in stamps)} bytes, {zlib.crc32(repr(stamps).encode()):08x}"

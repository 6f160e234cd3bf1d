"""Reader for the IDX files in which MNIST and its relatives are distributed."""

import gzip
import hashlib
import math
import os
import struct
import zlib
from typing import BinaryIO

import numpy as np

_LABELS, _IMAGES = 0x801, 0x803
_RANK = {_LABELS: 1, _IMAGES: 3}
_LARGEST = 1 << 30


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    r"""Reads an IDX file of bytes, raw or gzipped.

    An IDX file is a big-endian `uint32` magic number, one `uint32` per axis, and the entries
    in C order. Labels have the magic number `0x801` (one axis) and images `0x803` (three
    axes). Whether the file is gzipped is read from its first two bytes, not from its name.

    Args:
      path: the file.

    Returns:
      A read-only `uint8` array, `[N]` for labels or `[N, H, W]` for images.

    Raises:
      ValueError: if the magic number is another one, the file holds fewer or more bytes than
        its header says, the header asks for more than 1 GiB, or the gzip stream is damaged.
      FileNotFoundError: if there is no such file.

    Example:
      >>> import os, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "labels")
      ...     with open(path, "wb") as file:
      ...         _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
      ...     read_idx(path)
      array([7, 2, 1], dtype=uint8)
    """
    return read_idx_hashed(path)[0]


def read_idx_hashed(path: str | os.PathLike[str]) -> tuple[np.ndarray, str]:
    """Also gives the sha256 (hexadecimal) of the whole file after gunzipping."""
    name = os.fspath(path)
    with open(name, "rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not gzipped:
            return _parse(raw, name)
        try:
            with gzip.GzipFile(fileobj=raw) as unzipped:
                return _parse(unzipped, name)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{name}: the gzip stream is damaged ({error}).") from error


def _parse(file: BinaryIO, name: str) -> tuple[np.ndarray, str]:
    head = file.read(4)
    magic = int.from_bytes(head, "big")
    if len(head) < 4 or magic not in _RANK:
        raise ValueError(
            f"{name}: not an IDX file of images or labels: it starts with 0x{head.hex()}, "
            "expected 0x00000803 (images) or 0x00000801 (labels)."
        )
    rank = _RANK[magic]
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise ValueError(f"{name}: truncated inside its header of {4 + 4 * rank} bytes.")
    shape = struct.unpack(f">{rank}I", sizes)
    expected = math.prod(shape)
    # Checked before reading, so that a damaged header cannot ask for all memory.
    if expected > _LARGEST:
        raise ValueError(f"{name}: the header gives shape {shape}, more than {_LARGEST} bytes.")
    body = file.read(expected)
    if len(body) < expected:
        raise ValueError(
            f"{name}: truncated: shape {shape} needs {expected} bytes, {len(body)} are there."
        )
    if file.read(1):
        raise ValueError(f"{name}: trailing bytes after the {expected} that shape {shape} needs.")
    digest = hashlib.sha256(head + sizes)
    digest.update(body)
    return np.frombuffer(body, np.uint8).reshape(shape), digest.hexdigest()

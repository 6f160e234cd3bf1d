"""Reads the container, and believes nothing in it."""

from __future__ import annotations

import io
import os
import zlib
from typing import Any, NamedTuple

import msgpack

from ._container import (
    DICTIONARY,
    MAGIC,
    MOST_INDEX,
    NAME,
    TRAILER,
    VERSION,
    check_plain,
    most_inflated,
)
from ._errors import ArtifactError, brief


class Section(NamedTuple):
    """Where a section lies and what it is."""

    offset: int
    length: int
    crc32: int
    description: list[Any]


class Reader:
    """Reads the index of an artifact, and sections on demand.

    Everything the index claims is checked against the size of the file before anything
    is allocated for it.

    Args:
      source: a path, or the bytes of a file.

    Raises:
      ArtifactError: if it is no artifact of this version, or damaged.
      OSError: if the file cannot be opened.

    Example:
      >>> from jaxopt_models.artifact import ArtifactError, Reader
      >>> try:
      ...     Reader(b"jom" + bytes([9]) + bytes(12))
      ... except ArtifactError as error:
      ...     print(error)
      format version 9, this jaxopt_models reads version 1: upgrade jaxopt_models
    """

    def __init__(self, source: str | os.PathLike[str] | bytes) -> None:
        if isinstance(source, bytes | bytearray | memoryview):
            self._file: io.BufferedIOBase = io.BytesIO(source)
        else:
            self._file = open(source, "rb")  # noqa: SIM115
        try:
            self._size = self._file.seek(0, io.SEEK_END)
            self._index_length, self._meta, self._sections = self._read_index()
        except BaseException:
            self._file.close()
            raise

    @property
    def meta(self) -> Any:
        """What the file is, as given to :meth:`Writer.close`."""
        return self._meta

    @property
    def sections(self) -> tuple[Section, ...]:
        """All sections, in the order of the file."""
        return self._sections

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._size

    def parts(self) -> dict[str, int]:
        """Returns the bytes of each part of the file; they sum to :attr:`size`."""
        return {
            "magic": len(MAGIC),
            "sections": sum(s.length for s in self._sections),
            "index": self._index_length,
            "trailer": TRAILER.size,
        }

    def read(self, i: int) -> bytes:
        """Reads one section, and nothing else, from the file.

        Args:
          i: index of the section.

        Returns:
          Its bytes.

        Raises:
          ArtifactError: if its checksum does not fit.
        """
        section = self._sections[i]
        data = self._at(section.offset, section.length)
        if zlib.crc32(data) != section.crc32:
            raise ArtifactError(
                f"section {i} {brief(section.description)} is damaged: its checksum does not fit"
            )
        return data

    def close(self) -> None:
        """Closes the file; what was read stays."""
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(length)
        if len(data) != length:
            raise ArtifactError(f"the file ends early: {length} bytes expected at {offset}")
        return data

    def _read_index(self) -> tuple[int, Any, tuple[Section, ...]]:
        _check_magic(self._at(0, min(len(MAGIC), self._size)))
        room = self._size - len(MAGIC) - TRAILER.size
        if room < 0:
            raise ArtifactError(f"the file ends early: it has {self._size} bytes only")
        length, crc = TRAILER.unpack(self._at(self._size - TRAILER.size, TRAILER.size))
        if not 0 < length <= min(room, MOST_INDEX):
            raise ArtifactError(
                f"the file is truncated or damaged: an index of {length} bytes does not fit "
                f"into {self._size}"
            )
        index = self._at(self._size - TRAILER.size - length, length)
        if zlib.crc32(index, zlib.crc32(MAGIC)) != crc:
            raise ArtifactError(
                "the file is truncated or damaged: the checksum of its index does not fit"
            )
        meta, sections = _parse_index(_inflate(index))
        if sum(s.length for s in sections) != room - length:
            raise ArtifactError(
                f"the sections have {sum(s.length for s in sections)} bytes, "
                f"the file has {room - length} for them"
            )
        return length, meta, sections


def _check_magic(magic: bytes) -> None:
    if magic[:3] != NAME:
        raise ArtifactError(
            f"no jaxopt_models artifact: it starts with {magic!r}, expected {NAME!r}"
        )
    if magic != MAGIC:
        if len(magic) < len(MAGIC):
            raise ArtifactError("the file ends inside its magic number")
        fix = "upgrade jaxopt_models" if magic[3] > VERSION else "write the file again"
        raise ArtifactError(
            f"format version {magic[3]}, this jaxopt_models reads version {VERSION}: {fix}"
        )


def _inflate(index: bytes) -> bytes:
    inflate = zlib.decompressobj(-15, DICTIONARY)
    cap = most_inflated(len(index))
    try:
        plain = inflate.decompress(index, cap)
    except zlib.error as error:
        raise ArtifactError(f"the index is damaged: {error}") from error
    if not inflate.eof or inflate.unused_data or inflate.unconsumed_tail:
        raise ArtifactError(f"the index is damaged: it does not end within {cap} bytes")
    return plain


def _parse_index(plain: bytes) -> tuple[Any, tuple[Section, ...]]:
    try:
        # A first pass that builds nothing: after it, every claimed length is really there.
        walker = msgpack.Unpacker(max_buffer_size=len(plain))
        walker.feed(plain)
        walker.skip()
        if walker.tell() != len(plain):
            raise ArtifactError("the index is damaged: bytes are left after it")
        tree = msgpack.unpackb(
            plain, raw=False, object_pairs_hook=_unique, ext_hook=_refuse_extension
        )
        check_plain(tree)
    except ArtifactError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise ArtifactError(f"the index is damaged: {error or type(error).__name__}") from error
    if not isinstance(tree, list) or len(tree) != 2 or not isinstance(tree[1], list):
        raise ArtifactError("the index is damaged: it is no pair of meta and sections")
    sections, offset = [], len(MAGIC)
    for i, entry in enumerate(tree[1]):
        if not isinstance(entry, list) or [type(e) for e in entry] != [int, bytes, list]:
            raise ArtifactError(f"the index is damaged: section {i} is {brief(entry)}")
        length, crc, description = entry
        if length < 0 or len(crc) != 4:
            raise ArtifactError(f"the index is damaged: section {i} is {brief(entry)}")
        sections.append(Section(offset, length, int.from_bytes(crc, "little"), description))
        offset += length
    return tree[0], tuple(sections)


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ArtifactError(f"the index holds the unknown type {code}")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ArtifactError("the index is damaged: a key occurs twice")
    return out

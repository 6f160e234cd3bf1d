"""Writes the container: leaf by leaf, and all of it or nothing."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import zlib
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import msgpack

from ._container import DICTIONARY, MAGIC, MOST_INDEX, TRAILER, check_plain, most_inflated


class Writer:
    """Writes an artifact under a temporary name and puts it in place when it is complete.

    Whatever happens before :meth:`close` returns, a kill included, the path holds what it
    held before. A kill may leave the temporary file, named ``.<name>.<random>.tmp``.

    Args:
      path: the file to write; its folder must exist.

    Raises:
      OSError: if the folder cannot be written or ``path`` is a folder.

    Example:
      >>> import os, tempfile
      >>> from jaxopt_models.artifact import Reader, Writer
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.jom")
      ...     with Writer(path) as writer:
      ...         _ = writer.add(["Dense_0/kernel", [2]], [b"ab", b"c"])
      ...         size = writer.close({"note": "three bytes"})
      ...     with Reader(path) as reader:
      ...         print(reader.meta, reader.sections[0].description, reader.read(0))
      ...         print(size == reader.size == sum(reader.parts().values()))
      {'note': 'three bytes'} ['Dense_0/kernel', [2]] b'abc'
      True
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # A link stays a link: what it points to is replaced.
        self._path = os.path.realpath(path)
        if os.path.isdir(self._path):
            raise IsADirectoryError(f"cannot write an artifact to {self._path!r}: it is a folder")
        folder, name = os.path.split(self._path)
        self._folder = folder
        self._temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
        self._file: io.BufferedWriter | None = open(self._temporary, "xb")  # noqa: SIM115
        self._sections: list[tuple[int, bytes, list[Any]]] = []
        try:
            self._file.write(MAGIC)
        except BaseException:
            self._abandon()
            raise

    def add(self, description: list[Any], chunks: Iterable[bytes]) -> int:
        """Writes one section, chunk by chunk.

        Args:
          description: what the section is: lists, dicts with string keys, strings, bytes,
            integers, finite floats, booleans and ``None``.
          chunks: the bytes of the section, in pieces.

        Returns:
          The index of the section.

        Raises:
          TypeError: if the description holds anything else.
          ValueError: if the writer is closed, or a number in the description cannot be held.
        """
        file = self._open()
        check_plain(description)
        length, crc = 0, 0
        for chunk in chunks:
            file.write(chunk)
            length += len(chunk)
            crc = zlib.crc32(chunk, crc)
        self._sections.append((length, crc.to_bytes(4, "little"), description))
        return len(self._sections) - 1

    def close(self, meta: Any) -> int:
        """Writes the index, makes sure that all of it is on disk, and puts it in place.

        Args:
          meta: what the file is, of the same types as a description.

        Returns:
          The size of the file in bytes.

        Raises:
          TypeError: if ``meta`` holds other types.
          ValueError: if the writer is closed already, or the index is larger than 64 MiB.
        """
        file = self._open()
        try:
            size = finish(file, meta, self._sections)
            file.close()
            put(self._temporary, self._path)
        except BaseException:
            self._abandon()
            raise
        self._file = None
        sync_folder(self._folder)
        return size

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._abandon()
            if kind is None:
                raise ValueError("an artifact was not finished: call close(meta) at its end")

    def _open(self) -> io.BufferedWriter:
        if self._file is None:
            raise ValueError(f"the artifact {self._path!r} is closed")
        return self._file

    def _abandon(self) -> None:
        assert self._file is not None
        try:
            self._file.close()
        finally:
            # Closing writes what is buffered, which fails again where the disk is full.
            self._file = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)


def finish(file: io.BufferedWriter, meta: Any, sections: list[tuple[int, bytes, list[Any]]]) -> int:
    """Writes the index behind the sections, makes sure that all is on disk, and returns the size.

    Raises:
      TypeError: if ``meta`` holds types that a file cannot.
      ValueError: if the index is larger than 64 MiB.
    """
    check_plain(meta)
    plain = msgpack.packb([meta, sections])
    if len(plain) > MOST_INDEX:
        raise ValueError(f"the index has {len(plain)} bytes, at most {MOST_INDEX} fit")
    index = _deflate(plain, 9)
    if len(plain) > most_inflated(len(index)):
        index = _deflate(plain, 0)
    file.write(index)
    file.write(TRAILER.pack(len(index), zlib.crc32(index, zlib.crc32(MAGIC))))
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def put(temporary: str, path: str) -> None:
    """Puts a complete file in the place of another, whose permissions it takes over."""
    if os.path.exists(path):
        os.chmod(temporary, os.stat(path).st_mode & 0o7777)
    os.replace(temporary, path)


def _deflate(data: bytes, level: int) -> bytes:
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    return deflate.compress(data) + deflate.flush()


def sync_folder(folder: str) -> None:
    # Only where folders can be opened is the new name of the file theirs to lose.
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

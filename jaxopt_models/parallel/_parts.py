"""Sections that are finished, kept on disk until the file is whole."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from ..artifact._container import MAGIC
from ..artifact._file import padding
from ..artifact._writer import finish, put, sync_folder
from ._sections import Section

_FRAME = struct.Struct("<II")
# Often enough that little is lost, and that the disk is never idle.
_SYNC = 64 << 20


class Record(NamedTuple):
    """A section that lies in a part, whole."""

    number: int
    offset: int
    length: int
    crc32: bytes
    description: list[Any]
    entries: int


class Part:
    """What one process has finished: ``<number>.sections``, and ``<number>.journal`` of them.

    Sections are on disk before the journal says so; what a killed process left behind the last
    of them is cut off.

    Args:
      folder: where the parts lie.
      number: of the process.

    Raises:
      BlockingIOError: if another process is writing this part.
    """

    def __init__(self, folder: pathlib.Path, number: int) -> None:
        self.folder, self.number = folder, number
        self._data = open(folder / f"{number}.sections", "ab")  # noqa: SIM115
        self._journal = open(folder / f"{number}.journal", "ab")  # noqa: SIM115
        try:
            _lock(self._data.fileno(), folder)
        except BlockingIOError:
            self._data.close()
            self._journal.close()
            raise
        records, end = read_journal(folder, number)
        self._journal.truncate(end)
        self._at = max((r.offset + r.length for r in records), default=len(MAGIC))
        self._data.truncate(self._at)
        if not records:
            self._data.truncate(0)
            self._data.write(MAGIC)
        self._pending: list[Record] = []
        self._unsynced = 0

    def add(self, number: int, section: Section) -> None:
        """Writes the section of a tensor."""
        crc, start = 0, self._at
        for chunk in section.chunks:
            self._data.write(chunk)
            self._at += len(chunk)
            crc = zlib.crc32(chunk, crc)
        about = (crc.to_bytes(4, "little"), section.description, section.entries)
        self._pending.append(Record(number, start, self._at - start, *about))
        self._unsynced += self._at - start
        if self._unsynced >= _SYNC:
            self.sync()

    def sync(self) -> None:
        """Makes sure that what was written stays."""
        self._data.flush()
        os.fsync(self._data.fileno())
        for record in self._pending:
            body = msgpack.packb(tuple(record))
            self._journal.write(_FRAME.pack(len(body), zlib.crc32(body)) + body)
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._pending, self._unsynced = [], 0

    def close(self) -> None:
        """Keeps what is finished, and lets go of the files."""
        try:
            self.sync()
        finally:
            self._data.close()
            self._journal.close()


def read_journal(folder: pathlib.Path, number: int) -> tuple[list[Record], int]:
    """Returns the sections that a part holds for sure, and where its journal is sound to."""
    try:
        data = (folder / f"{number}.journal").read_bytes()
        size = os.path.getsize(folder / f"{number}.sections")
    except FileNotFoundError:
        return [], 0
    records: list[Record] = []
    at = 0
    while len(data) - at >= _FRAME.size:
        length, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(body) != length or zlib.crc32(body) != crc:
            break
        record = Record(*msgpack.unpackb(body))
        if record.offset + record.length > size:
            break
        records.append(record)
        at += _FRAME.size + length
    return records, at


def finished(folder: pathlib.Path) -> dict[int, tuple[int, Record]]:
    """Returns for each tensor that is finished the part that holds it, and where."""
    found: dict[int, tuple[int, Record]] = {}
    for file in sorted(folder.glob("*.journal"), key=lambda f: int(f.stem)):
        for record in read_journal(folder, int(file.stem))[0]:
            found.setdefault(record.number, (int(file.stem), record))
    return found


def clear(folder: pathlib.Path) -> None:
    """Removes what a run left that finished nothing, whatever its arguments were.

    Raises:
      BlockingIOError: if it is still running.
    """
    if not folder.exists() or finished(folder):
        return
    for file in folder.glob("*.sections"):
        with open(file, "rb") as f:
            _lock(f.fileno(), folder)
    shutil.rmtree(folder)


def assemble(folder: pathlib.Path, count: int, path: str, meta: Sequence[Any]) -> int:
    """Makes one file of all parts, puts it in its place, and removes the folder.

    Args:
      folder: where the parts lie; on the same disk as the file.
      count: number of tensors.
      path: the file.
      meta: what the file is, but for the number of entries.

    Returns:
      The size of the file.
    """
    found = finished(folder)
    assert sorted(found) == list(range(count))
    order = [found[i] for i in range(count)]
    whole = folder / "0.sections"
    if not _in_order(order, whole):
        whole = folder / "whole"
        _copy(folder, order, whole)
    sections = [(r.length, r.crc32, r.description) for _, r in order]
    entries = sum(r.entries for _, r in order)
    with open(whole, "r+b") as file:
        file.truncate(len(MAGIC) + sum(r.length for _, r in order))
        file.seek(0, os.SEEK_END)
        if fill := padding(entries, sum(r.length for _, r in order)):
            file.write(fill)
            sections.append((len(fill), zlib.crc32(fill).to_bytes(4, "little"), []))
        size = finish(file, [*meta, entries], sections)
    put(str(whole), path)
    sync_folder(os.path.dirname(path))
    shutil.rmtree(folder)
    return size


def _in_order(order: list[tuple[int, Record]], file: pathlib.Path) -> bool:
    """Says whether one part is the file already."""
    at = len(MAGIC)
    for part, record in order:
        if part or record.offset != at:
            return False
        at += record.length
    return file.exists()


def _copy(folder: pathlib.Path, order: list[tuple[int, Record]], whole: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(open(whole, "wb"))
        out.write(MAGIC)
        names = {part: folder / f"{part}.sections" for part, _ in order}
        files = {p: stack.enter_context(open(name, "rb")) for p, name in names.items()}
        for part, record in order:
            files[part].seek(record.offset)
            left = record.length
            while left:
                data = files[part].read(min(left, 8 << 20))
                if not data:
                    raise OSError(f"{names[part]} ends early; remove {folder} to start anew")
                out.write(data)
                left -= len(data)


def _lock(fd: int, folder: pathlib.Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without such locks
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{folder}: another process is writing there; wait for it") from None

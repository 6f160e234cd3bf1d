"""Reading parts of files at the speed of the disk."""

from __future__ import annotations

import os

_BLOCK = 4096
_PROBES = 16
#: How much longer than what is read a buffer has to be.
SPARE = 2 * _BLOCK


class File:
    """A file of which large pieces are read one after another, each once.

    A file that is not in memory goes from the disk to the buffers at once, where the system can do
    that: copying it through the memory of the system takes more of a processor than encoding it.

    Args:
      path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        self._direct = -1
        if not self._in_memory():
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:  # a file system that has no such thing
                self._direct = -1

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Reads a piece.

        Args:
          offset: where it begins.
          size: its bytes.
          buffer: memory that begins with a page, ``SPARE`` bytes longer than the piece.

        Returns:
          The part of the buffer that holds it.

        Raises:
          ValueError: if the file ends before.
        """
        before = offset % _BLOCK
        view = buffer[before : before + size]
        got = 0
        if self._direct >= 0:
            got = max(0, self._read_direct(offset - before, before + size, buffer) - before)
        elif hasattr(os, "posix_fadvise"):
            # In one piece; by itself the system takes small ones.
            os.posix_fadvise(self._fd, offset + size, size, os.POSIX_FADV_WILLNEED)
        while got < size:
            n = os.preadv(self._fd, [view[got:]], offset + got)
            if not n:
                raise ValueError(f"{self.path} ends early: it was changed while it was read")
            got += n
        return view

    def _read_direct(self, start: int, size: int, buffer: memoryview) -> int:
        """Reads whole blocks as long as that works; returns the bytes that are there."""
        got = 0
        end = -(-size // _BLOCK) * _BLOCK
        while got < size and got % _BLOCK == 0:
            try:
                n = os.preadv(self._direct, [buffer[got:end]], start + got)
            except OSError:
                break
            if not n:
                break
            got += n
        return min(got, size)

    def _in_memory(self) -> bool:
        """Says whether most of the file is in memory; true where nobody knows."""
        if not (hasattr(os, "RWF_NOWAIT") and hasattr(os, "O_DIRECT")):
            return True
        size, page = os.fstat(self._fd).st_size, bytearray(1)
        # Else each question would bring in what follows.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        found = 0
        for i in range(_PROBES):
            try:
                found += os.preadv(self._fd, [page], size * i // _PROBES, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
            except OSError:  # a file system that does not answer
                found = _PROBES
                break
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return 2 * found >= _PROBES

    def close(self) -> None:
        """Closes it."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)

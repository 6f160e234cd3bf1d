"""Tensors flow from a disk through an encoder to a disk, all three at once."""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._disk import SPARE, File
from ._parts import Part
from ._sections import SLICE, Coding, Copied, Job, Options, Section, slices, whole


class _Stopped(Exception):
    """Another thread has failed."""


class Budget:
    """Bytes that may be under way at once; one piece of any size always may.

    Args:
      most: so many.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used, self.stopped = most, 0, False
        self.changed = threading.Condition()

    def take(self, size: int) -> None:
        """Waits until so many bytes fit."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.stopped or not self.used or self.used + size <= self.most
            )
            if self.stopped:
                raise _Stopped
            self.used += size

    def give(self, size: int) -> None:
        """Gives them back."""
        with self.changed:
            self.used -= size
            self.changed.notify_all()

    def stop(self) -> None:
        """Lets nobody wait any longer."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class Slice(NamedTuple):
    """What was read: a slice of a tensor, or no array where the whole is to be read."""

    job: Job
    array: np.ndarray | None
    last: bool
    buffer: mmap.mmap | None


def flow(jobs: Sequence[Job], options: Options, part: Part, advance: Callable[[str], None]) -> None:
    """Encodes tensors in order and writes them to a part; at most a few slices are under way.

    Args:
      jobs: the tensors.
      options: how they are encoded and stored.
      part: where they go.
      advance: told the path of each tensor that is encoded.
    """
    reading, writing = Budget(4 * SLICE), Budget(4 * SLICE)
    slices_read: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sections: queue.SimpleQueue[Any] = queue.SimpleQueue()
    spare: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
    failed: list[BaseException] = []

    def read() -> None:
        try:
            for piece in _read(jobs, options, reading, spare):
                slices_read.put(piece)
        except BaseException as e:  # raised again where slices are taken
            slices_read.put(e)

    def write() -> None:
        try:
            while (found := sections.get()) is not None:
                job, section, size = found
                part.add(job.number, section)
                del found, section
                writing.give(size)
        except BaseException as e:  # raised again where sections are handed over
            failed.append(e)
            writing.stop()

    threads = [threading.Thread(target=t, daemon=True) for t in (read, write)]
    for thread in threads:
        thread.start()
    try:
        left = len(jobs)
        current: Any = None
        while left:
            piece = slices_read.get()
            if isinstance(piece, BaseException):
                raise piece
            job, array, last, buffer = piece
            if array is None:
                done = whole(job, options)
            else:
                current = current or (Copied if job.decision.encoder is None else Coding)(
                    job, options
                )
                current.add(array)
                reading.give(array.nbytes)
                if buffer is not None and len(buffer) == SLICE + SPARE:
                    spare.put(buffer)
                if not last:
                    continue
                done, current = current.section(), None
            _hand_over(job, done, writing, sections, failed)
            del piece, array, buffer, done
            left -= 1
            advance(job.path)
    finally:
        reading.stop()
        sections.put(None)
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def _hand_over(
    job: Job, section: Section, writing: Budget, sections: Any, failed: list[BaseException]
) -> None:
    size = sum(map(len, section.chunks))
    try:
        writing.take(size)
    except _Stopped:
        raise failed[0] from None
    sections.put((job, section, size))


def _read(jobs: Sequence[Job], options: Options, budget: Budget, spare: Any) -> Iterator[Slice]:
    """Reads slices into memory that is used again, so that no page of it is new."""
    with contextlib.ExitStack() as stack:
        files: dict[str, File] = {}
        for job in jobs:
            cuts = slices(job, options)
            if not cuts:
                yield Slice(job, None, True, None)
            span = job.tensor.span
            for start, stop in cuts:
                assert span is not None
                if span.file not in files:
                    files[span.file] = stack.enter_context(contextlib.closing(File(span.file)))
                row = job.tensor.nbytes // span.shape[0]
                size = (stop - start) * row
                try:
                    budget.take(size)
                except _Stopped:
                    return
                buffer = _buffer(size, spare)
                at = span.offset + start * row
                found = files[span.file].read(at, size, memoryview(buffer))
                array = np.frombuffer(found, span.dtype).reshape(stop - start, *span.shape[1:])
                yield Slice(job, array, stop == span.shape[0], buffer)


def _buffer(size: int, spare: Any) -> mmap.mmap:
    # Page-aligned, which JAX takes as it is; what is not aligned is copied.
    if size > SLICE:
        return mmap.mmap(-1, size + SPARE)
    try:
        return spare.get_nowait()
    except queue.Empty:
        return mmap.mmap(-1, SLICE + SPARE)

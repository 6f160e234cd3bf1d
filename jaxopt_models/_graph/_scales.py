"""Unknown positive factors: one for each channel, made equal, fixed to one, moved with axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# A factor for each entry of a value this large is not what a rewrite would ever ask for.
MOST = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Term:
    """A factor for each index along some axes of a value.

    Args:
      dims: the axes, sorted; ``-1`` is the outermost loop around, ``-2`` the next.
      ids: numbers of factors, an axis for each of ``dims``.
    """

    dims: tuple[int, ...]
    ids: np.ndarray

    def over(self, dims: Sequence[int]) -> np.ndarray:
        """Returns the numbers with an axis for each of more axes, of length one where new."""
        return self.ids.reshape([self._size(d) for d in dims])

    def _size(self, d: int) -> int:
        return self.ids.shape[self.dims.index(d)] if d in self.dims else 1

    def moved(self, to: dict[int, int]) -> Term:
        """Returns the term with its axes renamed; those that are not named keep their name."""
        return term([to.get(d, d) for d in self.dims], self.ids)

    def cut(self, d: int, index: np.ndarray) -> Term:
        """Returns the term of entries picked along an axis."""
        return term(self.dims, np.take(self.ids, index, self.dims.index(d)))


def term(dims: Sequence[int], ids: np.ndarray) -> Term:
    """Makes a term of axes in any order, without those of length one."""
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    ids = ids.transpose(order)
    kept = [i for i, n in enumerate(ids.shape) if n != 1]
    names = [dims[i] for i in order]
    return Term(tuple(names[i] for i in kept), ids.reshape([ids.shape[i] for i in kept]))


def reshaped(t: Term, before: Sequence[int], after: Sequence[int]) -> Term | None:
    """Returns the term of a value that is reshaped, or ``None`` if it would be too large."""
    if 0 in before:
        return term((), np.zeros((), np.int64))
    for old, new in runs(before, after):
        mine = [d for d in t.dims if d in old]
        if not mine:
            continue
        sizes = [before[d] for d in old]
        if np.prod(sizes) > MOST:
            return None
        others = [d for d in t.dims if d not in old]
        moved = np.transpose(t.ids, [t.dims.index(d) for d in (*others, *mine)])
        lead = moved.shape[: len(others)]
        wide = moved.reshape([*lead, *(before[d] if d in mine else 1 for d in old)])
        wide = np.broadcast_to(wide, (*lead, *sizes)).reshape([*lead, *(after[d] for d in new)])
        # Named beyond all axes, so that what other runs make of them is not taken for theirs.
        t = _smallest([*others, *(d + 1000 for d in new)], wide)
    return t.moved({d: d - 1000 for d in t.dims if d >= 1000})


def runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Divides a reshape into runs of axes that are the same entries."""
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        old, new, m, n = [], [], 1, 1
        if i < len(before):
            old.append(i)
            m, i = before[i], i + 1
        if j < len(after):
            new.append(j)
            n, j = after[j], j + 1
        while m != n:
            if m < n:
                old.append(i)
                m, i = m * before[i], i + 1
            else:
                new.append(j)
                n, j = n * after[j], j + 1
        runs.append((old, new))
    return runs


def _smallest(dims: Sequence[int], ids: np.ndarray) -> Term:
    """Makes a term without the axes along which its numbers are the same."""
    for i, n in enumerate(ids.shape):
        if n > 1 and np.array_equal(ids, np.broadcast_to(ids.take([0], i), ids.shape)):
            ids = ids.take([0], i)
    return term(dims, ids)


class Pool:
    """All factors, by number; those that are one have the number 0.

    They are made in blocks. A block of which some factor is one knows why.
    """

    def __init__(self) -> None:
        self.label = np.zeros(1, np.int64)
        self.block = np.zeros(1, np.int64)
        self.why = [""]

    def new(self, shape: Sequence[int]) -> np.ndarray:
        """Makes a block of factors that are not known."""
        n, first = int(np.prod(shape)), len(self.label)
        ids = np.arange(first, first + n)
        self.label = np.concatenate([self.label, ids])
        self.block = np.concatenate([self.block, np.full(n, len(self.why))])
        self.why.append("")
        return ids.reshape(shape)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Returns one number for all factors that are equal."""
        return self.label[ids]

    def fix(self, ids: np.ndarray, why: str) -> None:
        """Makes factors one."""
        self.same(ids, np.zeros((), np.int64), why)

    def same(self, a: np.ndarray, b: np.ndarray, why: str) -> None:
        """Makes factors equal, entry by entry.

        Args:
          a: their numbers.
          b: what each is equal to, in a shape that broadcasts with that of ``a``.
          why: the reason, where it makes some of them one.
        """
        a, b = (x.ravel() for x in np.broadcast_arrays(a, b))
        x, y = self.label[a], self.label[b]
        different = x != y
        if not different.any():
            return
        known = [self.why[k] for k in np.unique(self.block[np.r_[a[x == 0], b[y == 0]]]) if k]
        pairs = np.unique(np.stack([x[different], y[different]]), axis=1)
        smaller = np.arange(len(self.label))
        while True:
            low = np.minimum(smaller[pairs[0]], smaller[pairs[1]])
            before = smaller.copy()
            np.minimum.at(smaller, pairs[0], low)
            np.minimum.at(smaller, pairs[1], low)
            smaller = smaller[smaller]
            if np.array_equal(before, smaller):
                break
        old, self.label = self.label, smaller[self.label]
        for k in np.unique(self.block[(old != 0) & (self.label == 0)]):
            self.why[k] = self.why[k] or (known[0] if known else why)

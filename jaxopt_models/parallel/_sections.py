"""A tensor on its way from a checkpoint to a section of an artifact, slice by slice."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from .._axes import Axes
from .._bits import unpack_codes
from .._coded import Coded
from .._compress import encode, named, seen_axes
from .._encoder import Encoder, not_finite
from .._recipe import Decision
from ..artifact._describe import ARRAY, CODES, RAW
from ..artifact._file import describe
from ..artifact._leaves import SectionWriter, narrow
from ..artifact._symbols import Coder
from ._source import Tensor

#: Bytes of a slice: few enough for a cache, many enough for a disk.
SLICE = 8 << 20


@dataclasses.dataclass(frozen=True)
class Section:
    """What is written of a tensor: its bytes in pieces, what they are, and entries they make."""

    chunks: list[bytes | memoryview]
    description: list[Any]
    entries: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A tensor and what is to be made of it.

    Args:
      number: its place in the file.
      path: its path in the tree.
      tensor: where it is read.
      decision: what the recipe says, ``None`` for what is no parameter.
    """

    number: int
    path: str
    tensor: Tensor
    decision: Decision


@dataclasses.dataclass(frozen=True)
class Options:
    """How tensors are encoded and stored; see :func:`compress_checkpoint`."""

    stats: Any
    key: jax.Array | None
    coding: bool
    dense: str | None
    who: str


def slices(job: Job, options: Options) -> list[tuple[int, int]]:
    """Returns the slices along the first axis in which a tensor is read, or none for a whole."""
    shape, span = job.tensor.blank.shape, job.tensor.span
    if span is None or not math.prod(shape):
        return []
    step: int | None
    if (encoder := job.decision.encoder) is None:
        step = 1 if shape and span.dtype.name in RAW else None
    else:
        axes = axes_of(job, options)
        needs = encoder.needs or not jnp.issubdtype(span.dtype, jnp.floating)
        step = None if needs or axes is None else encoder.slices(shape, axes)
    if step is None or shape[0] % step:
        return []  # what does not fit is told of the tensor as a whole
    row = job.tensor.nbytes // shape[0]
    step = min(shape[0], step * max(1, SLICE // (step * row)))
    return [(i, min(shape[0], i + step)) for i in range(0, shape[0], step)]


def axes_of(job: Job, options: Options) -> Axes | None:
    """Returns the roles of a tensor's axes; ``None`` where encoding will say what is wrong."""
    rule, blank = job.decision.rule, job.tensor.blank
    assert rule is not None
    found = None if options.stats is None else options.stats.get(job.decision.parameter.path)
    try:
        return (rule.axes or seen_axes(found, blank) or Axes()).resolve(blank.ndim)
    except ValueError:
        return None


def whole(job: Job, options: Options) -> Section:
    """Reads a tensor as a whole and encodes it as :func:`compress` does."""
    value: Any = job.tensor.load()
    if job.decision.encoder is not None:
        parameter = dataclasses.replace(job.decision.parameter, value=value)
        decision = dataclasses.replace(job.decision, parameter=parameter)
        value = encode(decision, stats=options.stats, key=options.key, who=options.who)
    section = SectionWriter(options.dense, coding=options.coding)
    description, entries = describe(section, value, f"{options.who}: {job.path}")
    return Section(section.chunks, description, entries)


class Copied:
    """The section of a tensor that stays dense.

    Args:
      job: the tensor.
      options: how it is stored.
    """

    def __init__(self, job: Job, options: Options) -> None:
        self.job, self.where = job, f"{options.who}: {job.path}"
        dtype = job.tensor.blank.dtype
        self.dense = options.dense if dtype.name == "float32" else None
        self.stored = np.dtype(self.dense or dtype)
        self.chunks: list[bytes | memoryview] = []

    def add(self, x: np.ndarray) -> None:
        """Takes a slice, whose memory is used again."""
        with named(self.where):
            x = x.copy() if self.dense is None else narrow(x, self.dense)
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("<"))
        self.chunks.append(memoryview(x.reshape(-1).view(np.uint8)))

    def section(self) -> Section:
        """Returns the section once all slices are there."""
        blank = self.job.tensor.blank
        about = [ARRAY, blank.dtype.name, list(blank.shape), self.stored.name]
        return Section(self.chunks, about, blank.size)


class Coding:
    """The section of a tensor that is encoded in slices.

    Args:
      job: the tensor.
      options: how it is stored.
    """

    def __init__(self, job: Job, options: Options) -> None:
        axes, encoder = axes_of(job, options), job.decision.encoder
        assert axes is not None and encoder is not None
        self.job, self.options, self.axes, self.encoder = job, options, axes, encoder
        self.where = f"{options.who}: {job.path}"
        self.bad = 0
        self.leaves: list[Coded] = []

    def add(self, x: np.ndarray) -> None:
        """Takes a slice, whose memory is used again."""
        with named(self.where):
            bad, leaf = _encode(self.encoder, self.axes, not self.options.coding, x)
        self.bad += int(bad)
        # Only codes and scales are kept, in NumPy: what is longer than a slice is no JAX array.
        self.leaves.append(jax.tree.map(np.asarray, leaf))

    def section(self) -> Section:
        """Returns the section once all slices are there."""
        blank, first = self.job.tensor.blank, self.leaves[0]
        if self.bad:
            raise ValueError(
                f"{self.where}: {self.bad} of {blank.size} entries are NaN or Inf; repair the "
                "weights first (a diverged training run, or a mask applied as -inf)"
            )
        # What belongs to runs goes by outputs, and along the inputs of each.
        at = 0 if self.axes.stack or 0 in (self.axes.out or ()) else -1
        parts: dict[str, Any] = {
            name: np.concatenate([getattr(leaf, name) for leaf in self.leaves], axis=at)
            for name in first.parts()
            if name != "codes"
        }
        if _doubtful(parts.get("scale")):
            return whole(self.job, self.options)
        core = blank.shape[self.axes.stack :]
        pieces = [leaf.codes for leaf in self.leaves]
        leaf = dataclasses.replace(first, codes=pieces, core=core, **parts)
        section = _Pieces(coding=self.options.coding)
        description, entries = describe(section, leaf, self.where)
        return Section(section.chunks, description, entries)


class _Pieces(SectionWriter):
    """Writes leaves whose codes are symbols of slices, packed already where that can be."""

    def _codes(self, packed: list[np.ndarray], x: Coded, keep: Any) -> list[Any]:
        about = [CODES, list(x.stack)]
        if self.coding or not _packed(x.core, x.bits):
            symbols = np.concatenate([p.reshape(-1) for p in packed])
            return [*about, *self.stream(symbols, x.bits)]
        payload = [memoryview(np.ascontiguousarray(p).reshape(-1)) for p in packed]
        self.chunks += [b"", *payload]
        return [*about, int(Coder.PLAIN), 0, sum(map(len, payload))]


def _doubtful(scale: np.ndarray | None) -> bool:
    """Says whether 16 bits may not hold some scales, which only the whole leaf can tell."""
    if scale is None or scale.dtype.name not in ("float16", "bfloat16"):
        return False
    about = ml_dtypes.finfo(scale.dtype)
    least, most = float(scale.min()), float(scale.max())
    return most >= float(about.max) or least < float(about.smallest_normal)


def _packed(core: tuple[int, ...], bits: int) -> bool:
    """Says whether rows of symbols are packed into whole bytes."""
    return bits in (1, 2, 4, 8) and core[-1] * bits % 8 == 0


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(encoder: Encoder, axes: Axes, pack: bool, w: Any) -> tuple[jax.Array, Coded]:
    """Encodes a slice; codes become the symbols of a file, packed if asked for."""
    leaf = encoder.run(w, axes, None, None, None)
    n = leaf.core[-1] if leaf.core else 1
    codes = unpack_codes(leaf.codes, n, bits=leaf.bits, signed=leaf.signed)
    symbols = (codes + (1 << leaf.bits - 1) if leaf.signed else codes).astype(jnp.uint8)
    if pack and _packed(leaf.core, leaf.bits):
        # Whole numbers of two bytes, as reading every other byte is ten times slower.
        for width in (w for w in (1, 2, 4) if leaf.bits <= w):
            two = lax.bitcast_convert_type(symbols.reshape(*symbols.shape[:-1], -1, 2), jnp.uint16)
            symbols = (two << width | two >> 8).astype(jnp.uint8)
    return not_finite(w), dataclasses.replace(leaf, codes=symbols)

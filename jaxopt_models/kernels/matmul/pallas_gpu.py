"""Products with codes as they are stored, by Triton through Pallas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..._jaxpr import varying
from .._calls import axis_of, by_rows, can_sum, count_of, derived, names_of, placed
from . import reference
from .stored import Format, codes_of, operands
from .tiles import Tiles


def product(
    x: jax.Array,
    w: Any,
    *,
    out: tuple[int, ...],
    precision: Any = None,
    dtype: Any = None,
    interpret: bool = False,
) -> jax.Array:
    r"""Multiplies rows with a leaf of one core tensor, whose codes are read where they lie.

    .. math:: y = \hat x \, \mathrm{materialize}(w)

    Nothing of the size of the dense weight is written: a program unpacks a tile, multiplies, sums
    up in `float32`, and applies scales of whole tiles to the sums. Derivatives are those of the
    definition.

    Args:
      x: rows `[m, k]`, `float32` or `bfloat16`.
      w: a leaf of which :func:`stored.why_not` says nothing, or a `WithInput` of one.
      out: its output axes.
      precision: as `jax.lax.dot_general` takes it; by default `float32` is multiplied as TF32.
      dtype: of the result; by default that of ``x``.
      interpret: whether to run it without a GPU, slowly.

    Returns:
      `[m, n]`.
    """
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)

    def plain(x: jax.Array, codes: Any) -> jax.Array:
        return reference.product(x, codes, out, precision=precision, dtype=dtype)

    def run(x: jax.Array, codes: Any) -> jax.Array:
        form, given = operands(codes, out)
        return _operation(form, precision, dtype, interpret)(x, *given)

    return derived(plain, run, (w.read(x, (1,), ()), codes_of(w)))


@functools.lru_cache(maxsize=4096)
def _operation(form: Format, precision: Any, dtype: Any, interpret: bool) -> Any:
    """Returns the kernel with these options as an operation on arrays."""

    @functools.partial(jax.jit, static_argnames=("dtype",))
    def run(x: Any, codes: Any, *rest: Any, dtype: Any = dtype) -> jax.Array:
        x, codes, *rest = _alike(x, codes, *rest)
        n = form.columns if form.planes else codes.shape[0 if form.inner else 1]
        if 0 in (*x.shape, n):
            return jnp.zeros((x.shape[0], n), dtype)
        return _call(
            Tiles.of(form, x.shape, n, rest[0]), x, codes, rest, precision, dtype, interpret
        )

    def partition(mesh: Any, given: Any, result: Any) -> Any:
        x, codes, scale, zero, table = given
        rows = axis_of(x, 0)
        first, last = (axis_of(codes, a) for a in ((1, 0) if form.inner else (0, 1)))
        # Bits of a plane belong to several entries, and neighbours to one scale.
        if form.planes:
            first, last = (None, last) if form.inner else (first, None)
        if form.block > 1 or names_of(last) & names_of(rows):
            last = None
        groups = scale.shape[1]
        taken = names_of(rows) | names_of(last)
        split = groups > 1 and groups % count_of(mesh, first)
        if not can_sum() or split or names_of(first) & taken:
            first = None
        side = (last, first if groups > 1 else None)
        between = (None,) if form.planes else ()
        ends = (last, first) if form.inner else (first, last)
        places = (
            placed(mesh, x, rows, first),
            placed(mesh, codes, ends[0], *between, ends[1]),
            placed(mesh, scale, *side),
            placed(mesh, zero, *side),
            placed(mesh, table, last if table.shape[0] > 1 else None, None),
        )

        def local(*given: Any) -> Any:
            if first is None:
                return run(*given)
            return jax.lax.psum(run(*given, dtype=jnp.float32), first).astype(dtype)

        return mesh, local, NamedSharding(mesh, PartitionSpec(rows, last)), places

    # A plane is a dimension of its own, and its bytes are no entries.
    middle = " b " if form.planes else " "
    ends = ("k", "n") if not form.inner else ("n", "k")
    last = "w" if form.planes else ends[1]
    rule = f"m k, {ends[0]}{middle}{last}, s g, d0 d1, t0 t1 -> m n"
    return by_rows(lambda *given: run(*given), rule=rule, partition=partition)


def _alike(*operands: jax.Array) -> list[jax.Array]:
    """Lets all operands vary along the mesh axes, inside ``shard_map``, that any of them does."""
    over = frozenset().union(*map(varying, operands))
    return [
        jax.lax.pcast(a, tuple(missing), to="varying") if (missing := over - varying(a)) else a
        for a in operands
    ]


def _call(
    tiles: Tiles,
    x: Any,
    codes: Any,
    rest: Sequence[Any],
    precision: Any,
    dtype: Any,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    m, _, n = tiles.size
    width = tiles.form.bits
    if not tiles.form.planes:
        codes = codes.reshape(-1)
        if width < 8:
            # The very bytes, unless the last one is filled up.
            codes = jnp.pad(codes, (0, -codes.size % (8 // width))).reshape(-1, 8 // width)
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    names = [
        "x",
        "codes",
        *(t for t, a in zip(("scale", "zero", "table"), rest, strict=True) if a.size),
    ]
    arrays = [x, codes, *(a for a in rest if a.size)]
    shapes = {t: a.shape for t, a in zip(names, arrays, strict=True)}
    whole = tiles.parts == 1
    out = jax.ShapeDtypeStruct(
        (tiles.parts * m * n,),
        dtype if whole else jnp.float32,
        manual_axis_type=jax.typeof(x).manual_axis_type,
    )

    def matmul_of_codes(*refs: Any) -> None:
        given, y = dict(zip(names, refs[:-1], strict=True)), refs[-1]

        def load(name: str, at: Any, inside: Any) -> Any:
            return triton.load(given[name].at[at], mask=jnp.broadcast_to(inside, at.shape), other=0)

        column, row, part = (pl.program_id(a) for a in range(3))
        program = _Program(tiles, shapes, load, precision, column, row, part)
        r, c = program.m, program.n
        for p, total in enumerate(program.sums()):
            at = (part * m + r) * n + c(p)
            inside = jnp.broadcast_to((r < m) & (c(p) < n), at.shape)
            triton.store(y.at[at], total.astype(out.dtype), mask=inside)

    y = pl.pallas_call(
        matmul_of_codes,
        out_shape=out,
        grid=tiles.grid,
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        name="matmul_of_codes",
    )(*(a.reshape(-1) for a in arrays))
    y = y.reshape(tiles.parts, m, n)
    return y[0] if whole else jnp.sum(y, axis=0).astype(dtype)


class _Program:
    """One tile of the result.

    Args:
      tiles: how the product is divided.
      shapes: of the operands, which are flat, by name.
      load: from a name, places and which of these there are to values, 0 elsewhere.
      precision: of the products.
      column, row, part: which tile it is.
    """

    def __init__(
        self,
        tiles: Tiles,
        shapes: dict[str, tuple[int, ...]],
        load: Callable[[str, Any, Any], Any],
        precision: Any,
        column: Any,
        row: Any,
        part: Any,
    ):
        self.tiles, self.shapes, self.load, self.precision = tiles, shapes, load, precision
        self.part = part
        self.m = (row * tiles.rows + jnp.arange(tiles.rows))[:, None]
        self.words = (column * tiles.words + jnp.arange(tiles.words))[None]

    def n(self, p: int) -> Any:
        """Returns the outputs at a place of the words."""
        return self.words if self.tiles.form.inner else self.words * self.tiles.each + p

    def k(self, lines: Any, p: int) -> Any:
        """Returns the inputs likewise."""
        return lines * self.tiles.each + p if self.tiles.form.inner else lines

    def sums(self) -> Any:
        """Sums up tile by tile; the result has an array for each place of the words."""
        t = self.tiles
        inner, each = t.form.inner, -(-t.steps // t.parts)
        zero = jnp.zeros((t.rows, t.words), jnp.float32)

        def body(i: Any, sums: Any) -> Any:
            step, sums = self.part * each + i, list(sums)
            lines = step * t.lines + jnp.arange(t.lines)
            codes = self._codes(lines[:, None])
            for p in range(t.each):
                if p == 0 or inner:
                    x = self._input(self.k(lines, p)[None])
                k, n = self.k(lines, p)[:, None], self.n(p)
                group = self.k(step * t.lines, 0) // t.group if t.after else k // t.group
                w = self._values(codes[p], n, group)
                if "scale" in self.shapes and not t.after:
                    w = w * self._side("scale", n, group)
                y = jax.lax.dot_general(
                    x,
                    w.astype(x.dtype),
                    (((1,), (0,)), ((), ())),
                    precision=self.precision,
                    preferred_element_type=jnp.float32,
                )
                if "scale" in self.shapes and t.after:
                    y = y * self._side("scale", n, group)
                place = 0 if inner else p
                sums[place] = sums[place] + y
            return tuple(sums)

        return jax.lax.fori_loop(0, each, body, (zero,) * (1 if inner else t.each))

    def _input(self, k: Any) -> Any:
        m, depth = self.shapes["x"]
        return self.load("x", self.m * depth + k, (self.m < m) & (k < depth))

    def _codes(self, lines: Any) -> list[Any]:
        """Returns the codes of a tile at each place of the words, bits as they are."""
        t, form = self.tiles, self.tiles.form
        _, k, n = t.size
        slow, fast = (self.words, lines) if form.inner else (lines, self.words)
        many, length = (n, k) if form.inner else (k, n)
        inside = (slow < many) & (fast < -(-length // t.each))
        ones = (1 << form.bits) - 1
        if form.planes:
            width = self.shapes["codes"][-1]
            found = []
            for b in range(form.bits):
                at = (slow * form.bits + b) * width + fast
                found.append(self.load("codes", at, inside).astype(jnp.int32))
            return [sum(((plane >> p) & 1) << b for b, plane in enumerate(found)) for p in range(8)]
        if t.aligned:
            word = self.load("codes", slow * (length // t.each) + fast, inside).astype(jnp.int32)
            return [(word >> (form.bits * p)) & ones for p in range(t.each)]
        entry, share = slow * length + fast, 8 // form.bits
        word = self.load("codes", entry // share, inside).astype(jnp.int32)
        return [(word >> (form.bits * (entry % share))) & ones]

    def _values(self, q: Any, n: Any, group: Any) -> Any:
        """Returns what codes mean, the scale left out."""
        form = self.tiles.form
        if "table" in self.shapes:
            tables, size = self.shapes["table"]
            at = q + n * size if tables > 1 else q
            return self.load("table", at, n < self.tiles.size[2]).astype(jnp.float32)
        if form.signed:
            q = q - ((q >> (form.bits - 1)) << form.bits)
        w = q.astype(jnp.float32)
        return w - self._side("zero", n, group) if "zero" in self.shapes else w

    def _side(self, name: str, n: Any, group: Any) -> Any:
        """Returns what belongs to outputs and groups."""
        groups = self.shapes[name][-1]
        at = (n // self.tiles.form.block) * groups + group
        inside = (n < self.tiles.size[2]) & (group < groups)
        return self.load(name, at, inside).astype(jnp.float32)

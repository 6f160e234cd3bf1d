"""What the leaves of codes with scales have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Matrix
from .._bits import is_concrete, wide_dtype
from .._coded import Coded
from .._encoded import is_encoded


class Grouped(Coded):
    """Codes of which runs share a scale: a run of inputs, for one or more neighbouring outputs.

    A subclass has the fields ``scale``, an array or leaf `[*stack, *core[out], groups]`, and
    ``block``, by which the last output axis of ``scale`` is shorter.
    """

    scale: Any
    block: int

    @property
    def shared(self) -> int:
        """Number of neighbouring outputs that share a scale."""
        return self.block

    @property
    def group(self) -> int:
        """Number of consecutive inputs that share a scale."""
        return Matrix(self.core, self.out).rows // self.scale.shape[-1]

    def trained(self) -> tuple[str, ...]:
        """Returns the scales, unless they are powers of two: codes of their exponents."""
        powers = not is_encoded(self.scale) and self.scale.dtype == jnp.float8_e8m0fnu
        return () if powers else super().trained()

    def scales(self) -> jax.Array:
        """Returns the scales as numbers to compute with, at least `float32`."""
        scale = self.scale.rebuild() if is_encoded(self.scale) else self.scale
        return scale.astype(wide_dtype(scale.dtype))

    def spread(self, per_run: jax.Array) -> jax.Array:
        """Gives what belongs to runs, `[*core[out], groups]`, to each entry of a core tensor."""
        m = Matrix(self.core, self.out)
        groups = per_run.shape[-1]
        if self.block > 1:
            per_run = jnp.repeat(per_run, self.block, axis=-2)
        columns = per_run.reshape(m.columns, groups).T[:, None, :]
        runs = jnp.broadcast_to(columns, (groups, m.rows // groups, m.columns))
        return m.unview(runs.reshape(m.rows, m.columns))

    def lost(self) -> str:
        """Says that scales are beyond their type, where they can be seen."""
        scale = self.scale
        if is_encoded(scale) or scale.dtype not in (jnp.float16, jnp.bfloat16):
            return super().lost()
        if not all(map(is_concrete, jax.tree.leaves(self))):
            return ""
        over, under = map(int, _beyond(self))
        if over:
            better = "'bfloat16' or 'float32'" if scale.dtype == jnp.float16 else "'float32'"
            top = float(jnp.finfo(scale.dtype).max)
            return (
                f"{over} of {scale.size} scales are beyond {top:.5g}, the largest {scale.dtype}; "
                f"give scale={better}"
            )
        if under:
            return (
                f"all scales are below {_coarse(scale.dtype):.1g}, where {scale.dtype} has few "
                "digits or none; give scale='bfloat16' or 'float32'"
            )
        return ""

    def _last_spec(self, core: list[Any], local: tuple[int, ...]) -> Any:
        # Axes of one entry, as those of a 1x1 convolution, cut no run.
        inner = [a for a in range(len(self.core)) if a not in self.out and self.core[a] > 1]
        divided = [a for a in inner if core[a] is not None]
        groups = self.scale.shape[-1]
        if not divided or groups == 1:
            return None
        shards = self.core[inner[0]] // local[inner[0]]
        # Runs go along all inputs in order: a shard has whole ones if the first axis is divided.
        return core[inner[0]] if divided == inner[:1] and groups % shards == 0 else NotImplemented

    def check(self) -> list[str]:
        """Checks also that groups divide the inputs."""
        wrong = super().check()
        if wrong:
            return wrong
        groups, rows = self.scale.shape[-1], Matrix(self.core, self.out).rows
        return (
            [f"{groups} groups do not divide {rows} inputs"] if not groups or rows % groups else []
        )


def _coarse(dtype: Any) -> float:
    """Returns the scale below which `float16` has fewer than 7 significant bits; else 0."""
    return float(jnp.finfo(dtype).tiny) / 16 if dtype == jnp.float16 else 0.0


@jax.jit
def _beyond(leaf: Grouped) -> tuple[jax.Array, jax.Array]:
    """Counts scales at the end of their type, and tensors of which all scales are too small."""

    def small(leaf: Grouped) -> jax.Array:
        scale = leaf.scales()
        tiny = (scale > 0) & (scale < _coarse(leaf.scale.dtype))
        # Runs of zeros have a scale, too, which says nothing.
        large = (leaf.spread(scale) >= _coarse(leaf.scale.dtype)) & (leaf.rebuild() != 0)
        return jnp.any(tiny) & ~jnp.any(large)

    for _ in leaf.stack:
        small = jax.vmap(small)
    over = leaf.scale >= jnp.finfo(leaf.scale.dtype).max
    return jnp.sum(over), jnp.sum(small(leaf))

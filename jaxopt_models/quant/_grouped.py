"""What the leaves of codes with scales have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Matrix
from .._bits import wide_dtype
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

    def _last_spec(self, core: list[Any], local: tuple[int, ...]) -> Any:
        inner = [a for a in range(len(self.core)) if a not in self.out]
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

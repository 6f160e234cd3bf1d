"""Parallelism: gradients, pipelines, knowledge, layouts, streaming, many processes, a pod."""

from __future__ import annotations

import dataclasses

from . import _children, _parallel_layouts, _parallel_scaling, _parallel_stream
from ._rows import Row


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A part that needs eight devices, measured in a process of its own.

    Args:
      module: its name.
    """

    module: str

    def rows(self, *, quick: bool) -> list[Row]:
        """Measures it."""
        return _children.simulated(self.module, quick=quick)


PARTS = {
    "gradients": Simulated("_parallel_gradients"),
    "pipeline": Simulated("_parallel_pipeline"),
    "tensor": Simulated("_parallel_tensor"),
    "stream": _parallel_stream,
    "scaling": _parallel_scaling,
    "layouts": _parallel_layouts,
}


def run(*, quick: bool = False) -> list[Row]:
    """Measures all parts, one after another."""
    return [row for part in PARTS.values() for row in part.rows(quick=quick)]

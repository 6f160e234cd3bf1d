"""What each stage of a pipeline does when."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from .._options import whole

SCHEDULES = ("gpipe", "1f1b")


@dataclasses.dataclass(frozen=True)
class Phase:
    """Ticks that do the same: one loop of the program.

    Args:
      ticks: how many, above 0.
      forward: whether a micro-batch goes forward in each.
      backward: whether one goes backward in each.
    """

    ticks: int
    forward: bool
    backward: bool


@dataclasses.dataclass(frozen=True)
class Timetable:
    r"""What each of `S` stages does with each of `M` micro-batches, tick by tick.

    All stages tick together. In both schedules stage `s` takes micro-batch `m` forward in tick
    `m + s`; backward, in tick

    * `gpipe`: after all have gone forward, `(M + S - 1) + (M - 1 - m) + (S - 1 - s)`;
    * `1f1b`: as soon as it can, `m + 2 (S - 1) - s`, which is why no stage keeps more than
      `2 S - 3` inputs (the first one reads them again), however many micro-batches there are.

    Either way there are :math:`M + S - 1` ticks forward and as many backward, of which `M` work:

    .. math:: \text{bubble} = \frac{S - 1}{M + S - 1}

    Args:
      stages: `S`.
      microbatches: `M`.
      schedule: ``"gpipe"`` or ``"1f1b"``.

    Raises:
      TypeError, ValueError: for numbers below 1, or another schedule.

    Example:
      >>> from jaxopt_models import parallel
      >>> table = parallel.Timetable(4, 8, schedule="1f1b")
      >>> f"{table.bubble:.3f}", table.stash
      ('0.273', 5)
      >>> [phase.ticks for phase in table.phases]
      [3, 8, 3]

    References:
      Huang et al., `GPipe <https://arxiv.org/abs/1811.06965>`_, 2018; Narayanan et al.,
      `PipeDream-Flush <https://arxiv.org/abs/2006.09503>`_, 2020
    """

    stages: int
    microbatches: int
    _: dataclasses.KW_ONLY
    schedule: str = "gpipe"

    def __post_init__(self) -> None:
        for name in ("stages", "microbatches"):
            whole(getattr(self, name), f"Timetable: {name}", least=1)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"Timetable: schedule={self.schedule!r}; give one of {', '.join(SCHEDULES)}"
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The loops of the program, in order."""
        s, m = self.stages, self.microbatches
        if self.schedule == "gpipe":
            found = [Phase(m + s - 1, True, False), Phase(m + s - 1, False, True)]
        else:
            found = [Phase(s - 1, True, False), Phase(m, True, True), Phase(s - 1, False, True)]
        return tuple(p for p in found if p.ticks)

    @property
    def bubble(self) -> float:
        """The part of all ticks, forward and backward, in which a stage waits."""
        ticks = sum(p.ticks * (p.forward + p.backward) for p in self.phases)
        return 1 - 2 * self.microbatches / ticks

    @property
    def stash(self) -> int:
        """The most stage inputs that a device keeps for the way back."""
        if self.schedule == "gpipe":
            return self.microbatches + self.stages - 1
        return min(self.microbatches, max(1, 2 * self.stages - 3))

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the micro-batch in each tick, -1 for none: forward and backward, `[T, S]`."""
        s, m = self.stages, self.microbatches
        gpipe = self.schedule == "gpipe"
        ticks = 2 * (m + s - 1) if gpipe else m + 2 * (s - 1)
        tick, stage = np.arange(ticks)[:, None], np.arange(s)[None]
        forward = tick - stage
        backward = (2 * (m + s - 1) - 1 - stage - tick) if gpipe else tick - 2 * (s - 1) + stage

        def known(x: Any) -> np.ndarray:
            return np.where((x >= 0) & (x < m), x, -1)

        return known(forward), known(backward)

"""Stages of a program: which parameters are calibrated together, and what is alive before them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .._calibrate import Stats, assembled
from .._calibrating import Ledger, merged
from .._call import name_of, take_apart
from .._progress import logger
from .._walk import Emitted
from ._flat import Unit
from ._paired import Compiled, Reader
from ._parts import Layout, Part, layouts


class Model(Protocol):
    """Parameters, as they are now and as they were."""

    #: Statistics that parameters need, by path.
    needs: dict[str, tuple[str, ...]]

    def current(self, unit: Unit) -> Any:
        """Returns the value of a parameter in the model that is compressed."""

    def original(self, unit: Unit) -> Any:
        """Returns its value in the float model."""


class Stages:
    """The stages of a program, run from one to the next with all batches.

    Args:
      fn: the function.
      params: its parameters.
      batches: tuples of its other arguments.
      model: their values on the way.
      stacked: paths of parameters whose first axis may be one of layers.
      compiled: what runs parts.
      group: what makes one stage of several parameters; see :func:`sequential`.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        batches: Sequence[tuple[Any, ...]],
        model: Model,
        stacked: set[str],
        compiled: Compiled,
        group: re.Pattern[str] | None,
    ):
        self.model, self.compiled, self.name = model, compiled, name_of(fn)
        self.layouts = layouts(fn, params, batches, stacked, model.needs)
        self.each = list(dict.fromkeys(self.layouts))
        self.order = self._order(group)
        units = [u for stage in self.order for u in stage]
        self.ends = {l: max((i for u in units for i in l.uses(u)), default=0) for l in self.each}
        self.cuts = dict.fromkeys(self.each, 0)
        self.envs = []
        for layout, batch in zip(self.layouts, batches, strict=True):
            alive = set(layout.alive(0, self.ends[layout]))
            pairs = zip(layout.inputs, take_apart(None, batch, {})[1], strict=True)
            env = {v: x for v, x in pairs if v in alive}
            self.envs.append([env, dict(env)] if compiled.correct else [env])

    def _order(self, group: re.Pattern[str] | None) -> list[list[Unit]]:
        """Returns the parameters of each stage, in the order in which the program uses them."""
        first: dict[Unit, tuple[int, Any]] = {}
        for layout in self.each:
            for i, touched in enumerate(layout.touched):
                for u in touched:
                    if u.path in self.model.needs:
                        first.setdefault(u, (i, layout.sources[i]))
        if lacking := sorted(set(self.model.needs) - {u.path for u in first}):
            raise ValueError(
                f"sequential: the recipe needs statistics that cannot be had: "
                f"{', '.join(lacking)} meet no data in {self.name}"
            )
        stages: dict[Any, list[Unit]] = {}
        places = {u: n for l in self.each for n, u in enumerate(l.units) if isinstance(u, Unit)}
        for u in sorted(first, key=lambda u: (first[u][0], places[u])):
            found = group.match(u.name) if group else None
            stages.setdefault(found.group() if found else first[u][1], []).append(u)
        return list(stages.values())

    def advance(self, number: int) -> None:
        """Runs the program up to a stage, with all before it compressed."""
        later = [u for stage in self.order[number:] for u in stage]
        parts: dict[Layout, tuple[Part, Any, list[Any]]] = {}
        for layout in self.each:
            cut = min((i for u in later for i in layout.uses(u)), default=self.ends[layout])
            alive = layout.alive(cut, self.ends[layout])
            before = set(layout.alive(self.cuts[layout], self.ends[layout]))
            part = layout.part(self.cuts[layout], cut, [v for v in alive if v not in before])
            parts[layout] = part, self._values(part), alive
            self.cuts[layout] = cut
        for layout, envs in zip(self.layouts, self.envs, strict=True):
            part, values, alive = parts[layout]
            for i, env in enumerate(envs):
                new = []
                if part.outs:
                    new = self.compiled.run(part, values[i], [env[v] for v in part.env])
                env.update(zip(part.outs, new, strict=True))
                envs[i] = {v: env[v] for v in alive}

    def statistics(self, number: int, units: Sequence[Unit]) -> dict[str, Stats]:
        """Returns the statistics of parameters of the stage that was reached, by name."""
        needs = {u: self.model.needs[u.path] for u in units}
        parts: dict[Layout, tuple[Part, Any, Reader]] = {}
        totals: dict[Layout, Any] = {}
        for layout in self.each:
            ends = [i for u in units for i in layout.uses(u)]
            if ends:
                part = layout.part(self.cuts[layout], max(ends) + 1, [], ends)
                parts[layout] = part, self._values(part), self.compiled.reader(part, needs)
        for layout, envs in zip(self.layouts, self.envs, strict=True):
            if layout not in parts:
                continue
            part, values, reader = parts[layout]
            both = [(v, [e[x] for x in part.env]) for v, e in zip(values, envs, strict=True)]
            mine, other = both[0], both[-1]
            if layout not in totals:
                totals[layout] = reader.zero(part.consts, mine, other)
            totals[layout] = reader.add(part.consts, mine, other, totals[layout])
        ledger, kept = Ledger(), {}
        for layout, total in totals.items():
            part, _, reader = parts[layout]
            for use, multiply_adds, e in reader.renamed(part, total, ledger):
                name = ledger.name(use, multiply_adds)
                old = kept.get(name)
                value = e.value if old is None else merged(old.value, e.value)
                kept[name] = Emitted(value, e.loops)
        tree = {u.name: self.model.current(u) for u in units}
        found = assembled(tree, kept, ledger, {u.name: n for u, n in needs.items()}, self.name)
        for u in units:
            why = found.missing.get(u.name)
            if lacking := [n for n in needs[u] if n not in found[u.name].names]:
                raise ValueError(f"sequential: {u.name} needs the statistics {lacking}: {why}")
            if why:
                logger.warning("sequential: %s: %s", u.name, why)
        return found

    def _values(self, part: Part) -> list[list[Any]]:
        """Returns the values of the units of a part, for the compressed and the float model."""
        looks = [self.model.current, self.model.original][: 1 + self.compiled.correct]
        return [[look(u) if isinstance(u, Unit) else u for u in part.units] for look in looks]

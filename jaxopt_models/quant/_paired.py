"""Parts of a program compiled, and statistics of the inputs of two models at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._accelerate import Simulating
from .._calibrating import Calibrating, Ledger, Use, merged
from .._tracked import dense, track
from .._walk import Emitted
from ._flat import Unit
from ._parts import Part


class Compiled:
    """Runs parts of programs; those that compute the same are compiled once.

    Args:
      correct: whether statistics say how the inputs of a model differ from those of another.
      gram_rows: most rows of a gram.
    """

    def __init__(self, correct: bool, gram_rows: int):
        self.correct, self.gram_rows = correct, gram_rows
        self.runs: dict[Any, Any] = {}
        self.readers: dict[Any, Reader] = {}

    def run(self, part: Part, values: Sequence[Any], env: Sequence[Any]) -> list[Any]:
        """Runs a part: from values for its units, and an environment, to what it returns."""
        if part.key not in self.runs:
            self.runs[part.key] = jax.jit(functools.partial(_run, part.jaxpr, _names(part)))
        return self.runs[part.key](list(values), part.consts, list(env))

    def reader(self, part: Part, needs: dict[Unit, tuple[str, ...]]) -> Reader:
        """Returns what reads statistics in a part, of the units that need some."""
        wanted = tuple(needs.get(u, ()) if isinstance(u, Unit) else () for u in part.units)
        if (part.key, wanted) not in self.readers:
            self.readers[part.key, wanted] = Reader(part, wanted, self.correct, self.gram_rows)
        return self.readers[part.key, wanted]


def _names(part: Part) -> list[str | None]:
    return [u.name if isinstance(u, Unit) else None for u in part.units]


def _tracked(names: Sequence[str | None], values: Sequence[Any]) -> list[Any]:
    pairs = zip(names, values, strict=True)
    return [x if name is None else track(name, x) for name, x in pairs]


def _run(
    jaxpr: Any, names: Sequence[str | None], values: list[Any], consts: list[Any], env: list[Any]
) -> list[Any]:
    found = Simulating().run(jaxpr, consts, [*_tracked(names, values), *env])
    return list(map(dense, found))


class Reader:
    """Reads statistics in a part.

    Args:
      part: the part.
      wanted: names of statistics for each of its units.
      correct, gram_rows: see :class:`Compiled`.
    """

    def __init__(
        self, part: Part, wanted: Sequence[tuple[str, ...]], correct: bool, gram_rows: int
    ):
        self.part, self.names, self.correct = part, _names(part), correct
        self.ledger = Ledger()
        by_name = dict(zip(self.names, wanted, strict=True))
        self.walk = functools.partial(
            Pairing if correct else Calibrating,
            wanted=lambda path: by_name.get(path, ()),
            gram_rows=gram_rows,
            ledger=self.ledger,
        )
        self.add = jax.jit(self._add, donate_argnums=3)

    def zero(self, consts: Any, mine: Any, other: Any) -> dict[str, Emitted]:
        """Returns the statistics of no sample."""
        shapes = jax.eval_shape(self._add, consts, mine, other, None)
        walk = self.walk()
        return {k: walk.zero(e) for k, e in shapes.items()}

    def _add(self, consts: Any, mine: Any, other: Any, total: Any) -> dict[str, Emitted]:
        """Adds what one batch shows.

        Args:
          consts: the constants of the part.
          mine: values and environment of the model that is read.
          other: those of the one it should be like.
          total: what was added before, or ``None``.
        """
        sites: list[Any] = []

        def side(values: list[Any], env: list[Any]) -> dict[str, Emitted]:
            walk = self.walk(sites=sites) if self.correct else self.walk()
            walk.run(self.part.jaxpr, consts, [*_tracked(self.names, values), *env])
            return walk.side

        found = side(*mine)
        if self.correct:
            found = _drifts(found, side(*other), sites)
        if total is None:
            return found
        return {k: Emitted(merged(e.value, total[k].value), e.loops) for k, e in found.items()}

    def renamed(
        self, part: Part, total: dict[str, Emitted], ledger: Ledger
    ) -> list[tuple[Use, int, Emitted]]:
        """Returns what was added, of the units of a part that computes the same.

        Args:
          part: the part.
          total: what was added.
          ledger: takes the reasons why there is no more.
        """
        new = dict(zip(self.names, _names(part), strict=True))
        for name in ("reasons", "partly", "unread"):
            for path, why in getattr(self.ledger, name).items():
                getattr(ledger, name).setdefault(new[path], why)
        uses = [dataclasses.replace(u, path=new[u.path]) for u in self.ledger.uses]
        return [(uses[int(k)], self.ledger.multiply_adds[int(k)], e) for k, e in total.items()]


@dataclasses.dataclass
class Pairing(Calibrating):
    """A walk that also emits inputs themselves, so that those of two models can meet.

    Args:
      sites: what was read where, by the number in the name under which it is emitted.
    """

    sites: list[Any] = dataclasses.field(default_factory=list)

    def read(self, name: str, eqn: Any, blocks: list[jax.Array], names: Sequence[str]) -> None:
        if "gram" not in names:
            return
        use = self.ledger.uses[int(name)]
        around = sorted({e.primitive.name for e in self.around} & {"while", "shard_map"})
        if around or use.roles.indices:
            where = f"inside {around[0]}" if around else "where only data say which slice it is"
            raise ValueError(
                f"sequential: {use.path}: its inputs cannot be paired with those of the float "
                f"model {where}; pass correct=False"
            )
        site = name, self.trail(eqn)
        if site not in self.sites:
            self.sites.append(site)
        loops = tuple(range(1, len(self.loops) + 1))
        self.emit(f"input {self.sites.index(site)}", jnp.concatenate(blocks, axis=-1), loops)

    def zero(self, e: Any) -> Any:
        if isinstance(e.value, dict):
            return super().zero(e)
        return Emitted(jnp.zeros(e.value.shape, e.value.dtype), e.loops)


def _drifts(
    mine: dict[str, Emitted], other: dict[str, Emitted], sites: Sequence[Any]
) -> dict[str, Emitted]:
    """Returns the statistics that one model emitted, with its drift from another."""
    found = {}
    for name, e in mine.items():
        if name.startswith("input "):
            continue
        if "gram" in e.value:
            total = jnp.zeros_like(e.value["gram"])
            for i, (use, _) in enumerate(sites):
                if use == name:
                    total += _drift(mine[f"input {i}"], other[f"input {i}"], e.loops, total.dtype)
            e = Emitted({**e.value, "drift": total}, e.loops)
        found[name] = e
    return found


def _drift(mine: Emitted, other: Emitted, loops: tuple[int, ...], dtype: Any) -> jax.Array:
    x, y = mine.value.astype(dtype), other.value.astype(dtype)
    found = jnp.einsum("...si,...sj->...ij", x, y - x, precision=jax.lax.Precision.HIGHEST)
    # Iterations that statistics do not keep apart are summed up.
    return jnp.sum(found, axis=tuple(i for i, d in enumerate(mine.loops) if d not in loops))

"""Stages in a line: what each does with a micro-batch, and how it travels to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._arrangement import Arrangement, both, by_dtype
from ._slices import Slices, one_of


@dataclasses.dataclass(frozen=True)
class Line:
    """The stages, as seen by one device, while its program is traced.

    What travels from stage to stage has one shape for all of them: the arrangement ``wire``, whose
    member `s` is what stage `s` hands to the next one. Stage 0 reads the batch instead.

    Args:
      slices: a stage on each.
      runs: the functions of the stages.
      params: the arrangement of their parameters.
      wire: that of what travels.
      last: from the last stage's output and a micro-batch of targets to what is wanted.
      final: shapes of what is wanted.
      inputs: the micro-batches, arrays `[M, b, ...]`.
      targets: the same of what the last stage is told.
      same: whether all stages are one function of one structure.
    """

    slices: Slices
    runs: Sequence[Callable[..., Any]]
    params: Arrangement
    wire: Arrangement
    last: Callable[[Any, Any], Any]
    final: Any
    inputs: Any
    targets: Any
    same: bool

    @classmethod
    def of(
        cls,
        slices: Slices,
        runs: Sequence[Callable[..., Any]],
        params: Arrangement,
        last: Callable[[Any, Any], Any],
        inputs: Any,
        targets: Any,
    ) -> Line:
        """Finds the shapes of everything between the stages."""
        count = slices.count
        first, told = (
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), t)
            for t in (inputs, targets)
        )
        shapes, x = [], first
        for i, run in enumerate(runs):
            try:
                x = jax.eval_shape(run, params.struct(i), x)
            except (TypeError, ValueError) as e:
                got = jax.tree.map(lambda s: f"{s.dtype}{list(s.shape)}", x)
                e.add_note(f"{slices.who}: in stage {i} of {count}, whose input is {got}")
                raise
            shapes.append(x)
        wire = Arrangement.of(shapes[:-1] or [()], roles=by_dtype)
        alike = [jax.tree.map(lambda s: (s.shape, s.dtype), s) for s in (first, *shapes)]
        same = count > 1 and params.uniform and one_of(runs) and one_of_value(alike)
        final = jax.eval_shape(last, x, told)
        return cls(slices, runs, params, wire, last, final, inputs, targets, same)

    @property
    def stage(self) -> jax.Array:
        """The number of this device's stage."""
        return jax.lax.axis_index(self.slices.axis)

    @property
    def microbatches(self) -> int:
        """Number of micro-batches."""
        return jax.tree.leaves(self.inputs)[0].shape[0]

    def step(self, i: int, params: Any, wire: Any, m: jax.Array) -> tuple[Any, Any]:
        """Returns what stage ``i`` hands on, and what is wanted of the last one (else zeros)."""
        end = self.slices.count - 1
        if self.same:
            here = self.stage
            x = jax.tree.map(
                lambda a, b: jnp.where(here == 0, a, b), self.input(m), self.wire.unpack(wire, 0)
            )
            out = self.runs[0](self.params.unpack(params, 0), x)
            done = jax.lax.cond(here == end, lambda o: self._last(o, m), self._nothing, out)
            return self.wire.pack(out, 0), done
        x = self.input(m) if i == 0 else self.wire.unpack(wire, i - 1)
        out = self.runs[i](self.params.unpack(params, i), x)
        if i == end:
            return self.wire.zeros(), self._last(out, m)
        return self.wire.pack(out, i), self._nothing()

    def forward(self, params: Any, wire: Any, m: jax.Array, *, skip_last: bool = False) -> Any:
        """Returns :meth:`step` of this device's stage; zeros if there is no micro-batch ``m``.

        Args:
          params: buffers that the device holds.
          wire: buffers that came.
          m: number of the micro-batch; out of range while the stage waits.
          skip_last: whether the last stage waits always.
        """

        def idle(*_: Any) -> Any:
            return self.wire.zeros(), self._nothing()

        busy = self.busy(m)
        if skip_last:
            busy &= self.stage < self.slices.count - 1
        return self._where(busy, self.step, idle, params, wire, m)

    def backward(
        self, trained: Any, rest: Any, wire: Any, m: jax.Array, ahead: Any, scale: float
    ) -> Any:
        """Computes a stage again, and returns what its derivatives are.

        Args:
          trained: the half of the device's parameters that derivatives are by.
          rest: the other half.
          wire: what came when micro-batch ``m`` went forward.
          m: its number; out of range while the stage waits.
          ahead: derivatives by what it handed on.
          scale: that by the loss.

        Returns:
          Derivatives by ``trained`` and by the floating half of ``wire``, and the loss.
        """
        passed = self.wire.half(wire, trained=True)
        fixed = self.wire.half(wire, trained=False)

        def back(i: int, trained: Any, rest: Any, passed: Any, ahead: Any, m: Any) -> Any:
            def run(trained: Any, passed: Any) -> Any:
                out, loss = self.step(i, both(trained, rest), both(passed, fixed), m)
                return self.wire.half(out, trained=True), loss

            (_, loss), pull = jax.vjp(run, trained, passed)
            return *pull((ahead, jnp.full_like(loss, scale))), loss

        def idle(*_: Any) -> Any:
            zeros = self.params.zeros(trained=True), self.wire.zeros(trained=True)
            return *zeros, self._nothing()

        return self._where(self.busy(m), back, idle, trained, rest, passed, ahead, m)

    def busy(self, m: jax.Array) -> jax.Array:
        """Says whether there is a micro-batch of a number."""
        return (m >= 0) & (m < self.microbatches)

    def send(self, wire: Any, *, back: bool = False) -> Any:
        """Returns what the stage before hands to this one; of the stage after, if ``back``."""
        count = self.slices.count
        pairs = [(i + 1, i) if back else (i, i + 1) for i in range(count - 1)]
        if not pairs:
            return wire
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.slices.axis, pairs), wire)

    def input(self, m: jax.Array) -> Any:
        """Returns a micro-batch of inputs."""
        return _taken(self.inputs, m)

    def _last(self, out: Any, m: jax.Array) -> Any:
        return self.last(out, _taken(self.targets, m))

    def _nothing(self, *_: Any) -> Any:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.final)

    def _where(self, busy: Any, run: Callable[..., Any], idle: Any, *operands: Any) -> Any:
        """Runs this device's stage, or nothing at all while it waits.

        A result that a mask hides would still turn what is not finite into derivatives of NaN.
        """
        count = 1 if self.same else self.slices.count
        runs = [lambda *given, i=i: run(i, *given) for i in range(count)]
        number = jnp.where(busy, 0 if self.same else self.stage, count)
        return jax.lax.switch(number, [*runs, idle], *operands)


def _taken(tree: Any, m: jax.Array) -> Any:
    # Out of range only where nothing is computed with it.
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), tree)


def one_of_value(values: Sequence[Any]) -> bool:
    """Says whether all of a list are equal."""
    return all(v == values[0] for v in values)

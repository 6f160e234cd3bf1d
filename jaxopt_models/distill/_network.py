"""Networks as distillation sees them: a function of parameters, and what a loss may look at."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._accelerate import accelerate, simulate
from .._encoded import is_encoded
from .._taps import tapped


def first(batch: Any) -> Any:
    """Returns the first part of a batch that is a tuple or a list, otherwise the batch itself.

    Raises:
      TypeError: for a dict, whose first part is not what anyone means, or no batch at all.
    """
    if batch is None:
        raise TypeError("there is no batch; give step(state, batch), or batches to distill.fit")
    if isinstance(batch, dict):
        raise TypeError(
            f"a batch is a dict of {sorted(batch)}; say which of it the network reads: "
            "distill.Network(fn, inputs=lambda batch: batch['image'])"
        )
    return batch[0] if isinstance(batch, (tuple, list)) else batch


@dataclasses.dataclass(frozen=True)
class Network:
    """A function of parameters, what it reads of a batch, and what else of it is looked at.

    Every scheme takes a plain function in its place, which reads the first part of a batch.

    Args:
      fn: `(params, *inputs) -> out`, any JAX function; from a module by
        :func:`jaxopt_models.functional`. Its parameters may be compressed.
      inputs: from a batch to the argument after ``params``, or to a tuple of them; networks of
        several modalities each read their own part.
      taps: names of values inside that losses see, as for :func:`jaxopt_models.taps`.
      stateful: ``fn`` returns `(out, new_params)`, as ``functional(..., mutable=True)`` makes it;
        batch statistics and counters are taken over from there while it is trained. Collections
        without ``params``, as linen's `apply(..., mutable=["batch_stats"])` returns them, do.
      fixed: regular expression on whole paths of floating leaves that are not trained, such as
        embeddings; of a stateful function they are state, too, and are taken over. Collections of
        linen's layers and nnx variables that are no parameters are known without it.

    Raises:
      TypeError: if ``fn`` or ``inputs`` is no function, or ``taps`` no names.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> net = distill.Network(lambda p, x: x @ p["w"], inputs=lambda batch: batch["image"])
      >>> net.look({"w": jnp.ones((2, 1))}, {"image": jnp.ones((3, 2))}).out.shape
      (3, 1)
    """

    fn: Callable[..., Any]
    _: dataclasses.KW_ONLY
    inputs: Callable[[Any], Any] = first
    taps: Sequence[str] = ()
    stateful: bool = False
    fixed: str | None = None

    def __post_init__(self) -> None:
        if is_module(self.fn):
            raise TypeError(
                f"Network: fn is the module {type(self.fn).__name__}; make a function of it: "
                "fn, params = jaxopt_models.functional(module), or (module, variables) of linen"
            )
        for name in ("fn", "inputs"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Network: {name}={getattr(self, name)!r:.80} is no function")
        taps = (self.taps,) if isinstance(self.taps, str) else tuple(self.taps)
        if wrong := [name for name in taps if not isinstance(name, str)]:
            raise TypeError(f"Network: taps hold {wrong[0]!r:.80}; give names such as 'ip1'")
        object.__setattr__(self, "taps", taps)
        # Made once: what they keep of a call serves the next one.
        runs = {learn: self._run(learn) for learn in (False, True)}
        object.__setattr__(self, "_runs", runs)

    def look(self, params: Any, batch: Any, *, learn: bool = False) -> Seen:
        """Runs the network on a batch.

        Args:
          params: its parameters, dense or compressed.
          batch: what ``inputs`` takes.
          learn: whether it is going to be differentiated; no kernel is used then.

        Returns:
          What there is to see. New parameters of a stateful function are in ``new``.

        Raises:
          ValueError: if a stateful function returns no pair `(out, new_params)`, or another one
            does.
        """
        inputs = self.inputs(batch)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        out, found = self._runs[learn](params, *inputs)  # type: ignore[attr-defined]
        new = None
        if not self.stateful and _holds_new(out, params):
            raise ValueError(
                "Network: fn returned (out, new_params), whose new_params would be lost; give "
                "stateful=True: distill.Network(fn, stateful=True)"
            )
        if self.stateful:
            if not isinstance(out, tuple) or len(out) != 2:
                raise ValueError(
                    "Network: stateful=True, but fn returned no pair (out, new_params); take it "
                    "from jaxopt_models.functional(model, mutable=True)"
                )
            out, new = out
        return Seen(out, found, params, new=new)

    def _run(self, learn: bool) -> Callable[..., Any]:
        if self.taps:
            return tapped(self.fn, self.taps, kernels=not learn)
        run = (simulate if learn else accelerate)(self.fn)
        return lambda *args: (run(*args), {})


def _holds_new(out: Any, params: Any) -> bool:
    """Says whether a function returned a pair that ends in a tree just like its parameters."""
    if not isinstance(out, tuple) or len(out) != 2:
        return False
    (a, form), (b, other) = (jax.tree.flatten(x, is_leaf=is_encoded) for x in (params, out[1]))
    if not a or form != other or jax.tree_util.treedef_is_leaf(form):
        return False
    return [getattr(x, "shape", ()) for x in a] == [getattr(x, "shape", ()) for x in b]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What a loss may look at of one network.

    Of peers, and of a teacher that is trained beside its students, it holds ``out`` and ``taps``
    alone; of a teacher that stays, ``params``, too.

    Args:
      out: what its function returned.
      taps: ``{name: value}`` from its inside.
      params: its parameters.
      heads: what is trained beside it for the sake of the loss, such as projections.
      memory: what the loss keeps from step to step, such as a bank of features.
      step: number of steps before this one.
      key: a random key of this step.
      new: new parameters of a stateful function.
    """

    out: Any
    taps: dict[str, Any] = dataclasses.field(default_factory=dict)
    params: Any = None
    heads: Any = None
    memory: Any = None
    step: Any = None
    key: Any = None
    new: Any = None


def as_network(network: Any, who: str, name: str) -> Network:
    """Returns a network, made of a plain function if it is one.

    Raises:
      TypeError: if it is neither.
    """
    if isinstance(network, Network):
        return network
    if callable(network) or is_module(network):
        return Network(network)
    raise TypeError(
        f"{who}: {name} is {type(network).__name__}; give a function (params, x) -> out, or a "
        "distill.Network (a module becomes one by jaxopt_models.functional)"
    )


def is_module(x: Any) -> bool:
    """Says whether something is a module of Flax, which is callable, but no function."""
    kinds = [getattr(sys.modules.get(n), "Module", None) for n in ("flax.linen", "flax.nnx")]
    return isinstance(x, tuple(kind for kind in kinds if kind is not None))

"""Compression layer by layer, each calibrated on what the compressed ones before it give."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import artifact
from .._axes import Axes
from .._calibrate import Stats
from .._call import check_batches, check_function, on_data, take_apart, trace
from .._compress import check_key, encode
from .._encoded import Encoded, is_encoded
from .._options import flag, pattern, whole
from .._paths import Parameter, flatten
from .._progress import bar
from .._recipe import Decision, Rule, decide
from .._resume import claim, digest
from ._flat import Unit
from ._paired import Compiled
from ._stages import Stages


def sequential(
    fn: Callable[..., Any],
    params: Any,
    recipe: Sequence[Rule],
    batches: Iterable[tuple[Any, ...]],
    *,
    key: jax.Array | None = None,
    correct: bool = True,
    group: str | None = None,
    gram_rows: int = 8192,
    progress: bool = False,
    resume: str | os.PathLike[str] | None = None,
) -> Any:
    r"""Compresses parameters in the order in which a program uses them.

    :func:`jaxopt_models.calibrate` sees the inputs of the float model. Here the statistics of a
    parameter are of the inputs that it will have, :math:`\tilde X`, computed with all parameters
    before it compressed. With ``correct``, solvers such as :class:`GPTQ` and :class:`AdaRound` are
    given the weights that on these come nearest to what the float model does,

    .. math:: \arg\min_V \, \lVert \tilde X V - X W \rVert^2 + \lambda \lVert V - W \rVert^2,

    so that a layer also makes up for errors of those before it.

    The program is cut where parameters come in, and runs part by part: what is alive at a cut is
    kept for each batch, and each equation runs once for the compressed model (and once for the
    float one, with ``correct``), however many layers there are. The statistics of one stage are
    in memory at a time. A loop over stacked layers (``nn.scan``) is run layer by layer, and its
    layers are compressed one after another; in other loops all parameters make one stage. Parts
    that compute the same, as layers do, are compiled once.

    Args:
      fn: function of `(params, ...)`.
      params: its parameters, compressed or not.
      recipe: rules, as for :func:`jaxopt_models.compress`. Encoders that need no statistics are
        applied first.
      batches: tuples of the arguments after ``params``; all of them are kept.
      key: random key for encoders that draw; each path gets its own.
      correct: whether solvers make up for the errors before. The rows of an input have to be
        the same samples in both models; where data decide which rows a layer sees, as with experts,
        pass ``False``.
      group: regular expression on the beginning of paths; parameters for which it matches the same
        text make one stage, ``"layers/[0-9]+"`` one of each layer. By default those that meet
        the same input do.
      gram_rows: see :func:`jaxopt_models.calibrate`.
      progress: show a bar, a step for each stage.
      resume: folder in which each finished parameter is saved; a run that was stopped goes on from
        there when it is called again with the same function, and gives the same bits.

    Returns:
      The compressed tree, as :func:`jaxopt_models.compress` gives it.

    Raises:
      TypeError: if a batch is no tuple, an option has another type, or under a JAX transformation.
      ValueError: for what :func:`jaxopt_models.calibrate` and :func:`jaxopt_models.compress` raise;
        if ``resume`` holds another run; with ``correct``, if inputs are inside a ``while`` loop or
        ``shard_map``.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> x = jax.random.normal(keys[0], (256, 8)) @ jax.random.normal(keys[1], (8, 32))
      >>> params = {"a": jax.random.normal(keys[2], (32, 32)), "b": jax.random.normal(keys[3], (32, 4))}
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"] / 32) @ p["b"]
      >>> recipe = [jom.Rule(".*", jom.quant.GPTQ(jom.quant.Int(bits=2)))]
      >>> small = jom.quant.sequential(fn, params, recipe, [(x,)])
      >>> once = jom.compress(params, recipe, stats=jom.calibrate(fn, params, [(x,)], recipe))
      >>> error = lambda p: jnp.mean((fn(jom.materialize(p), x) - fn(params, x)) ** 2)
      >>> bool(error(small) < error(once))
      True

    References:
      Frantar et al., `GPTQ <https://arxiv.org/abs/2210.17323>`_, 2023; Li et al., `GPTAQ: Efficient
      Finetuning-Free Quantization for Asymmetric Calibration <https://arxiv.org/abs/2504.02692>`_,
      2025
    """  # noqa: E501
    check_function(fn, "sequential")
    gram_rows = whole(gram_rows, "sequential: gram_rows", least=0)
    same = None if group is None else pattern(group, "sequential: group")
    flag(correct, "sequential: correct")
    check_key(key, "sequential")
    batches = check_batches(batches, "sequential")
    on_data(params, batches, "sequential")
    leaves, unflatten = flatten(params)
    decisions = decide(leaves, recipe, who="sequential")
    options = {"correct": str(correct), "group": str(group), "gram_rows": str(gram_rows)}
    store = _Store(resume, fn, params, decisions, batches, key, options)
    model = _Model(decisions, store, key)
    if model.needs:
        compiled, stacked = Compiled(correct, gram_rows), model.stacked()
        stages = Stages(fn, params, batches, model, stacked, compiled, same)
        with bar("sequential", len(stages.order), show=progress) as step:
            for number, units in enumerate(stages.order):
                stages.advance(number)
                if todo := [u for u in units if not model.restored(u)]:
                    stats = stages.statistics(number, todo)
                    for u in todo:
                        model.encode(u, stats)
                step(units[0].name)
    return unflatten([model.whole(p.path) for p in leaves])


class _Model:
    """Parameters, on their way from float to compressed.

    Args:
      decisions: what the recipe decided for each.
      store: where finished ones are kept.
      key: random key.
    """

    def __init__(self, decisions: Sequence[Decision], store: _Store, key: Any):
        self.decisions = {d.parameter.path: d for d in decisions}
        self.store, self.key = store, key
        self.float = {d.parameter.path: d.parameter.value for d in decisions}
        self.now = dict(self.float)
        self.layers: dict[str, dict[Unit, Any]] = {}
        self.needs: dict[str, tuple[str, ...]] = {}
        for path, d in self.decisions.items():
            if d.encoder is not None and d.encoder.missing(d.parameter.value, None):
                self.needs[path] = d.encoder.needs
            elif d.encoder is not None:
                self.now[path] = encode(d, stats=None, key=key, who="sequential")

    def stacked(self) -> set[str]:
        """Returns the paths of parameters whose first axis may be one of layers."""
        found = set()
        for path, d in self.decisions.items():
            depth = min(_depth(x[path]) for x in (self.float, self.now))
            if d.encoder is not None and d.rule is not None and d.rule.axes is not None:
                depth = min(depth, d.rule.axes.stack)
            if depth and not d.parameter.reason:
                found.add(path)
        return found

    def current(self, unit: Unit) -> Any:
        """Returns a value in the model that is compressed."""
        return _layer(self.layers.get(unit.path, {}).get(unit, self.now[unit.path]), unit)

    def original(self, unit: Unit) -> Any:
        """Returns a value in the float model."""
        return _layer(self.float[unit.path], unit)

    def whole(self, path: str) -> Any:
        """Returns a parameter with all of its layers."""
        layers = self.layers.get(path)
        if layers is None:
            return self.now[path]
        found = [layers[u].value for u in sorted(layers, key=lambda u: u.layer)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    def restored(self, unit: Unit) -> bool:
        """Takes a parameter from the store, where it is."""
        found = self.store.load(unit)
        if found is not None:
            self._finish(unit, found)
        return found is not None

    def encode(self, unit: Unit, stats: dict[str, Stats]) -> None:
        """Encodes a parameter, by its statistics, and stores it."""
        d = self.decisions[unit.path]
        rule = d.rule
        if unit.layer is not None and rule is not None and rule.axes is not None:
            rule = dataclasses.replace(rule, axes=_of_layer(rule.axes, self.float[unit.path].ndim))
        one = Decision(Parameter(unit.name, self.current(unit)), rule, d.number)
        leaf = encode(one, stats=stats, key=self.key, who="sequential")
        self.store.save(unit, leaf)
        self._finish(unit, leaf)

    def _finish(self, unit: Unit, leaf: Any) -> None:
        if unit.layer is None:
            self.now[unit.path] = leaf
        else:
            self.layers.setdefault(unit.path, {})[unit] = _Done(leaf)


@dataclasses.dataclass(frozen=True)
class _Done:
    """A finished layer."""

    value: Any


def _layer(x: Any, unit: Unit) -> Any:
    if isinstance(x, _Done):
        return x.value
    return x if unit.layer is None else jax.tree.map(lambda part: part[unit.layer], x)


def _depth(x: Any) -> int:
    """Returns how many first axes may be a stack."""
    return len(x.stack) if is_encoded(x) else len(getattr(x, "shape", ()))


def _of_layer(axes: Axes, ndim: int) -> Axes:
    """Returns roles in one layer of those in a stack."""
    core = axes.resolve(ndim)
    stack = core.stack - 1
    return Axes(tuple(a + stack for a in core.out or ()), stack)


class _Store:
    """Finished parameters in a folder, a file each.

    Args:
      folder: where; ``None`` for nowhere.
      fn, params, decisions, batches, key, options: what makes a run this run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        fn: Callable[..., Any],
        params: Any,
        decisions: Sequence[Decision],
        batches: Any,
        key: Any,
        options: dict[str, str],
    ):
        self.folder = None if folder is None else pathlib.Path(folder)
        if self.folder is None:
            return
        self.numbers = {d.parameter.path: i for i, d in enumerate(decisions)}
        rules = [(d.parameter.path, d.encoder, d.rule and d.rule.axes) for d in decisions]
        run = {"function": _printed(fn, params, batches[0])}
        run |= {"params": digest(params), "batches": digest(batches), "recipe": repr(rules)}
        claim(self.folder, {**run, "key": digest(key), **options}, "resume")

    def save(self, unit: Unit, leaf: Encoded) -> None:
        """Keeps a leaf, under a temporary name until it is whole."""
        if self.folder is not None:
            artifact.save(self._file(unit), {"leaf": leaf})

    def load(self, unit: Unit) -> Encoded | None:
        """Returns a leaf that was kept, or ``None``."""
        if self.folder is None or not self._file(unit).exists():
            return None
        return artifact.load(self._file(unit), types=_strangers(Encoded))["leaf"]

    def _file(self, unit: Unit) -> pathlib.Path:
        assert self.folder is not None
        layer = "" if unit.layer is None else f"_{unit.layer}"
        return self.folder / f"{self.numbers[unit.path]:06d}{layer}.jom"


def _printed(fn: Callable[..., Any], params: Any, batch: tuple[Any, ...]) -> str:
    """Returns a checksum of the program of a function, the same in every process."""
    frame, arrays = take_apart(params, batch, {})
    program = trace(fn, frame, arrays, who="sequential", every=True)
    text = re.sub(r" at 0x[0-9a-f]+", "", str(program.jaxpr))
    return f"{zlib.crc32(text.encode()):08x} {digest(program.consts)}"


def _strangers(cls: type[Encoded]) -> list[type[Encoded]]:
    """Returns the leaf classes of others than this library."""
    found = []
    for sub in cls.__subclasses__():
        found += [] if sub.__module__.startswith("jaxopt_models.") else [sub]
        found += _strangers(sub)
    return found

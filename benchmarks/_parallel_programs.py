"""Models and steps that are planned for a pod, as shapes: nothing is computed."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import distill, quant
from jaxopt_models._axes import Axes
from jaxopt_models._bits import array_bits
from jaxopt_models._calibrate import adding
from jaxopt_models._calibrating import Ledger
from jaxopt_models._call import take_apart
from jaxopt_models._encoded import is_encoded
from jaxopt_models._paths import flatten
from jaxopt_models.models import EfficientNetLite0, MiniLM

#: Tokens of a text, and sizes of an image.
TOKENS, PIXELS = 128, 224
#: The 30,522 tokens of MiniLM and rows of zeros, so that 16 devices share them.
VOCABULARY = 30528


class Model(NamedTuple):
    """A function and what it takes.

    Args:
      fn: of `(params, *inputs)`.
      params: shapes of its parameters.
      inputs: from a number of examples to the shapes of its inputs.
      rules: from the axes of model and shards to the rules that divide parameters.
      small: encoders of a number of bits, as rules.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: Callable[[int], tuple[Any, ...]]
    rules: Callable[[tuple[str, ...], str | None], list[tuple[str, P]]]
    small: Callable[[int], list[jom.Rule]]

    def compressed(self, bits: int) -> Any:
        """Returns the shapes of the parameters in so many bits."""
        return jax.eval_shape(lambda p: jom.compress(p, self.small(bits)), self.params)


def minilm(layers: int = 6, vocab: int = VOCABULARY) -> Model:
    """MiniLM on texts of 128 tokens."""
    model = MiniLM(vocab=vocab, layers=layers)

    def inputs(n: int) -> tuple[Any, ...]:
        return (jax.ShapeDtypeStruct((n, TOKENS), jnp.int32),) * 2

    def fn(params: Any, ids: Any, mask: Any) -> Any:
        return model.apply({"params": params}, ids, mask)

    def rules(both: tuple[str, ...], shards: str | None) -> list[tuple[str, P]]:
        # Columns of what comes first, rows of what follows it: one sum for each pair.
        return [
            (r".*/(query|key|value|up)/kernel", P(None, both)),
            (r".*/(query|key|value|up)/bias", P(both)),
            (r".*/(attention/output|down)/kernel", P("model", shards)),
            (r"embeddings/(word|position)/embedding", P(both)),
        ]

    def small(bits: int) -> list[jom.Rule]:
        # Of a table each row has groups of its own, as it is read by rows.
        encoder = quant.Int(bits=8) if bits == 8 else quant.Int(bits=bits, group=32)
        tables = jom.Rule("embeddings/(word|position)/.*", encoder, Axes(out=(0,)))
        return [tables, jom.Rule(".*/kernel", encoder)]

    params = jax.eval_shape(model.init, jax.random.key(0), *inputs(1))["params"]
    return Model(fn, params, inputs, rules, small)


def lite0(blocks: int = 7) -> Model:
    """EfficientNet-Lite0 on images of 224 x 224."""
    from jaxopt_models.models._lite0 import STAGES

    model = EfficientNetLite0(stages=STAGES[:blocks])

    def inputs(n: int) -> tuple[Any, ...]:
        return (jax.ShapeDtypeStruct((n, PIXELS, PIXELS, 3), jnp.float32),)

    def rules(both: tuple[str, ...], shards: str | None) -> list[tuple[str, P]]:
        return [
            (r".*(expand|depthwise)/kernel|head/kernel", P(None, None, None, both)),
            (r".*(expand_norm|depthwise_norm)/.*|head_norm/.*", P(both)),
            (r".*project/kernel", P(None, None, "model", shards)),
            (r"classifier/kernel", P("model", shards)),
        ]

    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs(1))

    def small(bits: int) -> list[jom.Rule]:
        found = []
        for p in flatten(variables)[0]:
            if not re.fullmatch(r".*/kernel", p.path):
                continue
            # Rows of one shard; where groups of 32 do not divide them a channel has one scale.
            rows = math.prod(p.value.shape[:-1])
            rows //= 4 if re.search("project|classifier", p.path) else 1
            group = 32 if bits < 8 and rows % 32 == 0 else None
            found.append(jom.Rule(re.escape(p.path), quant.Int(bits=bits, group=group)))
        return found

    return Model(model.apply, variables, inputs, rules, small)


MODELS = {"MiniLM": minilm, "Lite0": lite0}


class Step(NamedTuple):
    """A step as a function of a state and a batch.

    Args:
      fn: of `(state, fixed, batch)`.
      state: shapes of what it gives up and gives back.
      fixed: of what it reads only.
      batch: of a number of examples.
    """

    fn: Callable[..., Any]
    state: Any
    fixed: Any
    batch: Callable[[int], tuple[Any, ...]]


def calibration(layers: int = 6) -> Step:
    """Statistics of every input of MiniLM, with grams, added to those of before."""
    model = minilm(layers, vocab=30522)
    ledger = Ledger()
    add = adding(model.fn, lambda path: ("absmax", "gram"), 8192, ledger)

    def one(total: Any, params: Any, batch: Any) -> Any:
        frame, arrays = take_apart(params, batch, {})
        return add(frame, arrays, total)

    total = jax.eval_shape(functools.partial(one, None), model.params, model.inputs(1))
    return Step(one, total, model.params, model.inputs)


def distillation(layers: int = 6) -> Step:
    """A step of Adam of half of MiniLM's layers, taught by all; its tables stay as they are."""
    whole, cut = minilm(layers, vocab=30522), minilm(-(-layers // 2), vocab=30522)
    student = distill.Network(cut.fn, inputs=lambda batch: batch, fixed="embeddings/.*/embedding")
    teacher = distill.Network(whole.fn, inputs=lambda batch: batch)

    def near(student: Any, teacher: Any, batch: Any) -> Any:
        return 2 * distill.cross_modal(student.out, teacher.out)

    scheme = distill.teacher_student(student, teacher, near, optax.adam(5e-4))
    state = jax.eval_shape(scheme.init, cut.params, whole.params)

    def one(moving: Any, teachers: Any, batch: Any) -> Any:
        return scheme.step.program(moving, teachers, batch)

    return Step(one, state.moving(), state.teachers, whole.inputs)


STEPS: dict[str, Callable[..., Step]] = {
    "calibration": calibration,
    "distillation": distillation,
}


def divided(tree: Any, rules: list[tuple[str, P]], sizes: dict[str, int]) -> dict[str, float]:
    """Returns bytes of the parameters that rules divide.

    Args:
      tree: the parameters.
      rules: as for a layout.
      sizes: of all axes.

    Returns:
      ``part``, what a device holds of them, ``even``, what it would if nothing of a parameter was
      on several devices of the axes that divide it, and ``codes``, what has to be put together
      from the axis ``shard``.
    """
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    found = {"part": 0.0, "even": 0.0, "codes": 0.0}

    def local(x: Any, spec: Any) -> float:
        shape = jax.sharding.NamedSharding(mesh, spec).shard_shape(tuple(x.shape))
        return array_bits(jax.ShapeDtypeStruct(shape, x.dtype)) / 8

    for p in flatten(tree)[0]:
        spec = next((s for pattern, s in rules if re.fullmatch(pattern, p.path)), P())
        if not (names := _names(spec)) or p.reason:
            continue
        shape = jax.sharding.NamedSharding(mesh, spec).shard_shape(tuple(p.value.shape))
        specs = p.value.specs(spec, shape) if is_encoded(p.value) else spec
        n = math.prod(sizes[a] for a in names)
        for x, s in zip(jax.tree.leaves(p.value), jax.tree.leaves(specs), strict=True):
            found["part"] += local(x, s)
            found["even"] += array_bits(x) / 8 / n
            if "shard" in _names(s):
                found["codes"] += local(x, s) * sizes["shard"]
    return found


def _names(spec: Any) -> list[str]:
    return [a for axes in spec for a in ((axes,) if isinstance(axes, str) else axes or ())]


def sums(model: Model) -> list[int]:
    """Returns the sizes of what Megatron's layout sums up for an example: after split rows."""
    pattern = r".*(attention/output|down|project|classifier)/kernel"
    table = jom.accelerate(model.fn).explain(model.params, *model.inputs(1))
    return [math.prod(row["output"]) for row in table if re.fullmatch(pattern, row["path"])]

"""Recipes: where to apply which encoder, as data."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from ._axes import Axes
from ._chain import Chain, chain
from ._encoder import Encoder
from ._options import given, pattern
from ._paths import Parameter


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which encoder the parameters of some paths get.

    Args:
      path: regular expression that must match the whole normalised path.
      encoder: the method, or ``None`` to keep the parameters dense.
      axes: roles of the axes of these parameters; default: from the statistics, or else
        last is out and no stack.

    Raises:
      ValueError: for a malformed expression.
      TypeError: for an encoder that is none, or axes that are none.

    Example:
      >>> import jaxopt_models as jom
      >>> jom.Rule(".*/kernel", jom.quant.Int(bits=4, group=32))
      Rule('.*/kernel', Int(bits=4, group=32))
    """

    path: str
    encoder: Encoder | None
    axes: Axes | None = None

    def __post_init__(self) -> None:
        pattern(self.path, "Rule: path")
        if self.encoder is not None and not isinstance(self.encoder, Encoder):
            raise TypeError(
                f"Rule: encoder for {self.path!r} is {self.encoder!r}; give an encoder such as "
                "quant.Int(bits=8), or None to keep the parameters dense"
            )
        if self.axes is not None and not isinstance(self.axes, Axes):
            raise TypeError(
                f"Rule: axes for {self.path!r} are {self.axes!r}; give Axes(out=..., stack=...)"
            )

    def __repr__(self) -> str:
        axes = "" if self.axes is None else f", {self.axes!r}"
        return f"Rule({self.path!r}, {self.encoder!r}{axes})"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a recipe decided for one leaf: a rule and its number, or neither."""

    parameter: Parameter
    rule: Rule | None
    number: int | None

    @property
    def encoder(self) -> Encoder | None:
        """The encoder, or ``None`` for a leaf that stays as it is."""
        return None if self.rule is None else self.rule.encoder


def decide(leaves: Sequence[Parameter], recipe: Sequence[Rule], *, who: str) -> list[Decision]:
    """Gives every leaf the first rule that matches its path.

    Args:
      leaves: what :func:`jaxopt_models._paths.flatten` lists.
      recipe: ordered rules.
      who: name of the calling function, for messages.

    Returns:
      A decision for each leaf, in order.

    Raises:
      ValueError: if a rule decides no leaf; lists the paths.
      TypeError: if the recipe is not a sequence of rules.
    """
    recipe = check_recipe(recipe, who=who)
    patterns = [pattern(rule.path, f"{who}: rule {i}") for i, rule in enumerate(recipe)]
    used = [0] * len(recipe)
    taken = [0] * len(recipe)
    decisions = []
    for p in leaves:
        hits = [] if p.reason else [i for i, r in enumerate(patterns) if r.fullmatch(p.path)]
        for i in hits[1:]:
            taken[i] += 1
        if hits:
            used[hits[0]] += 1
        first = hits[0] if hits else None
        decisions.append(Decision(p, None if first is None else recipe[first], first))
    for i, rule in enumerate(recipe):
        if not used[i]:
            why = (
                f"every parameter it matches ({taken[i]}) is taken by an earlier rule"
                if taken[i]
                else "it matches no parameter"
            )
            paths = ", ".join(p.path for p in leaves if not p.reason) or "none"
            hidden = [p for p in leaves if p.reason and patterns[i].fullmatch(p.path)]
            if hidden and not taken[i]:
                why += f" ({hidden[0].path} is {_what(hidden[0])}; rules see floating parameters)"
            hint = ""
            inside = any(p.path.startswith("params/") for p in leaves)
            if inside and not taken[i] and not rule.path.startswith("params/"):
                hint = "; pass variables['params'], whose paths do not start with params/"
            raise ValueError(f"{who}: rule {i} ({rule.path!r}): {why}. Paths are: {paths}{hint}")
    return decisions


def _what(p: Parameter) -> str:
    return f"of the {p.reason}" if p.reason.startswith("collection ") else p.reason


def check_recipe(recipe: Any, *, who: str) -> list[Rule]:
    """Returns the recipe as a list, or raises a `TypeError` that says what a recipe is."""
    if isinstance(recipe, Rule):
        raise TypeError(f"{who}: a recipe is a list of rules; write [{recipe!r}]")
    if not isinstance(recipe, Iterable) or isinstance(recipe, (str, bytes, dict)):
        raise TypeError(f"{who}: a recipe is a list of Rule(path, encoder), got {recipe!r:.80}")
    rules = list(recipe)
    for i, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise TypeError(f"{who}: item {i} of the recipe is {rule!r:.80}, not a Rule")
    return rules


def recipe_to_json(recipe: Sequence[Rule]) -> str:
    """Writes a recipe as JSON; options at their default are left out.

    Args:
      recipe: rules; their encoders are the library's or dataclasses of your own.

    Returns:
      A JSON list.

    Example:
      >>> import jaxopt_models as jom
      >>> jom.recipe_to_json([jom.Rule(".*/kernel", jom.quant.Int(bits=4))])
      '[{"path": ".*/kernel", "encoder": {"quant.Int": {"bits": 4}}}]'
    """
    rules = []
    for rule in check_recipe(recipe, who="recipe_to_json"):
        item: dict[str, Any] = {"path": rule.path, "encoder": _to_data(rule.encoder)}
        if rule.axes is not None:
            item["axes"] = _to_data(rule.axes)
        rules.append(item)
    return json.dumps(rules)


def recipe_from_json(text: str, *, encoders: Sequence[type] = ()) -> list[Rule]:
    """Reads a recipe; only classes of this library, and those given, are ever built.

    Args:
      text: what :func:`recipe_to_json` wrote.
      encoders: your own classes that the recipe may name.

    Returns:
      The rules.

    Raises:
      ValueError: for text that is no recipe, naming the rule and what is wrong.

    Example:
      >>> import jaxopt_models as jom
      >>> jom.recipe_from_json('[{"path": ".*", "encoder": {"quant.Int": {"bits": 4}}}]')
      [Rule('.*', Int(bits=4))]
    """
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"recipe_from_json: not JSON: {e}") from None
    if not isinstance(items, list):
        raise ValueError("recipe_from_json: a recipe is a list of objects with path and encoder")
    known = {_class_name(c): c for c in encoders}
    rules = []
    for i, item in enumerate(items):
        try:
            if not isinstance(item, dict) or not {"path", "encoder"} <= set(item):
                raise ValueError(f"expected an object with path and encoder, got {item!r:.80}")
            if extra := set(item) - {"path", "encoder", "axes"}:
                raise ValueError(f"unknown keys {sorted(extra)}")
            encoder = _from_data(item["encoder"], known)
            axes = _from_data(item.get("axes"), known)
            rules.append(Rule(item["path"], encoder, axes))
        except (TypeError, ValueError) as e:
            raise ValueError(f"recipe_from_json: rule {i}: {e}") from None
    return rules


def _class_name(cls: type) -> str:
    module = cls.__module__
    if module.startswith("jaxopt_models."):
        folder = module.split(".")[1]
        return cls.__name__ if folder.startswith("_") else f"{folder}.{cls.__name__}"
    return f"{module}:{cls.__qualname__}"


def _to_data(value: Any) -> Any:
    if isinstance(value, Chain):
        return [_to_data(e) for e in value.encoders]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_class_name(type(value)): {k: _to_data(v) for k, v in given(value).items()}}
    if isinstance(value, tuple):
        return [_to_data(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} cannot be written as JSON; options are numbers, strings, tuples")


def _from_data(value: Any, known: dict[str, type]) -> Any:
    if isinstance(value, dict):
        if len(value) != 1:
            raise ValueError(f"expected one class with its options, got {sorted(value)}")
        [(name, options)] = value.items()
        if not isinstance(options, dict):
            raise ValueError(f"options of {name} are {options!r:.60}, not an object")
        cls = known.get(name) or _find(name)
        return cls(**{k: _from_data(v, known) for k, v in options.items()})
    if isinstance(value, list):
        items = tuple(_from_data(v, known) for v in value)
        return chain(*items) if items and isinstance(items[0], Encoder) else items
    return value


def _find(name: str) -> type:
    *folder, cls = name.split(".")
    module = importlib.import_module("jaxopt_models")
    for part in folder:
        module = getattr(module, part, None) if part in ("prune", "quant", "codebook") else None
    found = getattr(module, cls, None) if module else None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(
            f"no class {name!r} in this version of the library; a class of your own is passed "
            "as encoders=[...]"
        )
    return found

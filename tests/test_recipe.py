import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, chain, codebook, prune, quant

PARAMS = {
    "ip1": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    "ip2": {"kernel": jnp.ones((4, 4))},
}
RECIPES = [
    [],
    [Rule("head/.*", None), Rule(".*/kernel", quant.Int(bits=4, group=32))],
    [Rule("a", quant.Int(bits=3, symmetric=False)), Rule("b", quant.Int(bits=8, per="tensor"))],
    [Rule("a", prune.Magnitude(sparsity=0.92), Axes(out=(0, 2), stack=1))],
    [Rule("a", prune.Magnitude(structure=prune.NofM(2, 4)), Axes.torch())],
    [Rule("a", prune.Magnitude(sparsity=0.5, structure=prune.Block(4, 2)))],
    [Rule("a", prune.Magnitude(sparsity=0.5, across_stack=True), Axes(stack=2))],
    [Rule("a", prune.Magnitude(sparsity=0.1), Axes(out=()))],
    [Rule("a", codebook.KMeans(bits=5, per="channel", start="random", iterations=7))],
    [Rule("a", chain(prune.Magnitude(sparsity=0.5), codebook.KMeans(bits=4)))],
    [Rule(r"a\.b\\c", chain(prune.Magnitude(structure=prune.NofM(1, 4)), quant.Int(bits=2)))],
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_json_round_trip(recipe):
    text = jom.recipe_to_json(recipe)
    assert jom.recipe_from_json(text) == recipe
    assert jom.recipe_to_json(jom.recipe_from_json(text)) == text


def test_json_leaves_out_defaults():
    text = jom.recipe_to_json([Rule("a", quant.Int(bits=4, group=None, symmetric=True))])
    assert json.loads(text) == [{"path": "a", "encoder": {"quant.Int": {"bits": 4}}}]


@dataclasses.dataclass(frozen=True)
class Mine(jom.Encoder):
    """A stranger's encoder."""

    level: int = 1

    def encode(self, w, *, axes, keep, stats, key):
        return quant.Int(bits=self.level + 1)(w)


def test_a_strangers_encoder_must_be_passed():
    text = jom.recipe_to_json([Rule("a", Mine(level=3)), Rule("b", Mine())])
    assert jom.recipe_from_json(text, encoders=[Mine]) == [
        Rule("a", Mine(level=3)),
        Rule("b", Mine()),
    ]
    with pytest.raises(ValueError, match=r"rule 0: no class .*Mine.* encoders="):
        jom.recipe_from_json(text)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "quant.os",
        "quant._int.Int",
        "Nothing",
        "quant.jax",
        "Rule.x",
        "prune.allocate_global",
        "jax.Array",
        "",
        "..quant.Int",
    ],
)
def test_only_classes_of_the_library_are_built(name):
    with pytest.raises(ValueError, match="no class"):
        jom.recipe_from_json(json.dumps([{"path": "a", "encoder": {name: {}}}]))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "a recipe is a list"),
        ("[1]", "rule 0: expected an object"),
        ('[{"path": "a"}]', "rule 0: expected an object"),
        ('[{"path": "a", "encoder": null, "axis": 1}]', r"rule 0: unknown keys \['axis'\]"),
        ('[{"path": "a", "encoder": {"quant.Int": 4}}]', "rule 0: options of quant.Int"),
        ('[{"path": "a", "encoder": {"quant.Int": {}}}]', "rule 0: .*bits"),
        ('[{"path": "a", "encoder": {"quant.Int": {"bits": 99}}}]', "rule 0: .*2 to 8"),
        ('[{"path": "a", "encoder": {"quant.Int": {"bits": 4, "x": 1}}}]', "rule 0: .*'x'"),
        ('[{"path": "a", "encoder": {}}]', "rule 0: expected one class"),
        ('[{"path": "(", "encoder": null}]', "rule 0: .*no regular expression"),
        ('[{"path": 3, "encoder": null}]', "rule 0: .*path=3 is no str"),
        ('[{"path": "a", "encoder": "quant.Int"}]', "rule 0: .*encoder"),
        ('[{"path": "a", "encoder": []}]', "rule 0: .*encoder"),
        ('[{"path": "a", "encoder": {"Axes": {}}}]', "rule 0: .*encoder"),
        ('[{"path": "a", "encoder": null, "axes": {"quant.Int": {"bits": 4}}}]', "rule 0: .*axes"),
        ('[{"path": "a", "encoder": null, "axes": 3}]', "rule 0: .*axes"),
        ('[{"path": "a", "encoder": [{"quant.Int": {"bits": 4}}, 3]}]', "rule 0: chain takes"),
        (
            '[{"path": "a", "encoder": {"prune.Magnitude": {"structure": {"Axes": {}}}}}]',
            "rule 0: .*structure",
        ),
    ],
)
def test_text_that_is_no_recipe(text, why):
    with pytest.raises(ValueError, match=why):
        jom.recipe_from_json(text)


def test_first_match_wins_and_none_keeps_dense():
    recipe = [Rule("ip1/.*", None), Rule(".*/kernel", quant.Int(bits=8))]
    small = jom.compress(PARAMS, recipe)
    assert small["ip1"] == PARAMS["ip1"]
    assert isinstance(small["ip2"]["kernel"], quant.Quantized)


def test_a_path_is_matched_whole():
    with pytest.raises(ValueError, match=r"rule 0 \('kernel'\): it matches no parameter"):
        jom.compress(PARAMS, [Rule("kernel", quant.Int(bits=8))])


def test_an_unmatched_rule_lists_the_paths():
    with pytest.raises(ValueError, match="Paths are: ip1/bias, ip1/kernel, ip2/kernel"):
        jom.compress(PARAMS, [Rule(".*", None), Rule("nothing", None)])


def test_a_shadowed_rule_raises():
    recipe = [Rule(".*/kernel", quant.Int(bits=8)), Rule("ip1/kernel", quant.Int(bits=4))]
    with pytest.raises(ValueError, match=r"rule 1 .*\(1\) is taken by an earlier rule"):
        jom.compress(PARAMS, recipe)


def test_a_malformed_expression_raises():
    for path in ("(", "*"):
        with pytest.raises(ValueError, match="is no regular expression"):
            Rule(path, None)
    for path in (None, 3, re.compile("w")):
        with pytest.raises(TypeError, match=r"Rule: path=.* is no str"):
            Rule(path, None)


@pytest.mark.parametrize("encoder", [quant.Int, "quant.Int(bits=4)", 4, lambda w: w, quant])
def test_a_rule_takes_encoders(encoder):
    with pytest.raises(TypeError, match="give an encoder such as"):
        Rule(".*", encoder)


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Rule(".*", None), r"a recipe is a list of rules; write \[Rule"),
        ({".*": quant.Int(bits=4)}, "a recipe is a list of Rule"),
        (".*", "a recipe is a list of Rule"),
        (None, "a recipe is a list of Rule"),
        ([(".*", quant.Int(bits=4))], "item 0 of the recipe"),
        ([Rule(".*", None), quant.Int(bits=4)], "item 1 of the recipe"),
    ],
    ids=str,
)
def test_what_is_no_recipe(recipe, why):
    for function in (jom.compress, jom.plan, lambda p, r: jom.straight_through(r)(p)):
        with pytest.raises(TypeError, match=why):
            function(PARAMS, recipe)
    with pytest.raises(TypeError, match=why):
        jom.recipe_to_json(recipe)


def test_a_generator_is_a_recipe_even_for_straight_through():
    rules = [Rule(".*/kernel", quant.Int(bits=8))]
    assert jom.compress(PARAMS, (r for r in rules))["ip1"]["kernel"].bits == 8
    show = jom.straight_through(r for r in rules)
    show(PARAMS)
    show(PARAMS)


def test_rules_are_shown_as_they_are_typed():
    encoder = chain(prune.Magnitude(sparsity=0.5), quant.Int(bits=4))
    assert repr(Rule("a", encoder, Axes(stack=1))) == (
        "Rule('a', chain(Magnitude(sparsity=0.5), Int(bits=4)), Axes(out=None, stack=1))"
    )
    assert repr(Rule("a", None)) == "Rule('a', None)"

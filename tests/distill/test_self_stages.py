"""Networks that teach themselves, and stages that imitate stages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distill_networks import CLASSES, batch, near, plain, same

import jaxopt_models as jom
from jaxopt_models import distill, quant

FN, PARAMS = plain((6, 5, CLASSES), seed=1)


def test_the_average_follows_what_is_trained():
    seen = []

    def loss(student, teacher, batch):
        value, metrics = distill.classification(soft=0.5)(student, teacher, batch)
        return value, metrics

    scheme = distill.self_taught(FN, loss, optax.sgd(0.5), decay=0.75)
    state = scheme.init(PARAMS)
    expected = PARAMS
    for i in range(3):
        state, metrics = scheme.step(state, batch(i))
        expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, expected, state.student)
        seen.append(float(metrics["soft"]))
    near(distill.averaged(state), expected)
    assert seen[0] == 0.0 and seen[2] > 0, "the first teacher is the student itself"


def test_the_average_of_a_compressed_network_keeps_its_codes():
    small = jom.compress(PARAMS, [jom.Rule(".*/kernel", quant.Int(bits=4))])
    scheme = distill.self_taught(FN, distill.classification(), optax.sgd(0.1), decay=0.5)
    state, _ = scheme.step(scheme.init(small), batch())
    average = distill.averaged(state)
    assert same(*(jom.partition(t)[1] for t in (average, small)))
    scale = [t["layer0"]["kernel"].scale for t in (small, average, state.student)]
    np.testing.assert_allclose(scale[1], (scale[0] + scale[2]) / 2, rtol=1e-6)
    assert not np.array_equal(scale[0], scale[2])


def test_the_last_layer_teaches_an_earlier_one():
    net = distill.Network(FN, taps=["layer0"])
    heads = distill.deep_supervision_heads(jax.random.key(0), net, PARAMS, batch())
    assert heads["layer0"]["kernel"].shape == (5, CLASSES)
    loss = distill.deep_supervision(hard=0.0, soft=1.0, temperature=1.0)
    scheme = distill.self_taught(net, loss, optax.sgd(0.5))
    state, first = scheme.step(scheme.init(PARAMS, heads=heads), batch())
    for _ in range(30):
        state, last = scheme.step(state, batch())
    assert last["last"] < first["last"] and last["early"] < first["early"]
    # The term of the head gives the last layer no derivative.
    alone = distill.self_taught(FN, distill.classification(hard=1, soft=0), optax.sgd(0.5))
    other, _ = alone.step(alone.init(PARAMS), batch())
    again, _ = scheme.step(scheme.init(PARAMS, heads=heads), batch())
    near(again.student["layer1"], other.student["layer1"])
    with pytest.raises(ValueError, match=r"taps are \['layer0'\], heads \[\]"):
        scheme.step(scheme.init(PARAMS), batch())
    with pytest.raises(ValueError, match="keeps no average"):
        distill.averaged(state)
    with pytest.raises(ValueError, match="decay=1"):
        distill.self_taught(FN, loss, optax.sgd(0.1), decay=1.0)


def test_each_stage_learns_from_the_teachers_own_inputs():
    def first(params, x):
        return jnp.tanh(x @ params["w"])

    def second(params, x):
        return x @ params["w"]

    rng = np.random.default_rng(0)
    masters = [{"w": jnp.asarray(rng.normal(size=s), jnp.float32)} for s in ((6, 4), (4, 3))]
    recipe = [jom.Rule("w", quant.Int(bits=3))]
    small = [jom.compress(p, recipe) for p in masters]
    scheme = distill.layerwise([first, second], [first, second], optax.adam(0.01))
    state = scheme.init(small, masters)
    x = batch()[0]
    hidden = first(masters[0], x)
    state, metrics = scheme.step(state, x)
    wrong = second(jom.materialize(small[1]), hidden) - second(masters[1], hidden)
    expected = float((wrong**2).sum() / (second(masters[1], hidden) ** 2).sum())
    np.testing.assert_allclose(metrics["loss"][1], expected, rtol=1e-4)
    for _ in range(50):
        state, last = scheme.step(state, x)
    assert (last["loss"] < metrics["loss"]).all()
    with pytest.raises(ValueError, match="1 stages of the student, 2"):
        distill.layerwise([first], [first, second], optax.sgd(0.1))
    with pytest.raises(ValueError, match="teacher_params must be a list of 2"):
        scheme.init(small, masters[:1])

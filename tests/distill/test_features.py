"""Features of other sizes, heads, and relations of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_models import distill

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def apply(layer, x):
    return np.asarray(x) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


attention = jax.jit(distill.attention)
project = jax.jit(distill.project)


def test_attention_of_other_sizes_is_averaged_over_areas():
    s, t = draw(2, 2, 3, 4), draw(2, 4, 2, 5)
    maps = []
    for x in (s, t):
        place = np.mean(np.asarray(x, np.float64) ** 2, axis=-1)
        if place.shape[1] == 4:
            place = (place[:, ::2] + place[:, 1::2]) / 2
        if place.shape[2] == 3:
            # One and a half places each.
            first, middle, last = np.moveaxis(place, 2, 0)
            place = np.stack([(first + middle / 2) / 1.5, (middle / 2 + last) / 1.5], axis=2)
        maps.append(place / np.sqrt(np.sum(place**2, axis=(1, 2), keepdims=True)))
    expected = np.mean((maps[0] - maps[1]) ** 2)
    assert float(attention(s, t)) == pytest.approx(expected, rel=1e-5)
    # Neither scale counts, however small.
    assert float(attention(1e-8 * s, 1e8 * t)) == pytest.approx(expected, rel=1e-5)


def test_heads_are_dense_layers_and_convolutions(key):
    x = draw(2, 3, 4, 2)
    head = distill.projection(key, 2, 5) | {"bias": draw(5)}
    found = project(head, x)
    np.testing.assert_allclose(found, apply(head, x), rtol=2e-5)

    head = distill.projection(key, 2, 5, window=(3, 1)) | {"bias": draw(5)}
    found = project(head, x)
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (0, 0), (0, 0)))
    kernel = np.asarray(head["kernel"])
    expected = sum(padded[:, i : i + 3] @ kernel[i, 0] for i in range(3)) + np.asarray(head["bias"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_start_with_the_variance_of_their_input(key):
    x = draw(2000, 32)
    assert float(jnp.std(project(distill.projection(key, 32, 64), x))) == pytest.approx(1, rel=0.1)


def test_translators_have_a_leaky_relu_after_each_layer(key):
    head, x = distill.translator(key, 3, 2), draw(4, 3)
    assert [layer["kernel"].shape for layer in head] == [(3, 3), (3, 2), (2, 2)]
    expected = np.asarray(x)
    for layer in head:
        expected = apply(layer, expected)
        expected = np.where(expected > 0, expected, 0.1 * expected)
    np.testing.assert_allclose(project(head, x), expected, rtol=1e-5)


def test_projections_take_the_sizes_of_the_teacher():
    head = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
    x = draw(1, 4, 3, 2)
    found = project(head, x, like=jnp.zeros((1, 2, 6, 7)))
    expected = np.repeat((x[:, ::2] + x[:, 1::2]) / 2, 2, axis=2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_heads_learn_what_the_teacher_shows(descend, key):
    x = draw(64, 6)
    teacher = x @ draw(6, 8)

    def loss(parts, x):
        head, scale = parts
        return distill.variational(distill.project(head, x), teacher, scale)

    parts = (distill.projection(key, 6, 8), jnp.full(8, 5.0))
    (head, scale), values = descend(loss, optax.adam(3e-2), parts, jnp.stack([x] * 400))
    assert float(values[0]) > 1 and float(values[-1]) < -2
    assert float(distill.hint(distill.project(head, x), teacher)) < 1e-2
    assert np.all(scale < -3)


def test_factors_of_any_scale():
    s, t = draw(3, 4), draw(3, 4)
    loss = jax.jit(jax.value_and_grad(distill.factor_transfer))
    value, grad = loss(s, t)
    again, other = loss(1e-7 * s, 1e-9 * t)
    assert float(again) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(1e-7 * other, grad, rtol=1e-4, atol=1e-6)
    value, grad = loss(s, s)
    assert float(value) < 1e-7 and np.isfinite(grad).all()


def test_a_power_of_one_has_no_slope_at_zero():
    x = jnp.array([[[1.0, 0.0], [2.0, 3.0]]])
    grad = jax.grad(lambda s: distill.attention(s, x[:, ::-1], power=1))(x)
    assert grad[0, 0, 1] == 0 and np.all(grad[0, [0, 1, 1], [0, 0, 1]] != 0)


def test_features_are_checked():
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match="with the same B and number of axes"):
        distill.attention(x, jnp.ones((2, 3, 3, 4)))
    with pytest.raises(ValueError, match=r"attention: power=0.5 must be at least 1"):
        distill.attention(x, x, power=0.5)
    with pytest.raises(ValueError, match=r"factor_transfer: order=0 must be at least 1"):
        distill.factor_transfer(x, x, order=0)
    with pytest.raises(ValueError, match=r"scale has shape \(3,\).* one entry a channel, \(4,\)"):
        distill.variational(x, x, jnp.ones(3))
    with pytest.raises(
        ValueError, match=r"student holds \['a'\]; teacher holds an array; give the same outputs"
    ):
        distill.reconstruction({"a": x}, x)
    with pytest.raises(ValueError, match="student holds nothing"):
        distill.reconstruction({}, {})
    with pytest.raises(ValueError, match=r"student\['a'\]\[1\] has shape \(2, 3, 4\)"):
        distill.reconstruction({"a": (x, x)}, {"a": (x, x[0])})


def test_heads_are_checked(key):
    head = distill.projection(key, 4, 5)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), the kernel \(4, 5\); give \[B, 4"):
        distill.project(head, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"give \[B, spatial, spatial, 4\]"):
        distill.project(distill.projection(key, 4, 5, window=(3, 3)), jnp.ones((2, 4, 4)))
    with pytest.raises(ValueError, match=r"like has shape \(2, 5\), the projection \(2, 3, 5\)"):
        distill.project(head, jnp.ones((2, 3, 4)), like=jnp.ones((2, 5)))
    for wrong, name in (({}, "kernel"), ({"kernel": head["kernel"]}, "bias"), (({},), "kernel")):
        with pytest.raises(ValueError, match=f"project: .*'{name}'.*distill.projection makes"):
            distill.project(wrong, jnp.ones((2, 4)))
    for wrong in ((), None):
        with pytest.raises(ValueError, match=r"distill.projection or distill.translator makes one"):
            distill.project(wrong, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="inputs=0 must be at least 1"):
        distill.projection(key, 0, 5)


@pytest.mark.parametrize("loss", [distill.relational_distance, distill.relational_angle])
def test_relations_see_no_place_scale_or_turn(loss):
    loss = jax.jit(loss)
    x, y = draw(5, 3), draw(5, 3)
    turn, _ = np.linalg.qr(RNG.normal(size=(3, 3)))
    moved = 5 * x @ jnp.asarray(turn, jnp.float32) + 100
    assert float(loss(x, moved)) < 1e-7
    assert float(loss(x, y)) > 1e-2
    assert float(loss(1e-6 * x, moved)) < 1e-7


def test_similarity_sees_no_scale():
    loss = jax.jit(distill.similarity)
    x, y = draw(5, 3), draw(5, 3)
    assert float(loss(1e-6 * x, y)) == pytest.approx(float(loss(x, y)), rel=1e-5)
    assert float(loss(x, y)) > 1e-2


def test_opposite_examples_have_finite_likelihoods():
    a = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)
    value = jax.jit(jax.vmap(jax.value_and_grad(lambda x: distill.pkt(x, x[::-1]))))
    found, slopes = value(jnp.stack([a, -a, a + 1], axis=1))
    assert np.isfinite(found).all() and np.isfinite(slopes).all()

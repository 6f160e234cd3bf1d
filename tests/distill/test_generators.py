import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from losses import normal, traced

from jaxopt_models.distill import generated, generator

RNG = np.random.default_rng(0)
LABELS = np.array([1, 0, 2])
SHAPES = {
    "dense": {"shape": (2, 3), "hidden": (6, 5), "classes": 3},
    "image": {"shape": (4, 8, 2), "hidden": (6,), "channels": (3, 2)},
    "grid": {"shape": (4, 2, 1), "channels": (3,), "classes": 3},
    "linear": {"shape": (7,)},
}


def made(key, name):
    """A generator whose biases and scales are not those of the start."""
    options = dict(SHAPES[name])
    params = generator(key, 4, options.pop("shape"), **options)
    return jax.tree.map(lambda x: x + 0.1 * normal(RNG, *x.shape), params)


@functools.partial(jax.jit, static_argnames=("norm", "output"))
def make(params, noise, labels=None, *, norm="batch", output=jnp.tanh):
    return generated(params, noise, labels, norm=norm, output=output)


def convolve64(x, kernel):
    """A 3x3 convolution, place by place."""
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for b, i, j in np.ndindex(x.shape[:3]):
        for di in range(3):
            for dj in range(3):
                u, v = i + di - 1, j + dj - 1
                if 0 <= u < x.shape[1] and 0 <= v < x.shape[2]:
                    out[b, i, j] += x[b, u, v] @ kernel[di, dj]
    return out


def rectified64(p, x, norm):
    """Normalises by channel or by example, one at a time."""
    x = x.copy()
    if norm is not None:
        parts = range(x.shape[-1]) if norm == "batch" else range(len(x))
        for i in parts:
            at = (..., i) if norm == "batch" else i
            x[at] = (x[at] - x[at].mean()) / np.sqrt(x[at].var() + 1e-5)
    x = x * p["scale"] + p["bias"]
    return np.where(x > 0, x, 0.2 * x)


def generated64(params, noise, labels, norm):
    params = jax.tree.map(np.float64, params)
    x = np.float64(noise)
    if labels is not None:
        first = params["dense_0" if "dense_0" in params else "grid"]
        first["kernel"] = np.concatenate([first["kernel"], params["classes"]])
        x = np.concatenate([x, np.eye(3)[labels]], axis=1)
    for name in ("dense_0", "dense_1"):
        if name in params:
            x = rectified64(params[name], x @ params[name]["kernel"], norm)
    if "grid" not in params:
        out = np.tensordot(x, params["output"]["kernel"], 1)
    else:
        x = rectified64(params["grid"], np.tensordot(x, params["grid"]["kernel"], 1), norm)
        for name in ("conv_0", "conv_1"):
            if name in params:
                x = np.kron(x, np.ones((1, 2, 2, 1)))
                x = rectified64(params[name], convolve64(x, params[name]["kernel"]), norm)
        out = convolve64(x, params["output"]["kernel"])
    return np.tanh(out + params["output"]["bias"])


@pytest.mark.parametrize("case", ["dense-batch", "image-batch", "image-layer", "grid-", "linear-"])
def test_against_float64(key, case):
    name, _, norm = case.partition("-")
    norm = norm or None
    params, noise = made(key, name), normal(RNG, 3, 4)
    labels = LABELS if "classes" in SHAPES[name] else None
    images = make(params, noise, labels, norm=norm)
    assert images.shape == (3, *SHAPES[name]["shape"])
    np.testing.assert_allclose(
        images, generated64(params, noise, labels, norm), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_one_example_and_equal_examples_have_derivatives(key, norm):
    params = made(key, "grid")

    @jax.jit
    def slopes(params, noise, labels):
        def loss(params, noise):
            return jnp.sum(generated(params, noise, labels, norm=norm) ** 2)

        return jax.grad(loss, (0, 1))(params, noise)

    for size, noise in ((1, normal(RNG, 1, 4)), (3, np.ones((3, 4), np.float32))):
        for x in jax.tree.leaves(slopes(params, noise, np.zeros(size, int))):
            assert np.isfinite(x).all()


def test_shapes_ranges_and_starting_scale(key):
    params = generator(key, 100, (28, 28, 1), channels=(16, 8), classes=10)
    assert params["grid"]["kernel"].shape == (100, 7, 7, 16)
    assert params["classes"].shape == (10, 7, 7, 16)
    noise, labels = normal(RNG, 4, 100), jnp.arange(4)
    images = make(params, noise, labels, output=jax.nn.sigmoid)
    assert images.shape == (4, 28, 28, 1)
    assert 0 < images.min() < 0.3 and 0.7 < images.max() < 1
    half = jax.eval_shape(generated, params, noise.astype(jnp.bfloat16), labels)
    assert half.shape == images.shape and half.dtype == jnp.float32
    other = generator(jax.random.key(1), 100, (28, 28, 1), channels=(16, 8), classes=10)
    assert not np.array_equal(params["grid"]["kernel"], other["grid"]["kernel"])


def test_a_generator_of_classes_learns(key, descend):
    """It comes to make a given vector for each label, whatever the noise."""
    wanted = jnp.array([[0.8, -0.8], [-0.8, -0.8], [0.5, 0.8]])
    labels = jnp.arange(24) % 3

    def loss(params, noise):
        return jnp.mean((generated(params, noise, labels) - wanted[labels]) ** 2)

    noise = jax.random.normal(jax.random.key(1), (100, 24, 4))
    _, values = descend(
        loss, optax.adam(2e-2), generator(key, 4, (2,), hidden=(16,), classes=3), noise
    )
    assert values[0] > 0.5 and values[-1] < 0.02


def test_an_unknown_label_is_seen(key):
    params = made(key, "dense")
    images = make(params, normal(RNG, 3, 4), np.array([0, 3, -1]), norm="layer")
    np.testing.assert_array_equal(np.isnan(images).any((1, 2)), [False, True, True])


@traced
def test_what_does_not_fit_is_named(key):
    with pytest.raises(ValueError, match=r"shape=\(28, 30, 1\).*divisible by 4"):
        generator(key, 4, (28, 30, 1), channels=(8, 4))
    with pytest.raises(ValueError, match=r"shape=\(28,\) with channels=\(8,\)"):
        generator(key, 4, (28,), channels=(8,))
    with pytest.raises(ValueError, match=r"noise=0 must be at least 1"):
        generator(key, 0, (28,))
    with pytest.raises(TypeError, match=r"hidden=0.5 is no whole number"):
        generator(key, 4, (28,), hidden=(0.5,))
    params, noise = made(key, "dense"), jnp.zeros((3, 4))
    with pytest.raises(ValueError, match=r"the generator has classes; give labels"):
        generated(params, noise)
    with pytest.raises(ValueError, match=r"the generator has no classes; leave out labels"):
        generated(made(key, "image"), noise, LABELS)
    for wrong in (noise[..., None], noise[:, :3]):
        with pytest.raises(ValueError, match=r"noise has shape .*; give \(B, 4\)"):
            generated(params, wrong, LABELS)
    with pytest.raises(ValueError, match=r"labels has shape \(2,\); give \(3,\)"):
        generated(params, noise, LABELS[:2])
    with pytest.raises(TypeError, match="labels is float32"):
        generated(params, noise, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"norm='group' is none of"):
        generated(params, noise, LABELS, norm="group")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_models import models

LENET300 = {
    "ip1/kernel": (784, 300),
    "ip1/bias": (300,),
    "ip2/kernel": (300, 100),
    "ip2/bias": (100,),
    "ip3/kernel": (100, 10),
    "ip3/bias": (10,),
}
LENET5 = {
    "conv1/kernel": (5, 5, 1, 20),
    "conv1/bias": (20,),
    "conv2/kernel": (5, 5, 20, 50),
    "conv2/bias": (50,),
    "ip1/kernel": (800, 500),
    "ip1/bias": (500,),
    "ip2/kernel": (500, 10),
    "ip2/bias": (10,),
}
MODELS = [
    (models.LeNet300, models.nnx.LeNet300, LENET300, 266_610),
    (models.LeNet5, models.nnx.LeNet5, LENET5, 431_080),
]


def random_images(count=3):
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)


@pytest.mark.parametrize(("linen", "twin", "shapes", "count"), MODELS)
def test_twins_have_the_papers_parameters_and_the_same_outputs(linen, twin, shapes, count):
    images = random_images()
    params = linen().init(jax.random.key(1), images)["params"]
    found = {f"{layer}/{name}": w.shape for layer in params for name, w in params[layer].items()}
    assert found == shapes
    assert sum(w.size for w in jax.tree.leaves(params)) == count

    model = twin(rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(model))
    assert {"/".join(path): box.get_value().shape for path, box in flat} == shapes
    for (layer, name), box in flat:
        box.set_value(params[layer][name])
    logits = linen().apply({"params": params}, images)
    assert logits.shape == (3, 10) and logits.dtype == jnp.float32
    np.testing.assert_array_equal(model(images), logits)


def test_lenet300_computes_its_formula():
    images = random_images()
    params = models.LeNet300().init(jax.random.key(2), images)["params"]
    x = images.reshape(3, 784) / 255
    for layer in ("ip1", "ip2", "ip3"):
        x = x @ np.asarray(params[layer]["kernel"], np.float64) + np.asarray(params[layer]["bias"])
        x = np.maximum(x, 0) if layer != "ip3" else x
    np.testing.assert_allclose(models.LeNet300().apply({"params": params}, images), x, atol=1e-5)


def test_lenet5_has_no_nonlinearity_but_pooling_before_ip1():
    images = random_images()
    model = models.LeNet5()
    params = model.init(jax.random.key(3), images)["params"]
    negative = {**params, "conv1": jax.tree.map(lambda w: -jnp.abs(w), params["conv1"])}
    negative["conv2"] = {"kernel": jnp.ones((5, 5, 20, 50)), "bias": jnp.zeros(50)}
    negative["ip1"] = {"kernel": -jnp.ones((800, 500)), "bias": jnp.zeros(500)}
    negative["ip2"] = {"kernel": jnp.ones((500, 10)), "bias": jnp.zeros(10)}
    # Every value after the convolutions is negative; a ReLU there would give zero logits.
    assert (model.apply({"params": negative}, images) > 1).all()


@pytest.mark.parametrize(("linen", "twin"), [m[:2] for m in MODELS])
def test_bytes_and_scaled_floats_and_a_channel_axis_are_the_same_input(linen, twin):
    images = random_images()
    variables = linen().init(jax.random.key(0), images)
    model = twin(rngs=nnx.Rngs(0))
    scaled = images.astype(np.float32) * np.float32(1 / 255)
    for forward in (lambda x: linen().apply(variables, x), model):
        logits = forward(images)
        for same in (images[..., None], scaled, scaled[..., None]):
            np.testing.assert_array_equal(forward(same), logits)
    assert linen().apply(variables, images[:0]).shape == (0, 10)


@pytest.mark.parametrize("linen", [m[0] for m in MODELS])
def test_other_inputs_are_refused(linen):
    with pytest.raises(ValueError, match=r"shape \(28, 28\); give \[B, 28, 28\]"):
        linen().init(jax.random.key(0), jnp.zeros((28, 28)))
    with pytest.raises(TypeError, match="dtype int32; give uint8"):
        linen().init(jax.random.key(0), jnp.zeros((1, 28, 28), jnp.int32))

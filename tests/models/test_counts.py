"""Numbers of parameters and of multiply-adds against published ones."""

import functools
import math

import jax
import pytest
from hand_counts import HAND, PHOTO, build_linen, build_nnx

from jaxopt_models import models
from jaxopt_models._paths import flatten

# One layer of torch.nn.TransformerEncoderLayer(512, 8, 2048) has 3,152,384.
ENCODER = 37000 * 512 + 512 * 512 + 6 * 3_152_384 + 2 * 512
PARAMETERS = {
    "LeNet5": 431_080,
    "ResNet18": 11_689_512,
    "Transformer": ENCODER,
    "Transformer tied": ENCODER,
    "Transformer scanned": ENCODER,
    "LSTM": 4 * (28 * 128 + 128 * 128 + 128) + 128 * 10 + 10,
}
# LeNet-5: half of the 4586K operations of Han et al. 2015, arXiv:1506.02626, table 4. ResNet-18:
# the 1.81 GFLOPS of torchvision, which are multiply-adds. The others have formulas.
TOTALS = {
    "LeNet5": 2_293_000,
    "ResNet18": 1_814_073_344,
    "Transformer": 6 * 128 * (4 * 512 * 512 + 2 * 512 * 2048),
    "Transformer tied": 128 * (6 * (4 * 512 * 512 + 2 * 512 * 2048) + 512 * 37000),
    "Transformer scanned": 6 * 128 * (4 * 512 * 512 + 2 * 512 * 2048),
    "LSTM": 28 * 4 * (28 * 128 + 128 * 128) + 128 * 10,
}


def parameters(params):
    return {p.path: p.value.shape for p in flatten(params)[0] if not p.reason}


@pytest.mark.parametrize("name", HAND)
def test_parameters_and_hand_counts_sum_to_the_known_totals(name):
    build, args, macs = HAND[name]
    fn, params = build()
    known = name.removesuffix(" nnx")
    sizes = {path: math.prod(shape) for path, shape in parameters(params).items()}
    assert sum(sizes.values()) == PARAMETERS[known]
    assert sum(macs.values()) == TOTALS[known]
    kernels = {path for path in sizes if path.endswith("/kernel")}
    assert set(macs) == kernels | ({"tokens/embedding"} if "tied" in name else set())
    # Each weight is used once for each position, wherever the count comes from.
    assert all(macs[path] % sizes[path] == 0 for path in macs)
    assert jax.eval_shape(fn, params, *args).shape[0] == 1


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(build_linen, models.ResNet50),
        functools.partial(build_nnx, models.nnx.ResNet50),
    ],
)
def test_resnet50_has_the_published_parameters(build):
    fn, params = build(PHOTO, {})
    found = parameters(params)
    assert sum(map(math.prod, found.values())) == 25_557_032
    assert sum(path.endswith("/kernel") for path in found) == 50 + 4
    assert sum("conv_shortcut" in path for path in found) == 4
    assert jax.eval_shape(fn, params, *PHOTO).shape == (1, 1000)

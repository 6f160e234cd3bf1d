"""Codes and masks in NumPy are packed as JAX packs them."""

import jax.numpy as jnp
import numpy as np
import pytest
from artifact_trees import (
    bits,
)

from jaxopt_models._bits import pack_bits
from jaxopt_models._bits import pack_codes as jax_pack_codes
from jaxopt_models.artifact import _packing as packing


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape, core", [((5,), ()), ((), ()), ((3, 11), (11,)), ((2, 3, 8), (8,))])
def test_numpy_packs_as_jax_does(width, signed, shape, core):
    low = -(1 << width - 1) if signed else 0
    rng = np.random.default_rng(width)
    codes = rng.integers(low, low + (1 << width), shape).astype(np.int8 if signed else np.uint8)
    packed = packing.pack_codes(codes, core, bits=width, signed=signed)
    wide = jnp.asarray(codes.astype(np.int32) if core else codes.astype(np.int32)[..., None])
    assert bits(packed) == bits(jax_pack_codes(wide, bits=width, signed=signed))
    back = packing.unpack_codes(packed, core, shape, bits=width, signed=signed)
    assert back.dtype == codes.dtype and (back == codes).all()
    keep = codes > 0
    mask = packing.pack_mask(keep, core)
    assert bits(mask) == bits(pack_bits(jnp.asarray(keep if core else keep[..., None])))
    assert (packing.unpack_mask(mask, core, shape) == keep).all()

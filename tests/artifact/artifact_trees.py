"""Trees, bit-for-bit comparison, and forged files for the tests of the artifact."""

import dataclasses
import struct
import zlib

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

import jaxopt_models as jom
from jaxopt_models._encoded import is_encoded
from jaxopt_models.artifact import Reader
from jaxopt_models.artifact._container import DICTIONARY, MAGIC
from jaxopt_models.artifact._packing import pack_codes, pack_mask, to_jax
from jaxopt_models.codebook._clustered import Clustered
from jaxopt_models.quant._quantized import Quantized


def bits(x):
    """Type, shape and bytes of an array; `int4` and the like by their values."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return ("key", str(jax.random.key_impl(x)), *bits(jax.random.key_data(x)))
    x = np.asarray(x)
    if x.dtype.name in ("int2", "int4", "uint2", "uint4"):
        return x.dtype.name, x.shape, x.astype(np.int8).tobytes()
    return x.dtype.name, x.shape, np.ascontiguousarray(x).tobytes()


def assert_same(a, b):
    """Same containers, same classes of leaves, same bits."""
    assert type(a) is type(b) or not isinstance(a, (dict, list, tuple)), (type(a), type(b))
    if isinstance(a, dict):
        assert set(a) == set(b) and {type(k) for k in a} == {type(k) for k in b}
        for k in a:
            assert_same(a[k], b[k])
    elif type(a) in (list, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif is_encoded(a):
        assert type(a) is type(b)
        for name in type(a).static_names:
            assert getattr(a, name) == getattr(b, name), name
        for name in type(a).part_names:
            assert_same(getattr(a, name), getattr(b, name))
    elif a is None or type(a) in (bool, int, str):
        assert type(a) is type(b) and a == b
    elif type(a) is float:
        assert type(b) is float and struct.pack("<d", a) == struct.pack("<d", b)
    else:
        assert bits(a) == bits(b)


def clustered(rng, shape, density, width):
    """A pruned tensor of shared weights, as Deep Compression leaves it."""
    keep = rng.random(shape) < density
    top = (1 << width) - 1
    codes = np.clip(np.round(rng.normal(size=shape) * top / 8 + top / 2), 0, top).astype(np.uint8)
    book = np.sort(rng.normal(size=top + 1).astype(np.float32))
    packed = pack_codes(codes * keep, shape, bits=width, signed=False)
    values = Clustered(to_jax(packed), to_jax(book), shape, (), width, "float32")
    return masked(keep, values)


def masked(keep, values):
    """A mask of one core tensor over values."""
    return jom.Masked(to_jax(pack_mask(keep, keep.shape)), values, keep.shape)


def quantized(rng, shape, width, *, groups=1, out=None, zero_point=False, stack=()):
    """Integer codes with scales for groups of inputs."""
    out = (len(shape) - 1,) if out is None else out
    low = 0 if zero_point else -(1 << width - 1)
    codes = np.clip(np.round(rng.normal(size=(*stack, *shape)) * (1 << width) / 8), -999, 999)
    codes = np.clip(codes + (0 if low else 1 << width - 1), low, low + (1 << width) - 1)
    per = (*stack, *(shape[a] for a in out), groups)
    scale = to_jax(rng.random(per).astype(np.float32))
    zero = to_jax(rng.integers(0, 1 << width, per).astype(np.uint8)) if zero_point else None
    codes = codes.astype(np.uint8 if zero_point else np.int8)
    packed = pack_codes(codes, shape, bits=width, signed=not zero_point)
    return Quantized(to_jax(packed), scale, zero, shape, out, width, "float32")


def lenet(seed=0):
    """LeNet-300-100, pruned, with shared weights and biases of 8 bits: about 20 kB."""
    rng = np.random.default_rng(seed)
    tree = {}
    layers = [((784, 300), 0.06, 5), ((300, 100), 0.07, 5), ((100, 10), 0.2, 5)]
    for i, (shape, density, width) in enumerate(layers, 1):
        bias = quantized(rng, shape[1:], 8, out=())
        tree[f"ip{i}"] = {"kernel": clustered(rng, shape, density, width), "bias": bias}
    return tree


def mixed(seed=0):
    """Grouped asymmetric codes, stacked leaves, dense floats, integers, keys and values."""
    rng = np.random.default_rng(seed)
    keep = rng.random((20, 30)) < 0.3
    return {
        "grouped": quantized(rng, (64, 24), 4, groups=4, zero_point=True),
        "stacked": quantized(rng, (16, 12), 3, stack=(3,)),
        "masked": masked(
            keep, to_jax(np.where(keep, rng.normal(size=keep.shape), 0).astype(np.float32))
        ),
        "dense": [
            to_jax(rng.normal(size=(13, 17)).astype(np.float32)),
            to_jax(rng.normal(size=40).astype(jnp.bfloat16)),
            rng.normal(size=9),
        ],
        "counts": (to_jax(rng.integers(-5, 5, 300).astype(np.int8)), np.arange(7), None),
        "keys": jax.random.key(3),
        "about": {"step": 7, "rate": float("inf"), "name": "mixed", "empty": {}},
    }


@jom.leaf
class Scaled(jom.Encoded):
    """A leaf that the library does not know."""

    values: object
    factor: jax.Array
    core: tuple = jom.static()
    note: str = jom.static(default="n")

    @property
    def dtype(self):
        return self.factor.dtype

    @property
    def stack(self):
        return self.factor.shape

    def rebuild(self):
        values = self.values.materialize() if isinstance(self.values, jom.Encoded) else self.values
        return values * self.factor


def stranger(seed=0):
    """Leaves of a class that is not ours, around and inside of ours."""
    rng = np.random.default_rng(seed)
    scaled = Scaled(quantized(rng, (8, 4), 4, stack=(3,)), jnp.arange(3.0), (8, 4))
    mask = to_jax(pack_mask(rng.random((3, 8, 4)) < 0.5, (8, 4)))
    values = dataclasses.replace(scaled, values=to_jax(rng.random((3, 8, 4)).astype(np.float32)))
    return {"a": scaled, "b": jom.Masked(mask, values, (8, 4)), "c": jnp.ones(2)}


def tiny():
    """Two small tensors."""
    return {"a": jnp.arange(6, dtype=jnp.float32), "b": jnp.asarray([1, 0, 1, 1], jnp.uint8)}


def take_apart(data):
    """Returns the index of a file and the bytes of its sections, all to be changed at will."""
    with Reader(data) as reader:
        bodies = [bytearray(reader.read(i)) for i in range(len(reader.sections))]
        return reader.meta, [s.description for s in reader.sections], bodies


def put_together(meta, descriptions, bodies):
    """A file with right lengths and checksums, whatever it says."""
    sections = [
        [len(body), zlib.crc32(body).to_bytes(4, "little"), description]
        for body, description in zip(bodies, descriptions, strict=True)
    ]
    return seal(msgpack.packb([meta, sections]), b"".join(bodies))


def seal(plain, body):
    """A file with right checksums around any index."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    index = deflate.compress(plain) + deflate.flush()
    return MAGIC + body + index + struct.pack("<II", len(index), zlib.crc32(MAGIC + index))

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_models import Axes, Encoded, Encoder, chain, leaf, static
from jaxopt_models.codebook import KMeans
from jaxopt_models.prune import Block, Magnitude, NofM
from jaxopt_models.quant import (
    AWQ,
    BWN,
    GPTQ,
    HQQ,
    LSQ,
    MX,
    NF4,
    NVFP4,
    PACT,
    XNOR,
    AdaRound,
    Binary,
    BinaryConnect,
    DoReFa,
    DoReFaInput,
    Float,
    Format,
    Hadamard,
    Input,
    Int,
    LearnedInput,
    Normal,
    Sign,
    Table,
    Ternary,
)
from jaxopt_models.testing import SHAPES, check_encoder, leaf_bits, random_stats

KERNEL, ATTENTION, CONV, _, DEPTHWISE, _, STACK, EMBEDDING = SHAPES
HALF = Magnitude(sparsity=0.5)
FEW, LAYERS = ((16, 8), Axes()), ((2, 16, 8), Axes(stack=1))
WIDE, WIDE_LAYERS = ((64, 8), Axes()), ((2, 64, 8), Axes(stack=1))

# Shapes that take long to compile are few here; every product runs with --full.
ROWS = [
    (Int(bits=4), SHAPES),
    (Int(bits=2), [KERNEL]),
    (Int(bits=3), [CONV, STACK]),
    (Int(bits=6), [FEW]),
    (Int(bits=8), [ATTENTION]),
    (Int(bits=5, group=8), [KERNEL, EMBEDDING]),
    (Int(bits=4, group=4), [STACK]),
    (Int(bits=8, per="tensor"), [DEPTHWISE]),
    (Int(bits=4, symmetric=False), [KERNEL]),
    (Int(bits=2, symmetric=False, group=8), [ATTENTION]),
    (Int(bits=3, symmetric=False), [STACK]),
    (Int(bits=8, symmetric=False, per="tensor"), [EMBEDDING]),
    (Int(bits=8, group=8, block=4), [ATTENTION, STACK]),
    (Int(bits=4, scale="power_of_two"), [CONV]),
    (Int(bits=4, group=8, scale="bfloat16"), [STACK]),
    (Int(bits=4, group=8, scale=Int(bits=8)), [KERNEL]),
    (Float("e4m3"), [STACK]),
    (MX("e4m3", group=8), [LAYERS]),
    (NVFP4(group=8), [STACK]),
    (NF4(group=8), [EMBEDDING]),
    (Table((-1.0, 0.0, 0.5)), [CONV]),
    (Ternary(), [STACK]),
    (Binary(), [KERNEL, STACK]),
    (Binary(unit=True), [ATTENTION]),
    (chain(HALF, Binary()), [KERNEL]),
    (HALF, [KERNEL]),
    (Magnitude(sparsity=0.25, structure=Block(4, 2)), [ATTENTION]),
    (Magnitude(structure=NofM(2, 4)), [CONV]),
    (Magnitude(sparsity=0.9, across_stack=True), [STACK]),
    (KMeans(bits=4), [KERNEL]),
    (KMeans(bits=2, per="channel"), [EMBEDDING]),
    (chain(HALF, Int(bits=4)), [STACK]),
    (chain(HALF, KMeans(bits=4)), [KERNEL]),
    (Input(bits=8), [KERNEL]),
    (chain(HALF, Int(bits=4), Input(bits=8)), [STACK]),
    (Input(bits=8, per="static"), [LAYERS]),
    (Normal(bits=3, group=8), [LAYERS]),
    (HQQ(bits=3), [LAYERS]),
    (GPTQ(Int(bits=3)), [FEW]),
    (AdaRound(Int(bits=3), steps=3), [FEW]),
    (AWQ(Int(bits=4), steps=3), [FEW]),
    (Hadamard(Int(bits=4)), [LAYERS]),
    (LSQ(bits=4, group=8), [LAYERS]),
    (DoReFa(bits=3), [LAYERS]),
    (BWN(), [FEW]),
    (BinaryConnect(stochastic=True), [LAYERS]),
    (LearnedInput(bits=4), [LAYERS]),
    (PACT(bits=4, start=1.0), [FEW]),
    (DoReFaInput(bits=2), [FEW]),
    (Sign(), [LAYERS]),
    (XNOR(), [LAYERS]),
    # Groups that the kernels take.
    (Int(bits=4, group=32), [WIDE, WIDE_LAYERS]),
    (chain(Int(bits=8), Input(bits=8, symmetric=False)), [WIDE, WIDE_LAYERS]),
]
# Other options of methods that have a row above, with --full.
ALIKE = [
    (MX("e2m3", group=8), [FEW]),
    (MX("e2m1", group=8), [KERNEL]),
    (chain(HALF, NF4(group=8)), [STACK]),
    (KMeans(bits=3, start="density"), [STACK]),
    (KMeans(bits=3, start="random"), [DEPTHWISE]),
    (Input(bits=4, per="tensor", symmetric=False), [CONV]),
    (LSQ(bits=3, symmetric=False), [FEW]),
    (LearnedInput(bits=4, offset=True, start=0.5), [FEW]),
    (BinaryConnect(), [FEW]),
    (Hadamard(Int(bits=4, group=32)), [((2, 32, 8), Axes(stack=1))]),
    (AWQ(NF4(group=32), steps=3), [WIDE]),
    (Int(bits=3, group=32, symmetric=False), [WIDE]),
    (Float("e5m2"), [FEW]),
    (Float("e3m2"), [DEPTHWISE]),
]
# Their docstrings say that encoding again moves the values.
MOVING = (Normal, HQQ, GPTQ, AdaRound, AWQ, Hadamard, LSQ, DoReFa)
ENCODERS = [encoder for encoder, _ in ROWS + ALIKE]


def drawn(encoder):
    draws = getattr(encoder, "start", "") == "random" or getattr(encoder, "stochastic", False)
    return jax.random.key(3) if draws or isinstance(encoder, Hadamard) else None


def moves(encoder, dtype):
    """Says whether law 2 need not hold."""
    values, _ = encoder.sides()
    steps = getattr(values, "encoders", (values,))
    return any(isinstance(e, MOVING) or (dtype != jnp.float32 and rounds(e)) for e in steps)


def rounds(encoder):
    """16-bit tensors round what a grid was made of, which then moves when encoded again."""
    if isinstance(encoder, (Binary, Ternary)) or isinstance(getattr(encoder, "scale", ""), Format):
        return True
    return not getattr(encoder, "symmetric", True)


@pytest.mark.parametrize(
    ("encoder", "shapes"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.full) for row in ALIKE)],
    ids=repr,
)
def test_laws(encoder, shapes):
    still = not moves(encoder, jnp.float32)
    narrow = still and moves(encoder, jnp.bfloat16)
    check_encoder(
        encoder,
        shapes=shapes,
        dtypes=(jnp.float32,) if narrow else (jnp.float32, jnp.bfloat16),
        idempotent=still,
        masks=not isinstance(encoder, Hadamard),
        key=drawn(encoder),
    )


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_laws_of_every_product(encoder, shape, dtype):
    check_encoder(
        encoder,
        shapes=[shape],
        dtypes=[dtype],
        idempotent=not moves(encoder, dtype),
        masks=not isinstance(encoder, Hadamard),
        key=drawn(encoder),
        full=True,
    )


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_a_sharded_tensor_is_encoded_alike(encoder, shape, dtype):
    size, axes = shape
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    w = jnp.asarray(np.random.default_rng(0).normal(size=size), dtype)
    given = {"axes": axes, "stats": random_stats(encoder, w, axes=axes), "key": drawn(encoder)}
    want = encoder(w, **given)
    split = [i for i, n in enumerate(size) if n % 8 == 0]
    assert split
    for axis in split:
        spec = PartitionSpec(*[None] * axis, "x")
        got = encoder(jax.device_put(w, NamedSharding(mesh, spec)), **given)
        assert leaf_bits(got) == leaf_bits(want), axis


@leaf
class Halved(Encoded):
    """A stranger's leaf: a float16 copy."""

    data: jax.Array
    core: tuple[int, ...] = static()
    name: str = static()

    @property
    def dtype(self):
        return jnp.dtype(self.name)

    @property
    def stack(self):
        return self.data.shape[: self.data.ndim - len(self.core)]

    def rebuild(self):
        return self.data.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Half(Encoder):
    """A stranger's encoder, sound or broken in the way that is asked for."""

    broken: str = ""

    def encode(self, w, *, axes, keep, stats, key):
        del axes, keep, stats, key
        data = w.astype(jnp.float16)
        if self.broken == "moves":
            data = data * 2
        if self.broken == "shape":
            return Halved(data, (*w.shape, 1), str(w.dtype))
        if self.broken == "dtype":
            return Halved(data, w.shape, "float16")
        return Halved(data, w.shape, str(w.dtype))


def test_a_strangers_encoder_keeps_the_laws():
    check_encoder(Half(), shapes=[KERNEL, STACK])
    check_encoder(chain(HALF, Half()), shapes=[KERNEL])


@pytest.mark.parametrize(
    ("broken", "law"), [("moves", "law 2"), ("shape", "law 1"), ("dtype", "law 1")]
)
def test_a_broken_encoder_is_found(broken, law):
    with pytest.raises(AssertionError, match=law):
        check_encoder(Half(broken), shapes=[KERNEL], dtypes=[jnp.float32])


def test_a_law_that_is_excused_is_not_checked():
    check_encoder(Half("moves"), shapes=[KERNEL], dtypes=[jnp.float32], idempotent=False)


@dataclasses.dataclass(frozen=True)
class Restless(Half):
    """Runs another program each time."""

    def run(self, w, axes, keep, stats, key):
        return jax.jit(lambda w: self.encode(w, axes=axes, keep=keep, stats=stats, key=key))(w)


def test_an_encoder_that_compiles_each_time_is_found():
    with pytest.raises(AssertionError, match="law 6"):
        check_encoder(Restless(), shapes=[KERNEL])


def test_scales_of_a_convolution_go_by_its_last_axis():
    shape, axes = CONV
    assert Int(bits=4)(jnp.ones(shape), axes=axes).scale.shape == (shape[-1], 1)
    assert Int(bits=4)(jnp.ones((8, 6)), axes=Axes.torch()).scale.shape == (8, 1)

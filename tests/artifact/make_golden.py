"""Writes the golden files of format version 1: `python tests/artifact/make_golden.py`.

They are never written again: a change of the format is a new version with files of its own.
The values come from integer formulas, so that no generator of random numbers is frozen too.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from artifact_trees import bits, masked

import jaxopt_models as jom
from jaxopt_models._encoded import is_encoded
from jaxopt_models.artifact._packing import pack_codes, pack_mask, to_jax
from jaxopt_models.codebook._clustered import Clustered
from jaxopt_models.quant._quantized import Quantized

GOLDEN = pathlib.Path(__file__).parent / "golden"
RECIPE = [
    jom.Rule("head/.*", None),
    jom.Rule(".*", jom.chain(jom.prune.Magnitude(sparsity=0.9), jom.quant.Int(bits=4))),
]


def numbers(shape, modulus, seed=1):
    """Integers below ``modulus`` that follow no simple pattern, small ones more often."""
    i = np.arange(int(np.prod(shape)), dtype=np.int64) + 7 * seed
    a, b = (i * i * 31 + i * 17) % 1009, (i * 101 + i * i * 7) % 997
    return (np.minimum(a, b) * modulus // 1009).reshape(shape)


def floats(shape, seed=1):
    """Floats of all signs, exact in `float32`."""
    return ((numbers(shape, 1009, seed) - 300) / 64).astype(np.float32)


def quantized(shape, width, *, groups=1, zero=False, stack=(), keep=1):
    codes = numbers((*stack, *shape), 1 << width, width)
    codes = (codes if zero else codes - (1 << width - 1)) * keep
    codes = codes.astype(np.uint8 if zero else np.int8)
    packed = to_jax(pack_codes(codes, shape, bits=width, signed=not zero))
    per = (*stack, shape[-1], groups)
    zero_point = to_jax(numbers(per, 1 << width, 5).astype(np.uint8)) if zero else None
    out = (len(shape) - 1,)
    return Quantized(packed, to_jax(floats(per)), zero_point, shape, out, width, "float32")


def clustered(keep, width):
    codes = numbers(keep.shape, 1 << width, width).astype(np.uint8) * keep
    packed = to_jax(pack_codes(codes, keep.shape, bits=width, signed=False))
    return masked(
        keep, Clustered(packed, to_jax(floats(1 << width)), keep.shape, (), width, "float32")
    )


def leaves():
    """Every leaf class, width, coder and layout of masks."""
    i, j = np.mgrid[:40, :30]
    rows = numbers(i.shape, 100, 2) < np.where(i % 4 == 3, 60, 4)
    small = (i + i * j)[:3, :5] % 3 < 1
    stack = np.stack([rows[:9, :11], ~rows[:9, :11]])
    return {
        "signed": [quantized((5, 7), width) for width in range(1, 9)],
        "unsigned": [quantized((6, 3), width, groups=3, zero=True) for width in range(1, 9)],
        "stacked": quantized((4, 3), 4, stack=(2, 3)),
        "lines": clustered(rows, 5),
        "gaps": clustered(numbers((12, 7), 100, 3) < 3, 4),
        "bitmap": masked(small, to_jax(np.where(small, floats((3, 5)), np.float32(0)))),
        "all": clustered(np.ones((3, 4), bool), 2),
        "none": masked(np.zeros((3, 4), bool), quantized((3, 4), 3, keep=0)),
        "pruned_stack": jom.Masked(
            to_jax(pack_mask(stack, (9, 11))),
            to_jax(np.where(stack, floats(stack.shape), np.float32(0))),
            (9, 11),
        ),
        "scalar": masked(np.array(True), to_jax(np.float32(2.5))),
    }


def values():
    """Types, containers and values that are no tensors."""
    special = np.array([0x7FC12345, 0xFF800000, 0x80000000, 1, 0x807FFFFF], np.uint32)
    return {
        "params": {
            "floats": [floats(5).astype(t) for t in ("float16", "bfloat16", "float32", "float64")],
            "special": special.view(np.float32),
            "fp8": numbers(40, 256).astype(np.uint8).view(jnp.float8_e4m3fn),
            "fp4": numbers(9, 16).astype(np.uint8).view(jnp.float4_e2m1fn),
            "complex": (floats(3) + 1j * floats(3, 2)).astype(np.complex64),
            "integers": [
                (numbers((2, 8), 200) - 100).astype(t) for t in ("int8", "int16", "int32", "int64")
            ],
            "codes": numbers(300, 16).astype(np.uint8),
            "few": np.array([0, 0, 0, 0, 1, 1, 2, 3] * 4, np.uint8),
            "small": [
                numbers(11, 2).astype(bool),
                (numbers(11, 16) - 8).astype(np.int8).astype(jnp.int4),
                numbers(11, 4).astype(np.uint8).astype(jnp.uint2),
            ],
            "empty": np.zeros((3, 0), np.float32),
            "scalar": np.float32(-0.0),
        },
        "batch_stats": {"mean": floats(3)},
        "cache": (
            jax.random.key(7),
            None,
            {3: 1, 12: -(2**63)},
            [True, 0.1, float("nan"), float("-inf"), "ä/b", {}],
        ),
    }


def equal():
    """Streams without bytes, and the padding that makes them credible."""
    return {"zeros": np.zeros(100_000, np.uint8)}


FILES = {
    "leaves": (leaves, {"recipe": RECIPE}),
    "values": (values, {}),
    "equal": (equal, {}),
    "rounded": (
        lambda: {"head": floats((4, 6)) / 3, "w": leaves()["bitmap"]},
        {"dense": "bfloat16"},
    ),
}


def describe(x):
    """What JSON can hold of a tree, exactly."""
    if is_encoded(x):
        cls = type(x)
        parts = {name: describe(getattr(x, name)) for name in cls.part_names}
        # Fields that a class was given later have a default and are in no file of version 1.
        late = {f.name for f in dataclasses.fields(x) if f.default is not dataclasses.MISSING}
        statics = {n: repr(getattr(x, n)) for n in cls.static_names if n not in late}
        return [cls.__name__, statics, parts]
    if isinstance(x, dict):
        return ["dict", [[repr(k), describe(x[k])] for k in sorted(x)]]
    if type(x) in (list, tuple):
        return [type(x).__name__, [describe(v) for v in x]]
    if x is None or type(x) in (bool, int, float, str):
        return [type(x).__name__, repr(x)]
    *kind, shape, data = bits(x)
    return [*kind, list(shape), data.hex() if any(data) else len(data)]


def expected():
    """The trees as they are read from the files."""
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(np.float32) if x.dtype == np.float32 else x,
        FILES["rounded"][0](),
    )
    found = {name: make() for name, (make, _) in FILES.items()} | {"rounded": rounded}
    return {name: describe(tree) for name, tree in found.items()}


def main(folder):
    """Writes the files and what they hold."""
    for name, (make, options) in FILES.items():
        jom.save(folder / f"v1_{name}.jom", make(), **options)
    text = json.dumps(expected(), separators=(",", ":"))
    (folder / "v1_expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)

"""Formats and ranges beside Qwix's on one matrix."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import quant

from ._rows import Row

INSTALL = "not measured: pip install qwix==0.1.8"
SHAPE = (512, 256)
# Names of number types as Qwix has them.
TYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "e2m1": jnp.float4_e2m1fn}
FORMATS = {
    "Int, 8 bits": [quant.Int(bits=8), quant.Int(bits=8, group=32)],
    "Int, 4 bits": [quant.Int(bits=4), quant.Int(bits=4, group=32)],
    "Int, 2 and 3 bits": [quant.Int(bits=b, group=g) for b in (2, 3) for g in (None, 32)],
    "Float, e4m3 and e5m2": [
        quant.Float(kind, group=g) for kind in ("e4m3", "e5m2") for g in (None, 32)
    ],
    "NF4": [quant.NF4(), quant.NF4(group=None)],
}
# Their scales go by other rules: the standard rounds the exponent down, Qwix up.
MICRO = {"MXFP8 and MXFP4": [quant.MX("e4m3"), quant.MX("e2m1")]}
LOPSIDED = [quant.Int(bits=b, symmetric=False, group=g) for b in (8, 4) for g in (None, 32)]


def installed() -> bool:
    """Whether Qwix is there."""
    return importlib.util.find_spec("qwix") is not None


def missing(claim: str, bar: str) -> Row:
    """Returns the row of what needs Qwix where it is not installed: it does not hold."""
    return Row(claim, math.nan, bar, note=INSTALL)


def matrix() -> jax.Array:
    """Returns a matrix with heavy tails."""
    return jax.random.t(jax.random.key(0), 4.0, SHAPE)


def theirs(fmt: quant.Format) -> tuple[Any, float]:
    """Returns Qwix's name of a number type, and what its scales are to be multiplied by.

    Qwix has scales of `max / (qmax + 1/2)` for integers, ours are `max / qmax`.
    """
    if isinstance(fmt, quant.Int):
        top = 2 ** (fmt.bits - 1) - 1
        kind = {8: jnp.int8, 4: jnp.int4}.get(fmt.bits, f"int{fmt.bits}")
        return kind, 1.0 if not fmt.symmetric else (top + 0.5) / top
    return ("nf4" if isinstance(fmt, quant.NF4) else TYPES[fmt.kind]), 1.0


def lowest(fmt: quant.Int) -> int:
    """Returns what is to be taken from our codes, which count from zero, to give Qwix's."""
    return 2 ** (fmt.bits - 1)


def where(fmt: quant.Format) -> dict[str, Any]:
    """Returns Qwix's options for the runs of a format."""
    tiles = {0: fmt.group} if fmt.group else {}
    return {"channelwise_axes": [1], "tiled_axes": tiles}


def apart(fmt: quant.Format) -> jax.Array:
    """Returns how far rebuilt values are from Qwix's, in scales, both given our grids."""
    import qwix
    from qwix._src.core import qarray

    w = matrix()
    small = fmt(w)
    kind, zero = theirs(fmt)[0], None
    scale = small.scale.T.astype(w.dtype)  # [groups, columns], as Qwix has it
    if not getattr(fmt, "symmetric", True):
        zero = (small.zero_point.T.astype(jnp.int32) - lowest(fmt)).astype(kind)
    other = qarray.quantize_with_scale_zero_point(w, kind, scale, zero)
    step = jnp.repeat(scale, len(w) // len(scale), axis=0)
    return jnp.abs(small.materialize() - qwix.dequantize(other)) / step


def scales(fmt: quant.Format, method: str = "absmax", times: float = 1.0) -> float:
    """Returns by how much scales differ from Qwix's at most, relative to them.

    Qwix's ranges are multiplied by ``times``, and by what makes up for its other bound.
    """
    import qwix

    kind, bound = theirs(fmt)
    how = f"{method},{times * bound!r}"
    other = qwix.quantize(matrix(), kind, calibration_method=how, **where(fmt)).scale
    ours = np.asarray(fmt(matrix()).scale, np.float64).T
    return float(np.max(np.abs(ours / np.asarray(other, np.float64) - 1)))


def zero_points(fmt: quant.Int) -> float:
    """Returns by how many codes zero points differ from Qwix's at most, whose codes are signed."""
    import qwix

    other = qwix.quantize(matrix(), theirs(fmt)[0], calibration_method="minmax", **where(fmt))
    ours = np.asarray(fmt(matrix()).zero_point, np.int64).T - lowest(fmt)
    return float(np.max(np.abs(ours - np.asarray(other.zero_point, np.int64))))


def claims() -> list[tuple[str, Callable[[], float], str, str]]:
    """Returns the rows: the claim, how it is measured, its bar, and a note."""
    symmetric = [fmt for group in FORMATS.values() for fmt in group]
    rms = [quant.Int(bits=b, observer=quant.RMS(times=3.0)) for b in (8, 4)]
    values, whole = "largest difference of values from Qwix's, in scales", "both round on our grids"
    ratio = "scales over Qwix's, largest difference from 1"
    return [
        *(
            (
                f"{name}: {values}",
                lambda g=group: max(float(apart(f).max()) for f in g),
                "<= 0",
                whole,
            )
            for name, group in {**FORMATS, **MICRO}.items()
        ),
        (
            "Int, asymmetric, 8 and 4 bits: share of values that are not Qwix's",
            lambda: max(float(jnp.mean(apart(f) > 0)) for f in LOPSIDED),
            "<= 1e-4",
            f"{whole}; halves go to the lower code in ours, to the even one in Qwix",
        ),
        (
            f"MinMax: {ratio}",
            lambda: max(map(scales, symmetric)),
            "<= 1e-6",
            "Qwix's of integers times (qmax + 1/2) / qmax",
        ),
        (
            f"RMS: {ratio}",
            lambda: max(scales(f, "rms", 3.0) for f in rms),
            "<= 1e-6",
            "Qwix's times (qmax + 1/2) / qmax",
        ),
        (
            f"MinMax, asymmetric: {ratio}",
            lambda: max(scales(f, "minmax") for f in LOPSIDED),
            "<= 3.1e-5",
            "ours are cut to 16 significant bits, 2^-15",
        ),
        (
            "MinMax, asymmetric: codes between zero points and Qwix's, at most",
            lambda: max(map(zero_points, LOPSIDED)),
            "<= 1",
            "of other scales, see above",
        ),
    ]


def rows() -> list[Row]:
    """Gives all rows."""
    return [
        Row(claim, measure(), bar, note=note) if installed() else missing(claim, bar)
        for claim, measure, bar, note in claims()
    ]

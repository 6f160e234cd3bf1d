"""Masks: exact, smaller the more structure they have, and refused where damaged."""

import dataclasses
import zlib

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_models.artifact import ArtifactError, MaskLayout, decode_mask, encode_mask
from jaxopt_models.artifact import _lines as lines

LAYOUTS = [MaskLayout.BITMAP, MaskLayout.GAPS, MaskLayout.LINES]


def read(mask, shape):
    return decode_mask(mask.layout, mask.table, mask.payload, shape)


def bernoulli_bytes(mask):
    p = mask.mean()
    return -mask.size * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) / 8


def uniform(shape=(784, 300), density=0.05, seed=0):
    return np.random.default_rng(seed).random(shape) < density


def pixels(density=0.05, seed=0):
    """A first layer on 28 x 28 pixels: empty borders, and rows and columns of any density."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28] - 13.5
    rows = np.exp(-((np.maximum(np.hypot(x, y) - 6, 0) / 4) ** 2)).ravel()
    rows = np.where(rows < 0.02, 0, rows) * rng.gamma(4, size=784)
    chance = np.outer(rows, rng.gamma(4, size=300))
    return rng.random(chance.shape) < chance * density / chance.mean()


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=12)))
@settings(deadline=None, max_examples=200)
def test_round_trip(keep):
    mask = encode_mask(keep)
    back = read(mask, keep.shape)
    assert back.dtype == np.bool_
    np.testing.assert_array_equal(back, keep)
    assert mask.nbytes <= max(1, -(-keep.size // 8))


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([0.02, 0.2, 0.5, 0.8, 0.98]),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_every_layout_round_trips(shape, density, seed):
    keep = uniform(shape, density, seed)
    for layout in LAYOUTS:
        try:
            mask = encode_mask(keep, layouts=(layout,))
        except ValueError:
            assert not 0 < keep.sum() < keep.size or layout == MaskLayout.LINES
            continue
        np.testing.assert_array_equal(read(mask, shape), keep)


@pytest.mark.parametrize(
    "keep",
    [
        uniform((3, 3, 16, 24), 0.1),
        uniform((2, 60, 50), 0.9),
        np.tile(uniform((1, 300), 0.3), (50, 1)),
        np.tile(uniform((64, 1), 0.3), (1, 70)),
        np.eye(128, dtype=bool),
        uniform((100_000,), 0.01),
        uniform((20_000, 4), 0.1),
    ],
    ids=["conv", "dense_stack", "columns", "rows", "eye", "vector", "short_lines"],
)
def test_shapes(keep):
    mask = encode_mask(keep)
    np.testing.assert_array_equal(read(mask, keep.shape), keep)
    assert mask.nbytes < 1.02 * bernoulli_bytes(keep) + 8


def test_structure_pays_and_uniform_costs_nothing():
    structured, plain = pixels(), uniform()
    best, gaps = encode_mask(structured), encode_mask(structured, layouts=(MaskLayout.GAPS,))
    assert best.layout == MaskLayout.LINES
    assert best.nbytes < 0.93 * gaps.nbytes < 0.93 * bernoulli_bytes(structured)
    assert encode_mask(plain).nbytes < 1.003 * bernoulli_bytes(plain)
    assert encode_mask(plain, layouts=(MaskLayout.LINES,)).nbytes < 1.003 * bernoulli_bytes(plain)
    assert encode_mask(plain, layouts=(MaskLayout.GAPS,)).nbytes < 1.006 * bernoulli_bytes(plain)


def test_neighbouring_lines_pay():
    """Smooth fields on a 28 x 28 grid, another for every unit: only neighbours tell."""
    field = np.random.default_rng(0).normal(size=(300, 28, 28))
    for axis in (1, 2, 1, 2):
        field = field + np.roll(field, 1, axis) + np.roll(field, -1, axis)
    chance = np.exp(1.2 * field / field.std())
    keep = uniform(field.shape, chance * 0.05 / chance.mean()).reshape(300, 784).T
    _, params = lines.tune([keep])
    assert params.lag == 28
    table, payload = lines.encode(keep, params)
    np.testing.assert_array_equal(lines.decode(table, payload, *keep.shape), keep)
    alone = lines.encode(keep, dataclasses.replace(params, lag=0))[1]
    assert len(payload) < 0.98 * len(alone)
    assert encode_mask(keep).nbytes < encode_mask(keep, layouts=(MaskLayout.GAPS,)).nbytes


def test_the_smallest_wins():
    assert encode_mask(np.ones((5, 3), bool)).nbytes == 1
    assert encode_mask(np.zeros((0, 3), bool)).layout == MaskLayout.CONSTANT
    assert encode_mask(uniform((4, 5), 0.5)).layout == MaskLayout.BITMAP
    sparse = encode_mask(uniform((1000, 1000), 1e-5, seed=3))
    assert sparse.layout == MaskLayout.GAPS and sparse.nbytes < 40
    # What is dropped is coded where that is less.
    dense = ~uniform(density=0.02)
    assert abs(encode_mask(dense).nbytes - encode_mask(~dense).nbytes) <= 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_refused_or_means_another_mask(layout):
    keep = pixels(0.1)[200:260, :40]
    mask = encode_mask(keep, layouts=(layout,))
    rng = np.random.default_rng(0)
    for k in range(200):
        table, payload = bytearray(mask.table), bytearray(mask.payload)
        hit = table if k % 2 and table else payload
        if k % 5 == 0:
            del hit[rng.integers(len(hit)) :]
        elif k % 5 == 1:
            hit += bytes(rng.integers(0, 256, 3, np.uint8))
        else:
            hit[rng.integers(len(hit))] ^= 1 << int(rng.integers(8))
        try:
            back = decode_mask(layout, bytes(table), bytes(payload), keep.shape)
        except ArtifactError:
            continue
        assert (back != keep).any()


@given(
    st.integers(0, 4),
    st.binary(max_size=30),
    st.binary(max_size=60),
    st.sampled_from([(), (0,), (5,), (20, 30), (3, 40, 40), (10**6, 10**6)]),
)
@settings(deadline=None, max_examples=300)
def test_garbage_never_raises_anything_else(layout, table, payload, shape):
    if layout == MaskLayout.CONSTANT and shape == (10**6, 10**6):
        shape = (7,)
    try:
        back = decode_mask(layout, table, payload, shape)
    except ArtifactError:
        return
    assert back.shape == shape and back.dtype == np.bool_


HUGE = (1 << 20, 1 << 20)


@pytest.mark.parametrize(
    "layout, table, payload, shape, words",
    [
        (MaskLayout.CONSTANT, b"\2", b"", (4,), "neither all nor nothing"),
        (MaskLayout.CONSTANT, b"\1", b"", (0,), "neither all nor nothing"),
        (MaskLayout.BITMAP, b"", b"\xff", HUGE, "no bitmap"),
        (MaskLayout.BITMAP, b"", b"\xff", (7,), "not zero"),
        (MaskLayout.GAPS, b"", b"", (7,), "unknown table"),
        (MaskLayout.GAPS, b"\xff", b"", (7,), "unknown table"),
        (MaskLayout.GAPS, b"\x14\1\0", b"", (7,), "unknown table"),
        (MaskLayout.GAPS, b"\1\1\0\0", b"", (7,), "other axis"),
        (MaskLayout.GAPS, b"\0\x09\0\0", b"", (8,), "claims 9 gaps"),
        (MaskLayout.GAPS, b"\0\2\0\5", b"", (8,), "keeps entry 11 of 8"),
        (MaskLayout.GAPS, b"\0\1\0\x0f", b"", (80,), "no entry"),
        (MaskLayout.GAPS, b"\0\xff\xff\xff\xff\x7f\2\x11", b"\1", HUGE, "cannot hold"),
        (MaskLayout.LINES, b"\0\0", b"", (7, 2), "not coded by lines"),
        (MaskLayout.LINES, b"\0", b"", (70, 70), "no table"),
        (MaskLayout.LINES, b"\0\3\0\5\0", b"", (70, 70), "unknown table"),
        (MaskLayout.LINES, b"\0\0\1\5\0", b"", (70, 70), "unknown table"),
        (MaskLayout.LINES, b"\0\0\0\0\1\0", b"", (70, 70), "cannot keep 0"),
        (MaskLayout.LINES, b"\0\0\0\5\1\1", b"", (70, 70), "cannot keep 5"),
        (MaskLayout.LINES, b"\0\0\0\xff\xff\xff\1\1\1", b"\1", HUGE, "cannot hold"),
        (9, b"", b"", (7,), "unknown layout 9"),
    ],
)
def test_hostile_masks(layout, table, payload, shape, words):
    with pytest.raises(ArtifactError, match=words):
        decode_mask(layout, table, payload, shape)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="must be boolean, got int64"):
        encode_mask(np.ones((2, 2), np.int64))
    with pytest.raises(ValueError, match="CONSTANT"):
        encode_mask(np.ones(4, bool), layouts=(MaskLayout.GAPS,))
    with pytest.raises(ValueError, match="allow more"):
        encode_mask(np.array([True, False]), layouts=(MaskLayout.LINES,))


@pytest.mark.parametrize(
    "layout, size, checksum",
    [(MaskLayout.GAPS, 111, 1793088660), (MaskLayout.LINES, 108, 4000747202)],
)
def test_bytes_never_change(layout, size, checksum):
    """Files written once must decode for ever, on every machine."""
    i, j = np.mgrid[:60, :50]
    mask = encode_mask((i * i + 3 * j * j) % 101 < i % 13, layouts=(layout,))
    assert (mask.nbytes, zlib.crc32(mask.table + mask.payload)) == (size, checksum)

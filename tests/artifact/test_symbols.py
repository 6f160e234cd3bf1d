"""Streams of small integers: exact, near the entropy, and refused where damaged."""

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_models.artifact import ArtifactError, Coder, Stream, decode, encode
from jaxopt_models.artifact import _huffman as huffman
from jaxopt_models.artifact import _range as ranged
from jaxopt_models.artifact._varint import read_varint, write_varint


def entropy_bytes(symbols):
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


def read(stream, count, alphabet):
    return decode(stream.coder, stream.table, stream.payload, count, alphabet)


def draw(kind, n, seed=0):
    """Streams as compressed models have them: `(symbols, alphabet)`."""
    rng = np.random.default_rng(seed)
    if kind == "codes":
        return np.clip(np.round(rng.normal(size=n) * 2.5) + 8, 0, 15).astype(int), 16
    if kind == "skewed":
        return np.minimum(rng.geometric(0.3, n) - 1, 15), 16
    if kind == "gaps":
        return np.minimum(rng.geometric(0.06, n) - 1, 255), 256
    return np.clip(np.round(rng.normal(size=n) * 20) + 128, 0, 255).astype(int), 256


@st.composite
def streams(draw):
    alphabet = draw(st.sampled_from([1, 2, 3, 5, 16, 17, 256, 257, 5000, 65536]))
    top = draw(st.integers(0, alphabet - 1))
    few = st.sampled_from(draw(st.lists(st.integers(0, top), min_size=1, max_size=4)))
    symbols = draw(st.lists(st.one_of(few, st.integers(0, top)), max_size=200))
    return np.array(symbols, np.int64), alphabet


@given(streams())
@settings(deadline=None)
def test_round_trip(case):
    symbols, alphabet = case
    stream = encode(symbols, alphabet)
    back = read(stream, len(symbols), alphabet)
    assert back.dtype == (np.uint8 if alphabet <= 256 else np.uint16)
    np.testing.assert_array_equal(back, symbols)


@pytest.mark.parametrize("coder", [Coder.PLAIN, Coder.HUFFMAN, Coder.RANGE])
@given(streams())
@settings(deadline=None, max_examples=50)
def test_every_coder_round_trips(coder, case):
    symbols, alphabet = case
    if len(np.unique(symbols)) < 2:
        symbols, alphabet = np.append(symbols % alphabet, [0, alphabet]), alphabet + 1
        if alphabet > 65536:
            return
    stream = encode(symbols, alphabet, coders=(coder,))
    assert stream.coder == coder
    np.testing.assert_array_equal(read(stream, len(symbols), alphabet), symbols)
    assert encode(symbols, alphabet).nbytes <= stream.nbytes


@pytest.mark.parametrize("kind", ["codes", "skewed", "gaps", "eight_bits"])
@pytest.mark.parametrize("n", [260, 2000, 15_000])
def test_range_coding_is_near_the_entropy_table_included(kind, n):
    symbols, alphabet = draw(kind, n)
    stream = encode(symbols, alphabet, coders=(Coder.RANGE,))
    entropy = entropy_bytes(symbols)
    assert len(stream.table) <= 8
    if alphabet == 16 or n == 15_000:
        assert stream.nbytes <= entropy * (1.05 if n == 260 else 1.02) + 8
    # The entropy of few samples of many symbols flatters itself by what its table would cost.
    learning = (np.count_nonzero(np.bincount(symbols)) - 1) / 16 * np.log2(n)
    assert stream.nbytes <= entropy + learning + 8


@pytest.mark.parametrize("kind", ["codes", "skewed", "gaps", "eight_bits"])
def test_huffman_is_within_a_bit_and_complete(kind):
    symbols, alphabet = draw(kind, 5000)
    stream = encode(symbols, alphabet, coders=(Coder.HUFFMAN,))
    assert entropy_bytes(symbols) <= len(stream.payload) < entropy_bytes(symbols) + 5000 / 8 + 1
    lengths = huffman.unpack_lengths(stream.table, alphabet)
    assert (2.0 ** -lengths[lengths > 0]).sum() == 1
    assert (lengths[np.unique(symbols)] > 0).all()


def test_huffman_lengths_are_optimal_and_limited():
    # 2^-k probabilities: the code is the entropy itself.
    counts = np.array([8, 4, 2, 1, 1])
    assert huffman.code_lengths(counts).tolist() == [1, 2, 3, 4, 4]
    # Fibonacci counts want lengths up to 29.
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = huffman.code_lengths(np.array(counts))
    assert lengths.max() == 15 and (2.0**-lengths).sum() == 1
    assert (np.diff(lengths) <= 0).all()
    assert huffman.code_lengths(np.ones(1 << 15, int)).tolist() == [15] * (1 << 15)


def test_the_smallest_wins():
    rng = np.random.default_rng(0)
    assert encode(np.full(1000, 7), 16) == Stream(Coder.CONSTANT, b"\7", b"")
    assert encode(np.zeros(0, int), 16) == Stream(Coder.CONSTANT, b"", b"")
    assert encode(rng.integers(0, 256, 3000), 256).coder == Coder.PLAIN
    assert encode(draw("codes", 3000)[0], 16).coder == Coder.RANGE
    assert encode(np.array([0, 1, 2, 3, 0, 0, 0, 0]), 4).nbytes == 2


@given(st.integers(0, 40), st.integers(0, 2**32 - 1), st.integers(2, 300))
@settings(deadline=None)
def test_the_end_of_range_coding_is_as_short_as_it_can_be(n, seed, alphabet):
    symbols = np.random.default_rng(seed).integers(0, alphabet, n + 1).astype(np.int32)
    prior = ranged.Prior(alphabet, 0)
    payload = ranged.encode(symbols, prior)
    np.testing.assert_array_equal(ranged.decode(payload, prior, len(symbols)), symbols)
    assert len(payload) <= np.ceil(ranged.cost(symbols, prior, alphabet) + 1)


def test_carries_travel_through_the_end():
    """Extreme symbols hold the interval at the edge of a word for long."""
    for value in (0, 1):
        for n in range(1, 600, 7):
            symbols = np.full(n, value, np.int32)
            symbols[-1] = 1 - value
            prior = ranged.Prior(2, 0)
            payload = ranged.encode(symbols, prior)
            np.testing.assert_array_equal(ranged.decode(payload, prior, n), symbols)


@pytest.mark.parametrize("coder", [Coder.PLAIN, Coder.HUFFMAN, Coder.RANGE])
def test_damage_is_refused_or_means_another_stream(coder):
    """Coding is one to one: whatever is accepted encodes to the very bytes that came."""
    symbols, alphabet = draw("skewed", 300)
    stream = encode(symbols, alphabet, coders=(coder,))
    rng = np.random.default_rng(0)
    for _ in range(300):
        payload = bytearray(stream.payload)
        change = rng.integers(4)
        if change == 0:
            payload[rng.integers(len(payload))] ^= 1 << int(rng.integers(8))
        elif change == 1:
            del payload[rng.integers(len(payload)) :]
        elif change == 2:
            payload += bytes(rng.integers(0, 256, rng.integers(1, 9), np.uint8))
        else:
            payload += bytes(rng.integers(1, 9))
        try:
            back = decode(coder, stream.table, bytes(payload), 300, alphabet)
        except ArtifactError:
            continue
        assert change < 3
        if coder == Coder.RANGE:
            prior = ranged.Prior.parse(stream.table, alphabet)
            assert ranged.encode(back.astype(np.int32), prior) == payload
        elif coder == Coder.HUFFMAN:
            lengths = huffman.unpack_lengths(stream.table, alphabet)
            assert huffman.encode(back, lengths) == payload
        else:
            assert encode(back, alphabet, coders=(coder,)).payload == payload


@given(
    st.integers(0, 5),
    st.binary(max_size=20),
    st.binary(max_size=60),
    st.integers(-1, 10**15),
    st.sampled_from([0, 1, 2, 16, 256, 70_000]),
)
@settings(deadline=None, max_examples=300)
def test_garbage_never_raises_anything_else(coder, table, payload, count, alphabet):
    if coder == Coder.CONSTANT:
        # The owner of a constant bounds its count.
        count = min(count, 1000)
    try:
        back = decode(coder, table, payload, count, alphabet)
    except ArtifactError:
        return
    assert back.shape == (count,) and (back < alphabet).all()


@pytest.mark.parametrize(
    "coder, table, payload, count, alphabet, words",
    [
        (Coder.PLAIN, b"", bytes(8), 10**12, 16, "do not hold"),
        (Coder.HUFFMAN, b"\x11", bytes(8), 10**12, 16, "cannot hold"),
        (Coder.RANGE, b"\0", bytes(7) + b"\1", 10**12, 16, "cannot hold"),
        (Coder.PLAIN, b"", b"\xff", 2, 10, "beyond its alphabet"),
        (Coder.PLAIN, b"", b"\x10\x01", 3, 16, "not zero"),
        (Coder.PLAIN, b"\0", b"\x10", 2, 16, "has a table"),
        (Coder.HUFFMAN, b"\x12", b"\0", 2, 16, "no complete code"),
        (Coder.HUFFMAN, b"\x11\x10", b"\0", 2, 16, "no complete code"),
        (Coder.HUFFMAN, b"\x11", b"\x01", 2, 16, "not zero"),
        (Coder.HUFFMAN, b"\x11", b"\x00\x00", 2, 16, "left after"),
        (Coder.HUFFMAN, b"\x11\x00", b"\x00", 2, 16, "wrong symbols"),
        (Coder.HUFFMAN, b"\x00\x11", b"\x00", 2, 3, "wrong symbols"),
        (Coder.HUFFMAN, b"", b"\x00", 2, 16, "wrong symbols"),
        (Coder.RANGE, b"", b"\1", 2, 16, "no table"),
        (Coder.RANGE, b"\7\0\0", b"\1", 2, 16, "unknown table"),
        (Coder.RANGE, b"\3", b"\1", 2, 16, "ends early"),
        (Coder.RANGE, b"\x08\x80", b"\1", 2, 16, "inside a number"),
        (Coder.RANGE, b"\x08\x85\x00", b"\1", 2, 16, "shortest form"),
        (Coder.RANGE, b"\x08\x11", b"\1", 2, 16, "covers 17 symbols"),
        (Coder.RANGE, b"\3\0\x20", b"\1", 2, 16, "unknown table"),
        (Coder.RANGE, b"\0", b"\1\0", 2, 16, "zero byte"),
        (Coder.CONSTANT, b"\x10", b"", 2, 16, "no symbol"),
        (Coder.CONSTANT, b"", b"", 2, 16, "inside a number"),
        (Coder.CONSTANT, b"\1", b"", 0, 16, "empty stream"),
        (Coder.CONSTANT, b"\1", b"\1", 1, 16, "payload"),
        (Coder.PLAIN, b"", b"", 0, 16, "without a choice"),
        (7, b"", b"", 1, 16, "unknown coder 7"),
        (Coder.PLAIN, b"", b"", 1, 65_537, "alphabet of 65537"),
        (Coder.PLAIN, b"", b"", -1, 16, "-1 symbols"),
    ],
)
def test_hostile_streams(coder, table, payload, count, alphabet, words):
    with pytest.raises(ArtifactError, match=words):
        decode(coder, table, payload, count, alphabet)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="must be integers, got float64"):
        encode(np.ones(3), 16)
    with pytest.raises(ValueError, match=r"in \[0, 16\), got 3 to 16"):
        encode([3, 16], 16)
    with pytest.raises(ValueError, match="alphabet must be"):
        encode([0], 1 << 17)
    with pytest.raises(ValueError, match="allow more coders"):
        encode([0, 1], 2, coders=(Coder.CONSTANT,))


@pytest.mark.parametrize("kind", ["codes", "eight_bits"])
@pytest.mark.parametrize("coder", [Coder.PLAIN, Coder.HUFFMAN, Coder.RANGE])
def test_large_streams(kind, coder):
    symbols, alphabet = draw(kind, 300_000)
    stream = encode(symbols, alphabet, coders=(coder,))
    np.testing.assert_array_equal(read(stream, len(symbols), alphabet), symbols)
    with pytest.raises(ArtifactError):
        decode(coder, stream.table, stream.payload + b"\1", len(symbols), alphabet)
    if coder == Coder.RANGE:
        assert stream.nbytes < 1.002 * entropy_bytes(symbols)


@given(st.integers(0, 2**63 - 1))
def test_varints(value):
    data = write_varint(value)
    assert read_varint(data) == (value, len(data))
    with pytest.raises(ArtifactError):
        read_varint(data[:-1])


def test_varints_end():
    with pytest.raises(ArtifactError, match="63 bits"):
        read_varint(b"\xff" * 9 + b"\1")
    with pytest.raises(ValueError, match="got -1"):
        write_varint(-1)


@pytest.mark.parametrize(
    "coder, size, checksum",
    [
        (Coder.PLAIN, 625, 2361024940),
        (Coder.HUFFMAN, 464, 663612479),
        (Coder.RANGE, 454, 4088459434),
    ],
)
def test_bytes_never_change(coder, size, checksum):
    """Files written once must decode for ever, on every machine."""
    i = np.arange(1000)
    stream = encode(np.minimum(i * i % 1009 % 37 * (i % 3), 31), 32, coders=(coder,))
    assert (stream.nbytes, zlib.crc32(stream.table + stream.payload)) == (size, checksum)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 70_001])
def test_plain_alone(width, count):
    symbols = np.random.default_rng(count).integers(0, 1 << width, count, np.uint8)
    stream = encode(symbols, 1 << width, coders=(Coder.PLAIN,))
    bits = (symbols[:, None] >> np.arange(width)[::-1]) & 1
    assert stream.payload == np.packbits(bits.reshape(-1)).tobytes() and not stream.table
    again = decode(stream.coder, stream.table, stream.payload, count, 1 << width)
    np.testing.assert_array_equal(again, symbols)

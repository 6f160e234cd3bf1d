"""Damaged and hostile files: refused, or what was saved, and never a crash, a hang or a bomb.

Half of the corruptions hit the bytes of a file; the other half is given right lengths and
checksums afterwards, so that the parser and the decoders themselves are hit.
"""

import collections
import copy
import gc
import time
import tracemalloc
import warnings
import zlib

import jax
import msgpack
import numpy as np
import pytest
from artifact_trees import (
    Scaled,
    assert_same,
    lenet,
    mixed,
    put_together,
    seal,
    stranger,
    take_apart,
    tiny,
)

import jaxopt_models as jom
from jaxopt_models._encoded import is_encoded
from jaxopt_models.artifact import ArtifactError, inspect, load_recipe
from jaxopt_models.artifact._container import DICTIONARY, most_inflated
from jaxopt_models.artifact._describe import check
from jaxopt_models.artifact._open import known_classes

MAKERS = {"lenet": lenet, "mixed": mixed, "tiny": tiny, "stranger": stranger}
SECONDS = 5
# What a handful of Python objects may take where the honest file takes next to nothing.
SMALL = 64 << 10
EDGES = [0, 1, 2, -1, 7, 8, 9, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63)]


def flip(rng, data, _):
    for _ in range(rng.integers(1, 9)):
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def truncate(rng, data, _):
    a, b = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    [lambda: data.__delitem__(slice(a, None)), lambda: data.__delitem__(slice(a, b))][
        rng.integers(2)
    ]()


def splice(rng, data, other):
    n = int(rng.integers(1, 1 + min(len(data), len(other), 1 << int(rng.integers(1, 14)))))
    at, source = int(rng.integers(len(data) + 1)), int(rng.integers(len(other) - n + 1))
    data[at : at + n * int(rng.integers(2))] = other[source : source + n]


def zero(rng, data, _):
    a = int(rng.integers(len(data)))
    b = min(len(data), a + int(rng.integers(1, 200)))
    data[a:b] = bytes(b - a) if rng.integers(2) else b"\xff" * (b - a)


def noise(rng, data, _):
    a = int(rng.integers(len(data)))
    b = min(len(data), a + int(rng.integers(1, 30)))
    data[a:b] = rng.integers(0, 256, b - a, np.uint8).tobytes()


RAW = [flip, truncate, splice, zero, noise]


def raw(rng, data, other):
    """Any change of the bytes of a file."""
    out = bytearray(data)
    while bytes(out) == data:
        RAW[rng.integers(len(RAW))](rng, out, other)
        if not out:
            break
    return bytes(out)


def places(node):
    """All places of a tree of lists and dicts."""
    keys = range(len(node)) if isinstance(node, list) else list(node)
    for key in keys:
        yield node, key
        if isinstance(node[key], (list, dict)) and node[key]:
            yield from places(node[key])


def value(rng, old, tree):
    """Something that could stand in the place of ``old``."""
    kind = rng.integers(11)
    if isinstance(old, int) and kind < 6:
        near = [old + 1, old - 1, 2 * old, old // 2, old ^ (1 << int(rng.integers(20))), -old]
        return [*near, *EDGES][rng.integers(len(near) + len(EDGES))]
    if kind < 7:
        all_places = list(places(tree))
        node, key = all_places[rng.integers(len(all_places))]
        return copy.deepcopy(node[key])
    if isinstance(old, list) and old and kind < 10:
        i = int(rng.integers(len(old)))
        return [old[:i] + old[i + 1 :], [*old, old[i]], old[::-1], [old], old * 1000][
            rng.integers(5)
        ]
    deep = [[]]
    for _ in range(200):
        deep = [deep]
    words = [
        "",
        "float64",
        "float32",
        "complex128",
        "bfloat16",
        "Masked",
        "Quantized",
        "x" * 10_000,
    ]
    others = [None, True, False, 1.5, b"", b"abcdefgh", {}, {"a": 0}, [], deep, *words, *EDGES]
    return others[rng.integers(len(others))]


def body(rng, meta, descriptions, bodies):
    """Changes the streams of a section, mostly without changing how long they are."""
    i = int(rng.integers(len(bodies)))
    if bodies[i]:
        change = [flip, zero, noise, flip, noise, splice, truncate][rng.integers(7)]
        change(rng, bodies[i], bodies[rng.integers(len(bodies))] or b"\0")


def index(rng, meta, descriptions, bodies):
    """Changes anything that the index says."""
    tree = [meta, descriptions]
    all_places = [p for p in places(tree) if p[0] is not tree]
    node, key = all_places[rng.integers(len(all_places))]
    if isinstance(node, dict) and not rng.integers(4):
        node[str(value(rng, key, tree))[:3000]] = node.pop(key)
    else:
        node[key] = value(rng, node[key], tree)


def coder(rng, meta, descriptions, bodies):
    """Names another coder or layout, or moves the border between two streams."""
    lists = [
        node
        for node, key in places(descriptions)
        if isinstance(node, list) and key == 0 and node[0] in (0, 2, 3) and len(node) >= 5
    ]
    if not lists:
        return
    node = lists[rng.integers(len(lists))]
    if rng.integers(2) and isinstance(node[-3], int):
        node[-3] = int(rng.integers(0, 5))
    elif isinstance(node[-1], int) and isinstance(node[-2], int):
        move = int(rng.integers(-3, 4))
        node[-1], node[-2] = node[-1] + move, node[-2] - move


def swap(rng, meta, descriptions, bodies):
    """Exchanges sections or their descriptions."""
    i, j = rng.integers(len(bodies), size=2).tolist()
    both = [descriptions, bodies][rng.integers(2)]
    both[i], both[j] = both[j], both[i]


def forged(rng, data, other):
    """Changes with right lengths and checksums; a third of them also counts its entries right."""
    meta, descriptions, bodies = take_apart(data)
    if not rng.integers(12):
        plain = bytearray(
            msgpack.packb(
                [meta, [[len(b), bytes(4), d] for b, d in zip(bodies, descriptions, strict=True)]]
            )
        )
        RAW[rng.integers(len(RAW))](rng, plain, other)
        return seal(bytes(plain), b"".join(bodies))
    for _ in range(rng.integers(1, 4)):
        [body, index, index, coder, swap][rng.choice(5, p=[0.4, 0.25, 0.1, 0.2, 0.05])](
            rng, meta, descriptions, bodies
        )
    if not rng.integers(3) and isinstance(meta, list) and len(meta) == 4:
        try:
            counted = sum(check(d, known_classes([Scaled])).entries for d in descriptions if d)
        except ArtifactError:
            counted = meta[3]
        meta[3] = counted if counted < 1 << 63 else 0
    try:
        return put_together(meta, descriptions, bodies)
    except (OverflowError, ValueError, TypeError):
        return forged(rng, data, other)


def index_length(data):
    """Bytes of the index when inflated; 0 where there is none."""
    inflate = zlib.decompressobj(-15, DICTIONARY)
    length = int.from_bytes(data[-8:-4], "little")
    try:
        return len(inflate.decompress(data[-8 - length : -8], most_inflated(length)))
    except (zlib.error, OverflowError):
        return 0


def claimed_entries(data):
    with jom.artifact.Reader(data) as reader:
        return reader.meta[3]


def peak_of(path):
    """Loads a file: the tree or the error, seconds, and the peak of memory."""
    gc.collect(0)
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.monotonic()
    try:
        result = jom.load(path, types=[Scaled])
    except ArtifactError as e:
        result = ArtifactError(str(e))
    return result, time.monotonic() - start, tracemalloc.get_traced_memory()[1] - before


def assert_well_formed(tree):
    """All leaves stand for tensors of the shapes and types they state."""
    for x in jax.tree.leaves(tree, is_leaf=is_encoded):
        if is_encoded(x):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # float64 where JAX has none
                seen = jax.eval_shape(type(x).materialize, x)
            assert tuple(seen.shape) == tuple(x.shape)
            assert seen.dtype == jax.dtypes.canonicalize_dtype(x.dtype)


class Corruptions:
    """Saves the four files and judges corruptions of them."""

    def __init__(self, folder):
        self.path = folder / "hostile.jom"
        self.trees = {name: make() for name, make in MAKERS.items()}
        self.data, self.peak, self.entries = {}, {}, {}
        self.counts = collections.Counter()
        self.worst, self.slowest = 0.0, 0.0
        tracemalloc.start()
        for name, tree in self.trees.items():
            jom.save(self.path, tree, recipe=[jom.Rule(".*", jom.quant.Int(bits=4))])
            self.data[name] = self.path.read_bytes()
            self.entries[name] = claimed_entries(self.data[name])
            jom.load(self.path, types=[Scaled])
            self.peak[name] = min(self.cold_peak() for _ in range(3))

    def cold_peak(self):
        """Other shapes are traced anew, where a stranger's class is asked what it makes of them."""
        jax.clear_caches()
        return peak_of(self.path)[2]

    def judge(self, seed):
        rng = np.random.default_rng(seed)
        names = list(self.trees)
        name, other = names[rng.integers(4)], names[rng.integers(4)]
        honest = seed % 2 == 0
        data = (raw if honest else forged)(rng, self.data[name], self.data[other])
        self.path.write_bytes(data)
        result, seconds, peak = peak_of(self.path)
        if peak > 2 * max(self.peak[name], SMALL):
            # What JAX and Python happen to allocate in a run is no need of the file: the
            # smallest of three runs counts, as for the honest file.
            peak = min(peak, *(peak_of(self.path)[2] for _ in range(2)))
        refused = isinstance(result, ArtifactError)
        # An index that really is longer makes more Python objects, of 56 bytes at most.
        longer = max(0, index_length(data) - index_length(self.data[name]))
        ratio = (peak - 64 * longer) / max(self.peak[name], SMALL)
        if not refused and not honest and claimed_entries(data) > self.entries[name]:
            # A file that says consistently that it is larger may take more.
            ratio *= self.entries[name] / claimed_entries(data)
        self.worst, self.slowest = max(self.worst, ratio), max(self.slowest, seconds)
        assert ratio <= 2, (seed, name, peak, self.peak[name], result if refused else "")
        assert seconds < SECONDS, (seed, name, seconds)
        if not refused:
            if honest:
                assert_same(result, self.trees[name])
            else:
                assert_well_formed(result)
        for call in (lambda: inspect(self.path, types=[Scaled]), lambda: load_recipe(self.path)):
            try:
                call()
            except ArtifactError:
                assert refused or not honest
        self.counts["raw" if honest else "forged", "refused" if refused else "read"] += 1


@pytest.fixture(scope="module")
def corruptions(tmp_path_factory):
    judge = Corruptions(tmp_path_factory.mktemp("corruption"))
    yield judge
    tracemalloc.stop()
    print(dict(judge.counts), f"memory {judge.worst:.3f}, slowest {judge.slowest:.2f} s")


@pytest.mark.parametrize("part", range(10))
def test_corruptions(corruptions, part):
    for seed in range(30 * part, 30 * part + 30):
        corruptions.judge(seed)


@pytest.mark.full
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_corruptions(corruptions, part):
    for seed in range(1000 + 500 * part, 1500 + 500 * part):
        corruptions.judge(seed)

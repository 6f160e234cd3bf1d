"""What a file says of itself: bytes that add up, coders, recipes, and a lean container."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
from artifact_trees import (
    assert_same,
    clustered,
    lenet,
    mixed,
    quantized,
    tiny,
)

import jaxopt_models as jom
from jaxopt_models.artifact import Coder, inspect, load_recipe
from jaxopt_models.artifact._symbols import encode


@pytest.mark.parametrize("make", [lenet, mixed, tiny])
def test_the_parts_sum_to_the_file(tmp_path, make):
    path = tmp_path / "a.jom"
    n = jom.save(path, make())
    table = inspect(path)
    assert sum(row["bytes"] for row in table.rows) == n == os.path.getsize(path)
    assert sum(table.data["bytes_by_part"].values()) == table.data["file_bytes"] == n
    assert table.data["ratio"] == 4 * table.data["parameters"] / n
    assert str(n) in str(table).replace(",", "")


def test_what_inspect_says(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, lenet())
    table = inspect(path)
    assert table.data["parameters"] == 266_610
    rows = {(row["path"], row["part"]): row for row in table.rows}
    index = rows["ip1/kernel", "index"]
    assert (index["kind"], index["shape"], index["coder"]) == (
        "Masked(Clustered)",
        [784, 300],
        "lines",
    )
    assert {rows[f"ip{i}/kernel", "codes"]["coder"] for i in (1, 2)} == {"range"}
    assert (rows["ip1/bias", "scale"]["coder"], rows["ip1/bias", "scale"]["bytes"]) == (
        "float32",
        4,
    )
    jom.save(path, mixed())
    # Integers, keys and counts are no parameters.
    dense = 13 * 17 + 40 + 9
    assert inspect(path).data["parameters"] == 64 * 24 + 3 * 16 * 12 + 600 + dense


def test_the_stated_coder_is_the_smallest(tmp_path):
    """Streams by their symbols: what inspect states is the best of all coders."""
    rng = np.random.default_rng(1)
    streams = {
        "same": np.full(500, 3),
        "flat": rng.integers(0, 256, 4000),
        "skewed": np.minimum(rng.geometric(0.3, 4000) - 1, 255),
        "short": np.array([0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0, 1]),
    }
    path = tmp_path / "a.jom"
    jom.save(path, {k: v.astype(np.uint8) for k, v in streams.items()})
    stated: dict[str, tuple[str, int]] = {}
    for row in inspect(path).rows:
        if row["kind"] == "dense":
            before = stated.get(row["path"], ("", 0))[1]
            stated[row["path"]] = row["coder"], before + row["bytes"]
    for name, symbols in streams.items():
        fits = []
        for coder in Coder:
            try:
                s = encode(symbols, 256, coders=(coder,))
            except ValueError:
                continue
            fits.append((s.nbytes, s.coder.name.lower()))
        assert stated[name] == min(fits)[::-1]
    assert {c for c, _ in stated.values()} >= {"constant", "plain", "range"}


RECIPE = [
    jom.Rule("ip3/kernel", jom.chain(jom.prune.Magnitude(0.8), jom.codebook.KMeans(bits=5))),
    jom.Rule(".*/kernel", jom.chain(jom.prune.Magnitude(0.937), jom.codebook.KMeans(bits=5))),
    jom.Rule(".*/bias", jom.quant.Int(bits=8, per="tensor")),
]


def lenet5():
    rng = np.random.default_rng(0)
    shapes = {"conv1": (5, 5, 1, 20), "conv2": (5, 5, 20, 50), "ip1": (800, 500), "ip2": (500, 10)}
    return {
        k: {"kernel": clustered(rng, s, 0.1, 5), "bias": quantized(rng, s[-1:], 8, out=())}
        for k, s in shapes.items()
    }


def transformer(layers=12):
    """100 tensors as transformers have them."""
    rng = np.random.default_rng(0)
    tree = {"wte": quantized(rng, (100, 16), 8), "wpe": jnp.ones((8, 16)), "ln_f": jnp.ones(16)}
    tree["lm_head"] = quantized(rng, (16, 100), 4)
    for i in range(layers):
        tree[f"block_{i}"] = {
            "attention": {
                k: {"kernel": quantized(rng, (16, 16), 4)} for k in ("query", "key", "value", "out")
            },
            "mlp": {
                "up": {"kernel": quantized(rng, (16, 64), 4)},
                "down": {"kernel": quantized(rng, (64, 16), 4)},
            },
            "ln_1": {"scale": jnp.ones(16)},
            "ln_2": {"scale": jnp.ones(16)},
        }
    return tree


def linen(tree):
    return {"params": tree, "batch_stats": {"norm": {"mean": jnp.zeros(3)}}}


@pytest.mark.parametrize(
    "make, most",
    [
        (lenet, 160 + 24 * 6),
        (lenet5, 160 + 24 * 8),
        (lambda: linen(lenet()), 160 + 24 * 7),
        (transformer, 160 + 24 * 100),
    ],
    ids=["lenet300", "lenet5", "linen", "transformer"],
)
def test_the_container_is_lean(tmp_path, make, most):
    jom.save(tmp_path / "a.jom", make(), recipe=RECIPE)
    assert inspect(tmp_path / "a.jom").data["container_bytes"] <= most


def test_recipes_come_back(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, lenet(), recipe=RECIPE)
    assert load_recipe(path) == RECIPE
    jom.save(path, tiny())
    assert load_recipe(path) is None


def test_the_same_tree_gives_the_same_bytes(tmp_path):
    a, b = tmp_path / "a.jom", tmp_path / "b.jom"
    tree = mixed()
    jom.save(a, tree, recipe=RECIPE)
    jom.save(b, dict(reversed(tree.items())), recipe=RECIPE)
    assert a.read_bytes() == b.read_bytes()
    jom.save(b, jom.load(a), recipe=load_recipe(a))
    assert a.read_bytes() == b.read_bytes()


def test_equal_codes_are_padded(tmp_path):
    """A tensor of nothing costs a byte for every 4096 entries, or it could not be believed."""
    path = tmp_path / "a.jom"
    tree = {"w": np.zeros((4096, 512), np.uint8)}
    n = jom.save(path, tree)
    assert 512 <= n < 700
    assert inspect(path).data["bytes_by_part"]["padding"] == 511
    assert_same(jom.load(path), {"w": jnp.asarray(tree["w"])})

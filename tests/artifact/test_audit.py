"""Every stream of a file against the entropy of its symbols."""

import numpy as np
from artifact_trees import lenet, mixed

import jaxopt_models as jom
from jaxopt_models.artifact import Coder, MaskLayout, audit, encode, inspect


def learning(row):
    """Bytes that learning the frequencies takes: half a logarithm for each symbol."""
    return (row["distinct"] - 1) / 16 * np.log2(max(2, row["symbols"]))


def streams():
    """Codes of several widths and shapes of their distribution, as a file holds them."""
    rng = np.random.default_rng(0)
    few = np.array([0, 0, 0, 0, 1, 1, 2, 3] * 4, np.uint8)
    tree = {"huffman": few}
    for n in (260, 3000, 20_000):
        tree[f"codes_{n}"] = np.clip(np.round(rng.normal(size=n) * 2.5) + 8, 0, 15).astype(np.uint8)
        tree[f"skewed_{n}"] = np.minimum(rng.geometric(0.3, n) - 1, 15).astype(np.uint8)
    return tree


def check(path):
    rows = audit(path)
    for row in rows:
        coder = row["coder"].removeprefix("gaps:")
        slack = 1.05 if row["symbols"] <= 300 else 1.02
        bound = slack * row["entropy_bytes"] + 8
        if coder == "huffman":
            payload = row["bytes"] - row["table_bytes"]
            assert row["kraft"] == 1
            assert row["entropy_bytes"] <= payload < row["entropy_bytes"] + row["symbols"] / 8 + 1
        elif coder == "range":
            # Of many symbols that occur seldom, the entropy says too little.
            assert row["bytes"] <= bound + (learning(row) if row["distinct"] > 32 else 0), row
        elif coder == "lines":
            assert row["bytes"] <= 1.003 * row["entropy_bytes"] + 8, row
        elif coder == "constant":
            assert row["distinct"] <= 1
        else:
            assert row["bytes"] <= row["symbols"], row
    return rows


def test_streams_of_codes(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, streams())
    rows = check(path)
    assert len(rows) == 7 and {row["coder"] for row in rows} >= {"huffman", "range"}
    for row in rows:
        symbols = streams()[row["path"]]
        assert row["symbols"] == len(symbols) and row["distinct"] == len(np.unique(symbols))
        assert row["bytes"] == encode(symbols, 256).nbytes


def test_whole_models(tmp_path):
    path = tmp_path / "a.jom"
    for tree in (lenet(), mixed()):
        jom.save(path, tree)
        rows = check(path)
        names = {c.name.lower() for c in (*Coder, *MaskLayout)}
        stated = sum(row["bytes"] for row in inspect(path) if row["coder"] in names)
        assert sum(row["bytes"] for row in rows) == stated
    jom.save(path, lenet())
    rows = {(row["path"], row["part"]): row for row in audit(path)}
    assert rows["ip1/kernel", "index"]["coder"] == "lines"
    assert rows["ip1/kernel", "index"]["symbols"] == 784 * 300
    assert rows["ip3/kernel", "index"]["coder"].startswith("gaps:")

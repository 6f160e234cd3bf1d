"""Programs for a TPU v5e and an H100, neither present: no dense weight is ever written.

They are compiled in child processes by a Python that has the extra ``aot``, in an environment of
its own: ``JAXOPT_MODELS_AOT_PYTHON=/path/to/python python -m pytest tests/kernels/test_aot.py``.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

if not os.environ.get("JAXOPT_MODELS_AOT_PYTHON"):
    pytest.skip(
        "JAXOPT_MODELS_AOT_PYTHON names no Python with the extra 'aot'", allow_module_level=True
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of the benchmark, by their claims."""
    file = tmp_path_factory.mktemp("aot") / "aot.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "aot", "--quick", "--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {row["claim"]: row for row in json.loads(file.read_text())["rows"]}


V5E = [
    *("int8", "int4", "int4 in groups of 128", "int4 in groups of 32, zero points"),
    *("int2", "fp8", "NF4", "codebook of 16"),
]
AFTER = ["int8", "int4", "fp8"]
PLACE = [
    *("int8 in groups of 128", "int4 in groups of 128", "int4 in groups of 32, zero points"),
    *("int3 in groups of 32", "int2", "NF4", "codebook of 16", "codebook of 256"),
]


@pytest.mark.parametrize(
    ("device", "leaf"), [("v5e", n) for n in V5E] + [("H100", n) for n in AFTER + PLACE]
)
def test_codes_are_read_inside_the_product(rows, device, leaf):
    assert rows[f"{device}, {leaf}: MiB of dense temporaries"]["value"] == 0
    over = rows[f"{device}, {leaf}: arguments over what codes, scales and input take"]
    assert over["value"] <= 1.01


@pytest.mark.parametrize("leaf", ["int8", "int4"])
def test_neither_is_the_gradient_dense_and_a_rebuilt_weight_would_be_seen(rows, leaf):
    for device in ("v5e", "H100"):
        assert rows[f"{device}, {leaf}, gradient by x: MiB of dense temporaries"]["value"] == 0
    assert rows[f"H100, {leaf}, rebuilt: MiB of dense temporaries"]["value"] >= 32


def test_kernels_are_those_that_are_named(rows):
    for names, kernel in ((AFTER, "scales after the product"), (PLACE, "codes in place")):
        for leaf in names:
            assert kernel in rows[f"H100, {leaf}: MiB of dense temporaries"]["note"]

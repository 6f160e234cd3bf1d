"""What a newcomer meets first: the import, the README's first block, the examples."""

import contextlib
import io
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jaxopt_models as jom

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_import_starts_no_backend_and_brings_no_framework():
    # A platform that does not exist would fail as soon as a backend is asked for.
    code = (
        "import sys, jaxopt_models as jom\n"
        "heavy = {'flax', 'orbax.checkpoint', 'matplotlib', 'jaxopt_models.data'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert set(dir(jom)) >= {'compress', 'data', 'models', 'deep_compression', 'testing'}\n"
    )
    env = os.environ | {"JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_every_public_name_is_documented():
    for name in dir(jom):
        if not name.startswith("_"):
            assert (getattr(jom, name).__doc__ or "").strip(), name


def test_first_block_is_short_and_ends_in_numbers(tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 15
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, "README.md", "exec"), {})
    pattern = r"(\S+)x smaller, logits \(1, 10\)"
    said, printed = (re.search(pattern, t).group(1) for t in (block[-60:], out.getvalue()))
    # A rounding elsewhere may move the file by a few bytes.
    assert abs(float(printed) - float(said)) < 0.3
    assert not re.search(r"^[A-Z_]{4,}$", README, re.M), "a placeholder is left"


def test_block_of_many_devices(tmp_path, monkeypatch):
    names = {}
    monkeypatch.chdir(tmp_path)
    for start in ("import jax, jax.numpy", "from jax.sharding import AxisType"):
        block = re.search(rf"```python\n({start}.*?)```", README, re.S).group(1)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, "README.md", "exec"), names)
    assert "kernel" in out.getvalue() and names["logits"].shape == (8, 10)
    where = names["small"]["ip1"]["kernel"].codes.sharding
    assert where.mesh == names["mesh"] and not where.is_fully_replicated


def test_examples_run(capsys):
    for path in sorted((ROOT / "examples").glob("*.py")):
        runpy.run_path(str(path), run_name="__main__")
    assert "bits" in capsys.readouterr().out


def test_the_laws_hold_without_assertions():
    code = (
        "import dataclasses, jaxopt_models as jom\n"
        "from jaxopt_models import quant\n"
        "class Wrong(quant.Int):\n"
        "    def encode(self, w, **kwargs):\n"
        "        return super().encode(w + 1, **kwargs)\n"
        "try:\n"
        "    jom.testing.check_encoder(Wrong(bits=4), shapes=jom.testing.SHAPES[:1])\n"
        "except AssertionError as e:\n"
        "    print('law 2' in str(e))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-O", "-c", code]
    child = subprocess.run(command, env=env, capture_output=True, text=True)
    assert child.stdout.strip() == "True", child.stderr

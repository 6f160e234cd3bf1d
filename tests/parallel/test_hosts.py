"""Real processes on one machine: what they compute, and what happens when one is lost."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_stream import normal, write

import jaxopt_models as jom
from jaxopt_models import parallel, quant
from jaxopt_models._recipe import Rule
from jaxopt_models.parallel import _hosts

WORK = pathlib.Path(__file__).with_name("host_work.py")
ALL = ("calibrate", "gptq", "distill", "shard", "stream")


def run(count, folder, *, work=ALL, **more):
    """Runs processes to their ends; returns exit codes, what they printed, and the seconds."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    asked = {"count": count, "port": port, "folder": str(folder), "work": work, **more}
    start = time.monotonic()
    children = [
        subprocess.Popen(
            [sys.executable, str(WORK), json.dumps({**asked, "process": i})],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]
    try:
        texts = [child.communicate(timeout=150)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [c.returncode for c in children], texts, time.monotonic() - start


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint, and the file that one process makes of it."""
    source = tmp_path / "model.safetensors"
    write(source, {f"layer{i}.w": normal(64 + 32 * (i % 3), 16) for i in range(9)})
    recipe = [Rule(".*", quant.Int(bits=4, group=32))]
    options = {"coding": False, "progress": False}
    parallel.compress_checkpoint(source, tmp_path / "one.jom", recipe, **options)
    return source, (tmp_path / "one.jom").read_bytes()


def folder(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_two_processes(tmp_path, checkpoint):
    source, wanted = checkpoint
    where = folder(tmp_path, "two")
    codes, texts, _ = run(2, where, work=("stream", "orbax"), source=str(source))
    assert codes == [0, 0], texts
    assert (where / "small.jom").read_bytes() == wanted
    assert sorted(os.listdir(where)) == ["found.npz", "small.jom", "small.orbax"]
    tree, read = jom.load(where / "small.jom"), jom.read_checkpoint(where / "small.orbax")
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 4])
def test_as_one_process(tmp_path, checkpoint, count):
    source, wanted = checkpoint
    one, many = folder(tmp_path, "one"), folder(tmp_path, "many")
    for n, where in ((1, one), (count, many)):
        codes, texts, _ = run(n, where, source=str(source))
        assert codes == [0] * n, texts
    assert (many / "small.jom").read_bytes() == wanted == (one / "small.jom").read_bytes()
    a, b = (dict(np.load(where / "found.npz")) for where in (one, many))
    for name in ("two_bits", "two_bits_scale"):
        np.testing.assert_array_equal(a.pop(name), b.pop(name))
    assert sorted(a) == sorted(b) == ["codes", "gram", "loss", "scale", "student"]
    np.testing.assert_allclose(b["gram"], a["gram"], rtol=1e-5, atol=1e-5 * np.abs(a["gram"]).max())
    assert np.mean(a["codes"] == b["codes"]) >= 0.999
    for name in ("scale", "student", "loss"):
        np.testing.assert_allclose(b[name], a[name], rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("kill", ["calibrate", "distill", "stream"])
@pytest.mark.parametrize("count", [2, 4])
def test_one_is_killed(tmp_path, checkpoint, kill, count):
    source, wanted = checkpoint
    where = folder(tmp_path, "killed")
    work = (kill,)
    codes, texts, seconds = run(count, where, work=work, kill=kill, source=str(source))
    assert codes[-1] == -9 and seconds < 60 + 30  # starting takes its time, too
    for code, text in zip(codes[:-1], texts, strict=False):
        assert code in (_hosts.LOST, -6), text
        lines = [line for line in text.splitlines() if line.startswith("jaxopt_models: process")]
        assert len(lines) == 1 and "stops in" in lines[0] and "lost" in lines[0], text
    assert not (where / "small.jom").exists() and not (where / "found.npz").exists()
    if kill == "stream":
        assert list((where / ".small.jom.streaming").glob("*.journal"))
    codes, texts, _ = run(count, where, work=work, source=str(source))
    assert codes == [0] * count, texts
    if kill == "stream":
        assert (where / "small.jom").read_bytes() == wanted
    if kill == "distill":
        codes, texts, _ = run(1, folder(tmp_path, "whole"), work=work)
        a, b = (np.load(tmp_path / name / "found.npz") for name in ("whole", "killed"))
        np.testing.assert_allclose(b["student"], a["student"], rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_killed_coordinator_in_a_collective(tmp_path):
    where = folder(tmp_path, "killed")
    codes, texts, _ = run(2, where, work=("calibrate",), kill="calibrate", victim=0)
    assert codes[0] == -9 and codes[1] in (_hosts.LOST, -6), texts


@pytest.mark.full
def test_fewer_take_up_what_more_have_left(tmp_path, checkpoint):
    source, wanted = checkpoint
    where = folder(tmp_path, "killed")
    run(4, where, work=("stream",), kill="stream", source=str(source))
    codes, texts, _ = run(1, where, work=("stream",), source=str(source))
    assert codes == [0], texts
    assert (where / "small.jom").read_bytes() == wanted


@pytest.mark.full
def test_one_begins_late(tmp_path):
    where = folder(tmp_path, "late")
    codes, texts, _ = run(2, where, work=(), slow=0)
    assert codes == [0, 0], texts


@pytest.mark.full
def test_processes_that_differ(tmp_path, checkpoint):
    source, _ = checkpoint
    where = folder(tmp_path, "differ")
    codes, texts, _ = run(2, where, work=("stream",), differ=1, source=str(source))
    assert codes == [_hosts.LOST] * 2
    for text in texts:
        assert "compress_checkpoint: the processes differ:" in text
        assert "recipe: processes 0 | 1, here [" in text and "source: " not in text
    assert os.listdir(where) == []


def test_one_process_alone():
    parallel.agree("fit", recipe="int4")
    with pytest.raises(KeyError), parallel.guard("nothing"):
        raise KeyError("as without")
    with pytest.raises(ValueError, match="give all three"):
        parallel.start("localhost:1", processes=2)
    with pytest.raises(ValueError, match="numbered from 0 to 1"):
        parallel.start("localhost:1", 2, 2)
    with pytest.raises(ValueError, match="number of seconds"):
        parallel.start("localhost:1", 2, 0, timeout=0)


def test_shares_are_balanced():
    sizes = [7, 5, 5, 3, 3, 1, 0]
    owners = _hosts.share(sizes, 3)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == p) for p in range(3)]
    assert sum(loads) == 24 and max(loads) <= 8
    assert _hosts.share(sizes, 1) == [0] * 7


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: coordination service"), True),
        (ValueError("group=5 does not divide"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_a_lost_process_looks_like(error, lost):
    assert _hosts._is_loss(error) is lost

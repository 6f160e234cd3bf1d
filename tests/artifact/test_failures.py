"""Whatever goes wrong while saving: the error names what, and the old file stays."""

import os
import resource
import signal
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from artifact_trees import (
    Scaled,
    assert_same,
    clustered,
    tiny,
)

import jaxopt_models as jom
from jaxopt_models.quant._quantized import Quantized


class Colour(int):
    pass


@pytest.mark.parametrize(
    "tree, error, words",
    [
        ({"a": {"b": object()}}, TypeError, "a/b is a object"),
        ({"a": {"b": 1j}}, TypeError, "a/b is a complex"),
        ({"a": [b"bytes"]}, TypeError, "a/0 is a bytes"),
        ({"a": Colour(3)}, TypeError, "a is a Colour"),
        ({"a": 2**63}, ValueError, "a: 9223372036854775808 has more than 64 bits"),
        ({"a": np.array(["x"])}, TypeError, "a: a file cannot hold arrays of str"),
        ({"a": np.array([None])}, TypeError, "a: a file cannot hold arrays of object"),
        ({"a": {(1, 2): jnp.ones(1)}}, TypeError, "keys of a are strings or integers"),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, ValueError, "two leaves have the path"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, TypeError, "a is a ShapeDtypeStruct"),
        ({"a": Scaled(jnp.ones(2), jnp.ones(()), (2,), 1j)}, TypeError, "a: static field 1j"),
        (
            {"a": Scaled(jnp.ones(2), jnp.ones(()), (2,), np.inf)},
            ValueError,
            "a: inf is not finite",
        ),
        (
            {
                "a": Quantized(
                    jnp.ones((2, 3), jnp.int8), jnp.ones((3, 7)), None, (2, 3), (1,), 8, "float32"
                )
            },
            ValueError,
            "a: a description is malformed",
        ),
        (
            jom.partition({"a": clustered(np.random.default_rng(0), (8, 9), 0.5, 3)})[0],
            TypeError,
            "half",
        ),
        ({"a": jom.Masked(None, jnp.ones(2), (2,))}, TypeError, "a: a Masked without mask is half"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, tree, error, words):
    path = tmp_path / "a.jom"
    jom.save(path, tiny())
    old = path.read_bytes()
    with pytest.raises(error, match=words):
        jom.save(path, tree)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.jom"]


def test_tracers_and_depth(tmp_path):
    with pytest.raises(TypeError, match="save: x: "):
        jax.jit(lambda x: jom.save(tmp_path / "a.jom", {"x": x}))(jnp.ones(2))
    tree = jnp.ones(1)
    for _ in range(64):
        tree = {"a": tree}
    jom.save(tmp_path / "a.jom", tree)
    assert_same(jom.load(tmp_path / "a.jom"), tree)
    with pytest.raises(ValueError, match="deeper than 64"):
        jom.save(tmp_path / "a.jom", {"a": tree})


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The system stops the writing in the middle; here by a limit on the size of files."""
    path = tmp_path / "a.jom"
    jom.save(path, tiny())
    old = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            jom.save(path, {"x": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.jom"]


READ_ONLY = """
import os, sys
import jax.numpy as jnp
import jaxopt_models as jom
folder, path = sys.argv[1:]
tree = {"x": jnp.ones(3)}
jom.save(path, tree)  # before the rights are given up, and everything is imported
jom.load(path)
os.chmod(folder, 0o555)
os.chmod(path, 0o000)
if os.geteuid() == 0:
    os.setuid(65534)
for call in (lambda p: jom.save(p, tree), jom.load, jom.artifact.inspect):
    try:
        call(path)
    except PermissionError as e:
        print("refused", e.filename.startswith(folder))
"""


def test_missing_rights_are_system_errors():
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:
        os.chmod(outer, 0o755)
        folder = os.path.join(outer, "folder")
        os.mkdir(folder)
        path = os.path.join(folder, "a.jom")
        child = subprocess.run(
            [sys.executable, "-c", READ_ONLY, folder, path], capture_output=True, text=True
        )
        assert child.stdout.splitlines() == ["refused True"] * 3, child.stderr
        os.chmod(folder, 0o755)
        assert os.listdir(folder) == ["a.jom"]
    with pytest.raises(FileNotFoundError):
        jom.load("/nowhere/a.jom")
    with pytest.raises(FileNotFoundError):
        jom.save("/nowhere/a.jom", {})


KILLED = """
import sys
import numpy as np
import jaxopt_models as jom
noise = np.random.default_rng(0).integers(0, 256, 1_000_000, np.uint8)
print("ready", flush=True)
jom.save(sys.argv[1], [noise] * 500)
"""


def test_a_kill_in_the_middle_of_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jom"
    jom.save(path, tiny())
    old = path.read_bytes()
    child = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    while not any(os.path.getsize(tmp_path / name) > 1 << 20 for name in os.listdir(tmp_path)):
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert_same(jom.load(path), tiny())

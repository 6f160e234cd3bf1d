"""Compiling at first use: what is kept, what is refused, and life without a compiler."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import cli, kernels, quant
from jaxopt_models.kernels import _build, _load
from jaxopt_models.kernels.matmul import matmul

HAVE = bool(kernels.status().path)
needed = pytest.mark.skipif(not HAVE, reason=f"no kernels: {kernels.status().why}")


@pytest.fixture
def nothing_loaded(monkeypatch):
    """As in a process that has not looked for kernels yet."""
    monkeypatch.setattr(_load, "_LOADED", {})
    _build._key.cache_clear()
    yield
    _build._key.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch, nothing_loaded, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def small():
    w = np.random.default_rng(0).standard_normal((64, 40), np.float32)
    return jom.compress({"w": jnp.asarray(w)}, [jom.Rule("w", quant.Int(bits=8))])


def product(p, x):
    return x @ p["w"]


def test_without_a_compiler_all_runs_on_xla_and_says_so(no_compiler):
    packed, x = jom.pack(small(), target="cpu"), jnp.ones((2, 64))
    run = jom.accelerate(product)
    np.testing.assert_allclose(run(packed, x), product(jom.materialize(packed), x), rtol=1e-5)
    row = run.explain(packed, x)[0]
    assert row["runs"] == "rebuilt"
    assert "no C++ compiler" in row["note"] and "install one" in row["note"]
    with pytest.raises(ValueError, match="there are no kernels: no C\\+\\+ compiler"):
        matmul(x, packed["w"], implementation="cpu")


def test_a_compiler_that_is_not_there_or_fails(monkeypatch, nothing_loaded, tmp_path):
    monkeypatch.setenv("JAXOPT_MODELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.status().why == "the compiler CXX=no-such-compiler is not there"
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'x.cc:1: error: no room' >&2\nexit 3\n")
    broken.chmod(0o755)
    _load.forget()
    monkeypatch.setenv("CXX", str(broken))
    assert "failed with 3: x.cc:1: error: no room" in kernels.status().why
    left = [n for n in os.listdir(tmp_path / "cache") if not n.endswith(".lock")]
    assert left == []  # nothing half built


def test_turned_off(monkeypatch):
    with kernels.forced("off"):
        assert kernels.status().why == "kernels are turned off"
        row = jom.accelerate(product).explain(jom.pack(small(), target="cpu"), jnp.ones((1, 64)))
        assert "turned off" in row[0]["note"]
    with pytest.raises(ValueError, match="'sse' is none of native"), kernels.forced("sse"):
        pass
    monkeypatch.setenv("JAXOPT_MODELS_KERNELS", "fast")
    with pytest.raises(ValueError, match="JAXOPT_MODELS_KERNELS: 'fast'"):
        kernels.status()


HANDLERS = "".join(
    f"XLA_FFI_DEFINE_HANDLER_SYMBOL(jom_{name}, nothing, xla::ffi::Ffi::Bind());\n"
    for name in _load.HANDLERS
)
OTHER_LIBRARY = f"""
#include "xla/ffi/api/ffi.h"
static xla::ffi::Error nothing() {{ return xla::ffi::Error::Success(); }}
{HANDLERS}
extern "C" int jom_ffi_api() {{ return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }}
extern "C" const char* jom_isa() {{ return "other"; }}
"""
OTHER_PROGRAM = """
import shutil, sys
import jax, jax.numpy as jnp
import jaxopt_models as jom
from jaxopt_models import kernels, quant
from jaxopt_models.kernels import _build, _load

if sys.argv[2] == "refused":
    shutil.copy(sys.argv[1], _build.library("native"))
    print(kernels.status().why)
else:  # what is to be avoided
    _build.header_version = lambda: int(sys.argv[2])
    _load.register("native", sys.argv[1])
small = jom.compress({"w": jnp.eye(64)}, [jom.Rule("w", quant.Int(bits=8))])
packed, x = jom.pack(small, target="cpu"), jnp.ones((2, 64))
run = jom.accelerate(lambda p, x: x @ p["w"])
print(run.explain(packed, x)[0]["runs"], float(jax.jit(run)(packed, x).sum()))
"""


@needed
def test_a_library_of_another_interface_is_refused_before_jax_sees_it(tmp_path):
    headers = tmp_path / "include"
    shutil.copytree(jax.ffi.include_dir(), headers)
    version = headers / "xla" / "ffi" / "api" / "c_api.h"
    installed = _build.header_version()
    line = f"#define XLA_FFI_API_MINOR {installed % 1000}"
    text = version.read_text()
    assert line in text
    other = installed + 900
    version.write_text(text.replace(line, f"#define XLA_FFI_API_MINOR {other % 1000}"))
    source, file = tmp_path / "other.cc", tmp_path / "other.so"
    source.write_text(OTHER_LIBRARY)
    command = [*shlex.split(_build.compiler()), "-std=c++17", "-O0", "-fPIC", "-shared"]
    subprocess.run([*command, f"-I{headers}", str(source), "-o", str(file)], check=True)
    env = {**os.environ, "JAXOPT_MODELS_CACHE": str(tmp_path / "cache")}
    env.pop("JAXOPT_MODELS_KERNELS", None)

    def child(how):
        command = [sys.executable, "-c", OTHER_PROGRAM, str(file), how]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    done = child("refused")
    why, result = done.stdout.splitlines()
    assert f"was built for version {other / 1000} of XLA's interface" in why, done.stderr
    assert f"the installed JAX has {installed / 1000}; remove it: python -m jaxopt_models" in why
    assert result == "rebuilt 128.0"
    # To hand it to XLA before the backend starts would break JAX itself.
    done = child(str(other))
    assert done.returncode and "API version" in done.stderr


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(100)])
def test_a_broken_library_is_refused(tmp_path, content):
    (tmp_path / "k.so").write_bytes(content)
    with pytest.raises(kernels.BuildError, match="cannot be loaded"):
        _load.register("broken", str(tmp_path / "k.so"))


def test_where_it_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXOPT_MODELS_CACHE", str(tmp_path / "named"))
    assert _build.cache_dir() == tmp_path / "named"
    assert (tmp_path / "named").stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("JAXOPT_MODELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _build.cache_dir() == tmp_path / "jaxopt_models"
    # A folder into which others may write holds no code of ours.
    (tmp_path / "jaxopt_models").chmod(0o777)
    assert _build.cache_dir().parent == pathlib.Path(_build.tempfile.gettempdir())


@needed
def test_the_key_knows_sources_compiler_and_flags(monkeypatch):
    one = _build.library("native")
    assert one == _build.library("native") != _build.library("portable")
    monkeypatch.setattr(_build, "FLAGS", (*_build.FLAGS, "-DX"))
    _build._key.cache_clear()
    assert _build.library("native") != one
    monkeypatch.undo()
    _build._key.cache_clear()
    assert _build.library("native") == one and str(one) == kernels.status().file


@needed
def test_processes_that_race_build_one_library(tmp_path):
    code = "from jaxopt_models import kernels; print(kernels.status().file)"
    # A compiler that only copies what was compiled before, slowly enough for a race.
    fake = tmp_path / "c++"
    fake.write_text(
        '#!/bin/sh\nfor a; do last=$a; done\ncase " $* " in *" -shared "*) '
        f'echo x >> {tmp_path}/built; sleep 0.3; cp {kernels.status().file} "$last";; '
        '*) : > "$last";; esac\n'
    )
    fake.chmod(0o755)
    env = {**os.environ, "CXX": str(fake), "JAXOPT_MODELS_CACHE": str(tmp_path / "cache")}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    files = {child.communicate(timeout=120)[0].strip() for child in children}
    [file] = files
    found = sorted(os.listdir(tmp_path / "cache"))
    assert found == sorted([os.path.basename(file), pathlib.Path(file).stem + ".lock"])
    assert (tmp_path / "built").read_text() == "x\n"  # the other process waited


@needed
def test_the_command_line(capsys, monkeypatch, tmp_path):
    assert cli.main(["kernels"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"kernels for {kernels.status().path}: matmul, conv")
    assert cli.main(["kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == kernels.status().file
    monkeypatch.setenv("JAXOPT_MODELS_CACHE", str(tmp_path))
    shutil.copy(kernels.status().file, tmp_path / "kernels-native-0.so")
    (tmp_path / "other").write_text("stays")
    assert cli.main(["kernels", "--clear"]) == 0
    assert capsys.readouterr().out == "removed 1 libraries\n"
    assert os.listdir(tmp_path) == ["other"]


def test_the_command_line_without_a_compiler(capsys, no_compiler):
    assert cli.main(["kernels"]) == 1
    assert "everything runs on XLA: no C++ compiler" in capsys.readouterr().out

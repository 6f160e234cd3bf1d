"""Kernels without XLA on random sizes, under the sanitizers; and compiled for another machine."""

import pathlib
import shlex
import shutil
import subprocess

import pytest

from jaxopt_models import kernels
from jaxopt_models.kernels import _build

DRIVER = pathlib.Path(__file__).with_name("driver.cc")
CASES = 1000
if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)


def compiled(cxx, flags, out):
    sources = [p for p in _build.sources() if p.name == "cpu.cc"]
    command = [*shlex.split(cxx), *flags, f"-I{_build.HERE}", str(DRIVER), *map(str, sources)]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.mark.full
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("isa", ["native", "avx2", "portable"])
def test_a_thousand_shapes_under_sanitizers(isa, sanitizer, tmp_path):
    if isa == "avx2" and kernels.status().path not in ("avx512", "avx2"):
        pytest.skip("not the processor for it")
    flags = [*_build.FLAGS, *_build.ISAS[isa], "-O1", "-g", f"-fsanitize={sanitizer}"]
    flags.append("-fno-sanitize-recover=all")
    program = compiled(_build.compiler(), flags, tmp_path / "driver")
    done = subprocess.run([program, str(CASES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith(f"{CASES} cases on ")


@pytest.mark.full
def test_on_arm_where_a_cross_compiler_and_an_emulator_are(tmp_path):
    cxx, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (cxx and emulator):
        pytest.skip("no cross compiler and emulator for ARM")
    for isa, path in (("neon", "neon"), ("portable", "portable")):
        out = tmp_path / f"driver-{isa}"
        flags = [*_build.FLAGS, *_build.ISAS[isa], "-static"]
        program = compiled(cxx, flags, out)
        done = subprocess.run([emulator, program, "200"], capture_output=True, text=True)
        assert done.stdout == f"200 cases on {path}\n", done.stdout + done.stderr

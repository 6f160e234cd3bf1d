"""Kernels without XLA on random sizes, under the sanitizers; and compiled for another machine."""

import concurrent.futures
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

from jaxopt_models import kernels
from jaxopt_models.kernels import _build

HERE = pathlib.Path(__file__).parent
CASES = 1000
#: All that is fresh is NaN, as what nobody wrote should be.
OPTIONS = {"ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255"}
SANITIZERS = {
    # The memory of a call is its own, and exact.
    "address": ("-fsanitize=address,undefined,float-cast-overflow", "-DJOM_EXACT_SCRATCH"),
    "thread": ("-fsanitize=thread",),
}
KERNELS = (
    *("product", "convolution"),
    *("binary_product", "binary_convolution"),
    *("sparse_blocks", "sparse_pairs"),
)
if not kernels.status().path:
    pytest.skip(f"no kernels: {kernels.status().why}", allow_module_level=True)


def compiled(cxx, flags, folder):
    """Compiles the driver of all kernels."""
    probe = [*shlex.split(cxx), *flags, "-x", "c++", "-", "-o", str(folder / "probe")]
    if subprocess.run(probe, input="int main() {}", text=True, capture_output=True).returncode:
        pytest.skip("the compiler has not these sanitizers")
    sources = [*HERE.glob("driver*.cc"), *(p for p in _build.sources() if p.name == "cpu.cc")]
    cxx = shlex.split(cxx)

    def run(*arguments):
        done = subprocess.run([*cxx, *flags, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    def compile_one(source):
        made = folder / f"{source.parent.name}-{source.stem}.o"
        run(f"-I{_build.HERE}", f"-I{HERE}", "-c", source, "-o", made)
        return made

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    run(*objects, "-o", folder / "driver")
    return folder / "driver"


def check(command, cases, path):
    done = subprocess.run(
        [*command, str(cases)], capture_output=True, text=True, env={**os.environ, **OPTIONS}
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"{cases} cases of {k} on {path}" for k in KERNELS]


@pytest.mark.full
@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("isa", ["native", "avx512", "avx2", "portable"])
def test_a_thousand_shapes_under_sanitizers(isa, sanitizer, tmp_path):
    best = kernels.status().path
    if isa.startswith("avx") and best not in ("avx512", isa):
        pytest.skip("not the processor for it")
    flags = [*_build.FLAGS, *_build.ISAS[isa], "-O1", "-g", *SANITIZERS[sanitizer]]
    program = compiled(_build.compiler(), [*flags, "-fno-sanitize-recover=all"], tmp_path)
    check([program], CASES, best if isa == "native" else isa)


@pytest.mark.full
@pytest.mark.parametrize("isa", ["neon", "portable"])
def test_on_arm_where_a_cross_compiler_and_an_emulator_are(isa, tmp_path):
    cxx, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (cxx and emulator):
        pytest.skip("no cross compiler and emulator for ARM")
    program = compiled(cxx, [*_build.FLAGS, *_build.ISAS[isa], "-static"], tmp_path)
    check([emulator, program], 200, isa)

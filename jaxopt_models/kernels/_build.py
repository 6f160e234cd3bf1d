"""Compiles the kernels at first use, for the machine at hand and the JAX that is installed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator

import jax.ffi

logger = logging.getLogger("jaxopt_models")

HERE = pathlib.Path(__file__).parent
#: Compiler flags by instruction set; ``"native"`` is the best of the machine.
ISAS = {
    "native": ("-march=native",),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        *("-mavx512vpopcntdq", "-mfma"),
    ),
    "avx2": ("-mavx2", "-mfma", "-mpopcnt"),
    "neon": ("-march=armv8.2-a+dotprod",),
    "portable": (),
}
#: No contraction, so that every path computes the same floats.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why, in one line."""


def sources() -> list[pathlib.Path]:
    """Returns what is compiled: the kernels, and what binds them to XLA."""
    return [*sorted(HERE.glob("*/cpu.cc")), *sorted(HERE.glob("_native/*.cc"))]


def compiler() -> str:
    """Returns the C++ compiler: ``CXX`` of the environment, or the first of the usual names.

    Raises:
      BuildError: if there is none.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        found = shutil.which(shlex.split(name)[0]) if name.strip() else None
        if found:
            return " ".join([found, *shlex.split(name)[1:]])
    if named:
        raise BuildError(f"the compiler CXX={named} is not there")
    raise BuildError("no C++ compiler (g++, clang++ or c++) is on the PATH; install one")


def header_version() -> int:
    """Returns the version of XLA's interface that the installed headers are of.

    Raises:
      BuildError: if they cannot be read.
    """
    path = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        text = path.read_text(encoding="utf-8")
        major, minor = (
            int(re.search(rf"#define XLA_FFI_API_{name} (\d+)", text)[1])  # type: ignore[index]
            for name in ("MAJOR", "MINOR")
        )
    except (OSError, TypeError) as e:
        raise BuildError(f"the headers of XLA cannot be read: {path}") from e
    return 1000 * major + minor


def cache_dir() -> pathlib.Path:
    """Returns the folder for what was compiled; it is made, for its owner alone.

    ``JAXOPT_MODELS_CACHE``, else below ``XDG_CACHE_HOME`` or ``~/.cache``, else, where none of
    these can be written, below the folder for temporary files.
    """
    places = []
    if named := os.environ.get("JAXOPT_MODELS_CACHE"):
        places.append(pathlib.Path(named))
    elif xdg := os.environ.get("XDG_CACHE_HOME"):
        places.append(pathlib.Path(xdg, "jaxopt_models"))
    elif (home := os.path.expanduser("~")) not in ("~", "/"):
        places.append(pathlib.Path(home, ".cache", "jaxopt_models"))
    user = os.getuid() if hasattr(os, "getuid") else 0
    places.append(pathlib.Path(tempfile.gettempdir(), f"jaxopt_models-{user}"))
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = place.stat()
        except OSError:
            continue
        # A library is code: nobody else may have put it there.
        mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
        if mine and not found.st_mode & stat.S_IWOTH and os.access(place, os.W_OK):
            return place
    raise BuildError(f"none of these folders can be written: {', '.join(map(str, places))}")


def library(isa: str) -> pathlib.Path:
    """Returns the path of the compiled kernels, whether they are there or not."""
    return cache_dir() / f"kernels-{isa}-{_key(isa, compiler())}.so"


@functools.cache
def _key(isa: str, cxx: str) -> str:
    """Hashes all that the result depends on."""
    parts = [" ".join(FLAGS + ISAS[isa]), cxx, platform.machine(), str(header_version())]
    binary = shlex.split(cxx)[0]
    parts.append(f"{os.path.getsize(binary)} {os.path.getmtime(os.path.realpath(binary))}")
    if isa == "native":
        parts.append(_cpu())
    key = hashlib.sha256("\0".join(parts).encode())
    headers = sorted(pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api").glob("*.h"))
    for path in [*sorted(HERE.glob("*/*.cc")), *sorted(HERE.glob("*/*.h")), *headers]:
        key.update(path.read_bytes())
    return key.hexdigest()[:20]


def _cpu() -> str:
    """Names the processor by what it can do."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = [n for n in ("model name", "flags", "Features", "CPU part") if f"\n{n}" in f"\n{text}"]
    return "\n".join(re.search(rf"^{n}\s*:.*$", text, re.M)[0] for n in found)  # type: ignore[index]


def build(isa: str) -> pathlib.Path:
    """Compiles the kernels unless they are there; processes may race.

    Args:
      isa: a key of :data:`ISAS`.

    Returns:
      The path of the library.

    Raises:
      BuildError: if they cannot be compiled.
    """
    path, cxx = library(isa), compiler()
    if path.exists():
        return path
    with _alone(path):
        if not path.exists():
            logger.info("kernels: compiling for this machine, once ...")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
                os.replace(_compile(isa, cxx, pathlib.Path(folder)), path)
    return path


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time compile a library, where the system has locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(isa: str, cxx: str, folder: pathlib.Path) -> pathlib.Path:
    flags = [*FLAGS, *ISAS[isa], f"-I{jax.ffi.include_dir()}"]

    def compiled(source: pathlib.Path) -> str:
        made = folder / f"{source.parent.name}-{source.stem}.o"
        # What only hands over takes long to optimize, and gains nothing.
        level = ["-O1"] if source.parent.name == "_native" else []
        _run([*shlex.split(cxx), *flags, *level, "-c", str(source), "-o", str(made)])
        return str(made)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources()))
    made = folder / "kernels.so"
    _run([*shlex.split(cxx), "-shared", "-pthread", *objects, "-o", str(made)])
    return made


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
        )
    except OSError as e:
        raise BuildError(f"{command[0]} cannot be run: {e.strerror}") from e
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BuildError(f"{command[0]} failed with {done.returncode}: {lines[0].strip()}")


def clear() -> int:
    """Removes what was compiled; returns the number of files."""
    found = [*cache_dir().glob("kernels-*.so")]
    for path in [*found, *cache_dir().glob("kernels-*.lock")]:
        path.unlink(missing_ok=True)
    return len(found)

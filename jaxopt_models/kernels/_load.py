"""Loads compiled kernels into JAX, or says why there are none."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import threading
from collections.abc import Iterator

import jax

from . import _build

#: Kernels by the name of their symbol.
HANDLERS = (
    *("matmul", "conv"),
    *("binary_matmul", "binary_conv"),
    *("sparse_blocks", "sparse_pairs"),
)
_LOCK = threading.RLock()
_LOADED: dict[str, Loaded] = {}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What became of the kernels of one instruction set.

    Args:
      isa: what was asked for.
      path: instructions they really use, such as ``"avx512"``; ``""`` where there are none.
      why: why there are none.
      file: the library.
    """

    isa: str
    path: str = ""
    why: str = ""
    file: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels there are."""
        return HANDLERS if self.path else ()

    def target(self, kernel: str) -> str:
        """Returns the name by which XLA knows a kernel."""
        return f"jaxopt_models.{self.isa}.{kernel}"


_forced = threading.local()


@contextlib.contextmanager
def forced(isa: str) -> Iterator[None]:
    """Makes programs traced inside use one path of the kernels, or none.

    Args:
      isa: ``"avx512"``, ``"avx2"``, ``"neon"``, ``"portable"``, ``"native"``, the best of the
        machine, which is the default, or ``"off"``.

    Raises:
      ValueError: for another name.

    Example:
      >>> from jaxopt_models import kernels
      >>> with kernels.forced("off"):
      ...     kernels.status().why
      'kernels are turned off'
    """
    _check(isa, "forced")
    before = getattr(_forced, "isa", None)
    _forced.isa = isa
    try:
        yield
    finally:
        _forced.isa = before


def _check(isa: str, who: str) -> str:
    if isa not in (*_build.ISAS, "off"):
        raise ValueError(f"{who}: {isa!r} is none of {', '.join((*_build.ISAS, 'off'))}")
    return isa


def chosen() -> str:
    """Returns the path that is forced: by :func:`forced`, or ``JAXOPT_MODELS_KERNELS``."""
    named = getattr(_forced, "isa", None) or os.environ.get("JAXOPT_MODELS_KERNELS") or "native"
    return _check(named, "JAXOPT_MODELS_KERNELS")


def status() -> Loaded:
    """Returns the kernels of this process, compiled and loaded at first use.

    Returns:
      Their names for XLA, or why there are none. Asked again it is the same answer.
    """
    isa = chosen()
    with _LOCK:
        if isa not in _LOADED:
            _LOADED[isa] = _load(isa)
        return _LOADED[isa]


def missing() -> str:
    """Says why there are no kernels as far as that is known without compiling, else ``""``."""
    isa = chosen()
    with _LOCK:
        found = _LOADED.get(isa) or (_load(isa) if isa == "off" else None)
    if found is not None:
        return found.why
    try:
        _build.library(isa)
    except _build.BuildError as e:
        return str(e)
    return ""


def forget() -> None:
    """Looks for a compiler again at the next use, where there was none."""
    with _LOCK:
        for isa in [k for k, v in _LOADED.items() if not v.path]:
            del _LOADED[isa]


def _load(isa: str) -> Loaded:
    if isa == "off":
        return Loaded(isa, why="kernels are turned off")
    try:
        file = str(_build.build(isa))
        return register(isa, file)
    except _build.BuildError as e:
        return Loaded(isa, why=str(e))


def register(isa: str, file: str) -> Loaded:
    """Hands the kernels of a library to XLA, unless it was built for another version of it.

    Args:
      isa: the name to register them under.
      file: the library.

    Raises:
      BuildError: if XLA would refuse it, or the library is broken.
    """
    try:
        lib = ctypes.CDLL(file)
        lib.jom_isa.restype = ctypes.c_char_p
        built, path = lib.jom_ffi_api(), lib.jom_isa().decode()
        handlers = {name: getattr(lib, f"jom_{name}") for name in HANDLERS}
    except (OSError, AttributeError) as e:
        raise _build.BuildError(f"{file} cannot be loaded: {e}") from e
    installed = _build.header_version()
    if built != installed:
        # To register it would break JAX itself, which refuses it when the backend starts.
        raise _build.BuildError(
            f"{file} was built for version {built / 1000} of XLA's interface, the installed JAX "
            f"has {installed / 1000}; remove it: python -m jaxopt_models kernels --clear"
        )
    found = Loaded(isa, path, file=file)
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(found.target(name), jax.ffi.pycapsule(handler), platform="cpu")
    return found

"""Parts of benchmarks in processes of their own: ``python -m benchmarks._children PART``.

What compiles for a TPU or an H100 that is not there takes a lock and an environment of its own,
and the number of simulated devices is fixed when JAX begins.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from ._rows import Row

#: Of a CPU, for parts that need a mesh.
DEVICES = 8
#: In the message of :func:`jaxopt_models.parallel.topology` while another process has libtpu.
LOCKED = "another process has libtpu"


def python() -> str | None:
    """Returns a Python with the extra ``aot``: ``JAXOPT_MODELS_AOT_PYTHON``, or ``None``."""
    return os.environ.get("JAXOPT_MODELS_AOT_PYTHON") or None


def check_aot() -> None:
    """Raises unless there is a Python that compiles for devices that are not there."""
    here = all(map(importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin")))
    if not here and python() is None:
        raise SystemExit(
            "no Python that compiles for TPU and GPU: install the extra 'aot' into an environment "
            "of its own and set JAXOPT_MODELS_AOT_PYTHON to its python"
        )


def compiled(module: str, *arguments: str, timeout: float = 600) -> list[dict[str, Any]]:
    """Runs a module of this package where there is the extra ``aot``; returns what it prints.

    Args:
      module: its name, such as ``"_aot"``; it prints a line of JSON for each program.
      *arguments: of its command line.
      timeout: seconds until it is given up; it waits as long for another process with libtpu.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [python() or sys.executable, "-m", f"benchmarks.{module}", *arguments]
    end = time.monotonic() + timeout
    while True:
        try:
            return _run(command, environment, timeout)
        except RuntimeError as e:
            if LOCKED not in str(e) or time.monotonic() > end:
                raise
            time.sleep(10)


def simulated(part: str, *, quick: bool, timeout: float = 3600) -> list[Row]:
    """Returns the rows of a module on eight simulated devices of this machine's CPU.

    Args:
      part: name of a module of this package with ``rows(*, quick)``.
      quick: handed on.
      timeout: seconds until it is given up.
    """
    command = [sys.executable, "-m", "benchmarks._children", part, *(["--quick"] * quick)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return [
        Row(r["claim"], r["value"], r["bar"], tuple(r["seeds"]), r["note"])
        for r in _run(command, environment, timeout)
    ]


def _run(command: Sequence[str], environment: dict[str, str], timeout: float) -> list[Any]:
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        command,
        cwd=root,
        env={**environment, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(part: str, *, quick: bool) -> None:
    """Prints the rows of a part, one in a line."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    for row in importlib.import_module(f"benchmarks.{part}").rows(quick=quick):
        print(json.dumps(row.to_data()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], quick="--quick" in sys.argv)

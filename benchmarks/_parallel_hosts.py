"""What several processes on one machine compute, beside one; and how they end when one is lost."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ._rows import Row

#: What each process does; tests have it do the same on less.
WORK = pathlib.Path(__file__).parents[1] / "tests" / "parallel" / "host_work.py"
ALL = ("calibrate", "gptq", "distill", "stream")
#: Inputs, hidden units, rows of a batch and number of batches.
SIZE = (256, 128, 64, 16)


def run(count: int, folder: str, **more: Any) -> tuple[list[int], list[str], float]:
    """Runs processes to their ends; returns exit codes, what they printed, and the seconds."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    os.makedirs(folder, exist_ok=True)
    asked = {"count": count, "port": port, "folder": folder, "work": ALL, "size": SIZE, **more}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [sys.executable, str(WORK), json.dumps(asked | {"process": i})],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(count)
    ]
    texts = [children[-1].communicate()[0]]
    last = time.monotonic()  # the last one is the one that is killed
    texts = [child.communicate()[0] for child in children[:-1]] + texts
    return [c.returncode for c in children], texts, time.monotonic() - last


def rows(*, quick: bool) -> list[Row]:
    """Compares 2 and 4 processes with one, and kills one of them."""
    from ._parallel_stream import write_checkpoint

    counts = (2,) if quick else (2, 4)
    out = []
    with tempfile.TemporaryDirectory(prefix="processes") as folder:
        source = os.path.join(folder, "model.safetensors")
        write_checkpoint(source, 12, (256, 512))
        read = lambda where: (  # noqa: E731
            np.load(os.path.join(where, "found.npz")),
            pathlib.Path(where, "small.jom").read_bytes(),
        )
        one = os.path.join(folder, "one")
        alone = _checked(lambda: run(1, one, source=source))
        a, file = read(one)
        for n in counts:
            many, killed = (os.path.join(folder, f"{name}{n}") for name in ("many", "killed"))
            took = _checked(lambda n=n, many=many: run(n, many, source=source))
            b, other = read(many)
            codes, texts, seconds = run(n, killed, source=source, kill="calibrate")
            lines = [t.count("\njaxopt_models: process ") for t in texts[:-1]]
            stopped = all(codes) and all(line == 1 for line in lines)
            _checked(lambda n=n, killed=killed: run(n, killed, source=source))
            again = read(killed)[1]
            gap = float(np.abs(a["gram"] - b["gram"]).max() / np.abs(a["gram"]).max())
            change = np.abs(a["student"] - b["student"]).max() / np.abs(a["student"]).max()
            same = float(np.mean(a["codes"] == b["codes"]))
            times = f"all of it with starting {took:.1f} s, one process {alone:.1f} s"
            out += [
                Row(f"{n} processes: statistics, relative difference from one", gap, "<= 1e-5"),
                Row(f"{n} processes: codes of GPTQ equal to those of one", same, ">= 0.999"),
                Row(f"{n} processes: student after an epoch, relative difference", float(change),
                    "<= 1e-5", note=times),
                Row(f"{n} processes: streamed files equal to that of one, of 2",
                    (other == file) + (again == file), ">= 2",
                    note="the second by a start after one was killed"),
                Row(f"{n} processes, one killed: seconds until all others had ended with a line",
                    seconds if stopped else float("inf"), "<= 60",
                    note=f"exit codes {', '.join(map(str, codes))}"),
            ]  # fmt: skip
    return out


def _checked(start: Callable[[], tuple[list[int], list[str], float]]) -> float:
    """Returns the seconds that processes took, all of which must end well."""
    before = time.monotonic()
    codes, texts, _ = start()
    if any(codes):
        raise RuntimeError(f"processes ended with {codes}:\n" + "\n".join(t[-2000:] for t in texts))
    return time.monotonic() - before

"""What several processes on one machine compute, beside one; and how they end when one is lost."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from ._rows import Row

DEVICES = 4
WORK = ("calibrate", "gptq", "distill", "stream")


def run(count: int, folder: str, **more: Any) -> tuple[list[int], list[str], float]:
    """Runs processes to their ends; returns exit codes, what they printed, and the seconds."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    os.makedirs(folder, exist_ok=True)
    asked = {"count": count, "port": port, "folder": folder, **more}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks._parallel_hosts", json.dumps(asked | {"me": i})],
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


def work(asked: dict[str, Any]) -> None:
    """What each process does."""
    import jax

    count, me = asked["count"], asked["me"]
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import jaxopt_models as jom
    from jaxopt_models import distill, parallel, quant

    if count > 1:
        parallel.start(f"localhost:{asked['port']}", count, me)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.standard_normal((256, 128), np.float32)},
        "b": {"kernel": rng.standard_normal((128, 10), np.float32)},
    }
    xs = rng.standard_normal((16, 64, 256), np.float32)
    ys = rng.integers(0, 10, (16, 64)).astype(np.int32)
    apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]  # noqa: E731
    solved = [jom.Rule(".*/kernel", quant.GPTQ(quant.Int(bits=4, group=16)))]
    found: dict[str, Any] = {}

    def batches() -> Any:
        rows = len(xs[0]) // count
        for i, x in enumerate(xs):
            if i == 8 and asked.get("kill") and me == count - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            mine = x[me * rows : (me + 1) * rows]
            sharding = NamedSharding(mesh, PartitionSpec("data"))
            yield (jax.make_array_from_process_local_data(sharding, mine),)

    with parallel.guard("the benchmark"):
        start = time.perf_counter()
        stats = jom.calibrate(apply, params, batches(), solved)
        found["gram"] = np.asarray(stats["a/kernel"].gram)
        small = jom.compress(params, solved, stats=stats)["a"]["kernel"]
        found["codes"] = np.asarray(small.integers())
        scheme = distill.teacher_student(
            apply, apply, distill.classification(), optax.adam(1e-2), mesh=mesh
        )
        state = scheme.init(jax.tree.map(lambda w: w / 2, params), params)
        done = distill.fit(
            scheme.step, state, lambda i: (xs[i], ys[i]), steps=len(xs), progress=False
        )
        found["student"] = np.asarray(done.state.student["a"]["kernel"])
        found["seconds"] = time.perf_counter() - start
        parallel.compress_checkpoint(
            asked["source"],
            os.path.join(asked["folder"], "small.jom"),
            [jom.Rule(".*", quant.Int(bits=4, group=32))],
            coding=False,
            progress=False,
        )
    if me == 0:
        np.savez(os.path.join(asked["folder"], "found.npz"), **found)


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
        _checked(run(1, one, source=source))
        a, file = read(one)
        for n in counts:
            many, killed = (os.path.join(folder, f"{name}{n}") for name in ("many", "killed"))
            _checked(run(n, many, source=source))
            b, other = read(many)
            codes, texts, seconds = run(n, killed, source=source, kill=True)
            lines = [t.count("\njaxopt_models: process ") for t in texts[:-1]]
            stopped = all(codes) and all(line == 1 for line in lines)
            _checked(run(n, killed, source=source))
            again = read(killed)[1]
            gap = float(np.abs(a["gram"] - b["gram"]).max() / np.abs(a["gram"]).max())
            change = np.abs(a["student"] - b["student"]).max() / np.abs(a["student"]).max()
            same = float(np.mean(a["codes"] == b["codes"]))
            times = f"{float(b['seconds']):.1f} s, one process {float(a['seconds']):.1f} s"
            out += [
                Row(f"{n} processes: statistics, relative difference from one", gap, "<= 1e-5"),
                Row(f"{n} processes: codes of GPTQ equal to those of one", same, ">= 0.999"),
                Row(f"{n} processes: student after an epoch, relative difference", float(change),
                    "<= 1e-5", note=f"calibration, GPTQ and the epoch with compiling: {times}"),
                Row(f"{n} processes: streamed files equal to that of one, of 2",
                    (other == file) + (again == file), ">= 2",
                    note="the second by a start after one was killed"),
                Row(f"{n} processes, one killed: seconds until all others had ended with a line",
                    seconds if stopped else float("inf"), "<= 60",
                    note=f"exit codes {', '.join(map(str, codes))}"),
            ]  # fmt: skip
    return out


def _checked(result: tuple[list[int], list[str], float]) -> None:
    codes, texts, _ = result
    if any(codes):
        raise RuntimeError(f"processes ended with {codes}:\n" + "\n".join(t[-2000:] for t in texts))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))

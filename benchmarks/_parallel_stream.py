"""Streaming compression: its speed beside plain reading and writing, its memory, its bytes."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from jaxopt_models.parallel import _disk

from . import _parallel_hosts
from ._rows import Row

logger = logging.getLogger(__name__)
RECIPE = [".*", {"bits": 4, "group": 32}]
SHAPE = (8192, 4096)
CHUNK = 8 << 20


def write_checkpoint(path: str, tensors: int, shape: tuple[int, int] = SHAPE) -> None:
    """Writes a safetensors file of normal numbers, `float32`."""
    size = 4 * shape[0] * shape[1]
    header = {
        f"layers.{i}.kernel": {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(tensors)
    }
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _ in range(tensors):
            f.write(memoryview(rng.standard_normal(shape, np.float32)).cast("B"))
        f.flush()
        os.fsync(f.fileno())


def forget(path: str) -> None:
    """Drops a file from the memory of the system."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def plain(source: str, out: str, size: int, *, direct: bool) -> float:
    """Returns the seconds of reading a file and writing ``size`` bytes, synced.

    Args:
      source: read from the disk, whatever was in memory.
      out: written, then removed.
      size: bytes of it.
      direct: read as the library does, past the memory of the system.
    """
    forget(source)
    buffer = mmap.mmap(-1, CHUNK + _disk.SPARE)
    start = time.perf_counter()
    if direct:
        with contextlib.closing(_disk.File(source)) as file:
            length = os.path.getsize(source)
            for at in range(0, length, CHUNK):
                file.read(at, min(CHUNK, length - at), memoryview(buffer))
    else:
        with open(source, "rb", buffering=0) as f:
            while f.readinto(memoryview(buffer)[:CHUNK]):
                pass
    with open(out, "wb", buffering=0) as f:
        left = size
        while left:
            left -= f.write(memoryview(buffer)[: min(left, CHUNK)])
        os.fsync(f.fileno())
    seconds = time.perf_counter() - start
    os.unlink(out)
    return seconds


def ours(source: str, out: str, *, coding: bool) -> dict[str, Any]:
    """Compresses in a process of its own; returns seconds, peak memory and size."""
    forget(source)
    asked = json.dumps({"source": source, "out": out, "coding": coding})
    command = [sys.executable, "-m", "benchmarks._parallel_stream", asked]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _compress(asked: dict[str, Any]) -> None:
    """What the process does; its imports are not timed, its compilations are."""
    import jaxopt_models as jom
    from jaxopt_models import parallel

    pattern, options = RECIPE
    recipe = [jom.Rule(pattern, jom.quant.Int(**options))]
    start = time.perf_counter()
    size = parallel.compress_checkpoint(
        asked["source"], asked["out"], recipe, coding=asked["coding"], progress=False
    )
    seconds = time.perf_counter() - start
    # Not getrusage, whose peak goes on from that of the process that made this one.
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "size": size}))


def same_tensors(folder: str) -> Row:
    """Counts tensors that a streamed file holds as `compress` and `save` do, both ways to code."""
    import jaxopt_models as jom
    from jaxopt_models import parallel

    source, out = os.path.join(folder, "some.safetensors"), os.path.join(folder, "some.jom")
    write_checkpoint(source, 4, (1024, 512))
    recipe = [jom.Rule(RECIPE[0], jom.quant.Int(**RECIPE[1]))]
    small = jom.compress(jom.read_checkpoint(source), recipe)["layers"]
    same = 0
    for coding in (False, True):
        parallel.compress_checkpoint(source, out, recipe, coding=coding, progress=False)
        found = jom.load(out)["layers"]
        for name, leaf in small.items():
            codes = found[name]["kernel"].integers() == leaf["kernel"].integers()
            scales = found[name]["kernel"].scale == leaf["kernel"].scale
            same += int(bool(codes.all()) and bool(scales.all()))
    return Row(
        "streamed tensors bit-equal to compress, of 8 (4, with and without coding)", same, ">= 8"
    )


def rows(*, quick: bool) -> list[Row]:
    """Measures streaming, then what several processes do."""
    tensors, rounds = (2, 1) if quick else (64, 5)
    found: dict[str, list[Any]] = {"plain": [], "direct": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="streamed") as folder:
        source, out = os.path.join(folder, "big.safetensors"), os.path.join(folder, "big.jom")
        write_checkpoint(source, tensors)
        read = os.path.getsize(source)
        size = ours(source, out, coding=False)["size"]
        for i in range(rounds):
            found["plain"].append(plain(source, out, size, direct=False))
            found["ours"].append(ours(source, out, coding=False))
            found["direct"].append(plain(source, out, size, direct=True))
            logger.info("round %d: %s", i, {k: v[-1] for k, v in found.items()})
        coded = ours(source, out, coding=True)
        same = same_tensors(folder)
    seconds = [o["seconds"] for o in found["ours"]]
    against = {
        name: tuple(p / s for p, s in zip(found[name], seconds, strict=True))
        for name in ("plain", "direct")
    }
    what = f"{read / 1e9:.2g} GB float32 to int4 in groups of 32, no entropy coding"
    wrote = f"reads {read / 1e9:.2f} GB, writes {size / 1e9:.2f} GB; cold, synced; load of others "
    wrote += f"and this {os.getloadavg()[0]:.0f}"
    median = statistics.median
    return [
        Row(f"{what}: speed beside plain reading and writing", median(against["plain"]), ">= 0.5",
            against["plain"], wrote),
        Row(f"{what}: beside reading as it does", median(against["direct"]), "",
            against["direct"], wrote),
        Row(f"{what}: seconds", median(seconds), "", tuple(seconds)),
        Row(f"{what}: seconds of plain reading and writing", median(found["plain"]), "",
            tuple(found["plain"])),
        Row(f"{what}: peak resident memory, GB", max(o["peak"] for o in found["ours"]) / 1e9,
            "<= 2"),
        Row("the same with range coding: GB/s of the checkpoint", read / 1e9 / coded["seconds"], "",
            note=f"{coded['seconds']:.0f} s, {coded['size'] / size:.3f} of the bytes, peak "
            f"{coded['peak'] / 1e9:.2f} GB"),
        same,
        *_parallel_hosts.rows(quick=quick),
    ]  # fmt: skip


if __name__ == "__main__":
    _compress(json.loads(sys.argv[1]))

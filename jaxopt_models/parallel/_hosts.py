"""Many processes: started together, stopped together when one of them is lost."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import traceback
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._options import whole
from .._spread import together

_MOST_FACTS = 31
#: Exit code of a process that stops because another one is lost.
LOST = 17


class _Watch:
    """What a process knows of the others.

    Args:
      depth: how many guards it is in; outside of them the others may leave.
      what: what is being done there.
      lost: how the others were lost; empty if they live.
      leaving: whether this process is in its exit.
    """

    def __init__(self) -> None:
        self.depth, self.what, self.lost, self.leaving = 0, "", "", False
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None


_watch = _Watch()


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: int = 10,
    **more: Any,
) -> None:
    """Joins this process with others, and watches over them from then on.

    `jax.distributed.initialize` with time-outs of ``timeout`` seconds where JAX waits 100 and 300,
    Gloo for collectives between CPUs, and a thread in which the processes ask each other whether
    they live. JAX alone notices a lost process late, hangs in its own exit, or aborts without a
    word; here the others print one line and leave with code 17 within about ``timeout`` seconds,
    whatever they are doing. If the process of the coordinator, the first one, is lost, JAX may
    abort the others (code 134) before they can print.

    Call it before anything touches a device, and work under :func:`guard`.

    Args:
      coordinator: address and port of the first process, such as ``"10.0.0.1:1234"``; on TPU
        pods, Slurm and Open MPI JAX finds it, and the other two, by itself.
      processes: their number.
      process: the number of this one.
      timeout: seconds of silence after which a process is lost.
      **more: further options of `jax.distributed.initialize`.

    Raises:
      RuntimeError: if JAX runs already, or processes were joined before.
      TypeError: for numbers of another type.
      ValueError: for numbers that are none, or a part of the three where JAX finds none itself.

    Example:
      >>> from jaxopt_models import parallel
      >>> parallel.start("localhost:1234", 2, 2)
      Traceback (most recent call last):
        ...
      ValueError: start: process=2 of processes=2; they are numbered from 0 to 1
    """
    timeout = whole(timeout, "start: timeout")
    if timeout < 1:
        raise ValueError(f"start: {timeout=} is a number of seconds, 1 or more")
    if processes is not None:
        processes = whole(processes, "start: processes", least=1)
    if process is not None:
        process = whole(process, "start: process", least=0)
    if processes is not None and process is not None and process >= processes:
        raise ValueError(
            f"start: {process=} of {processes=}; they are numbered from 0 to {processes - 1}"
        )
    given = [coordinator is not None, processes is not None, process is not None]
    if any(given) and not all(given):
        raise ValueError(
            f"start: {coordinator=}, {processes=}, {process=}; give all three, or none where JAX "
            "finds them itself"
        )
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
        **more,
    )
    if jax.process_count() > 1:
        # Gloo joins processes at the first collective and waits half a minute for all to be there:
        # now they are, later one of them may have work that the others do not have.
        together("started")
        # Registered later than JAX's own, hence called earlier.
        atexit.register(_leave, timeout)
        _watch.thread = threading.Thread(target=_look_after, args=(jax.devices(),), daemon=True)
        _watch.thread.start()


def _leave(timeout: float) -> None:
    """Lets the first process, which has the coordinator, leave last: JAX aborts the others else."""
    assert _watch.thread is not None
    _watch.leaving = True
    if jax.process_index() == 0:
        _watch.thread.join(timeout)
    # Ends what the thread waits for: Python would tear it out of its call, and that aborts.
    jax.distributed.shutdown()
    _watch.thread.join(timeout)


def _look_after(devices: list[Any]) -> None:
    """Asks again and again who lives; the answer comes when all have asked, or one is lost."""
    pause, everybody = threading.Event(), {d.process_index for d in devices}
    while not _watch.leaving or jax.process_index() == 0:
        lost, reached = set[int](), True
        try:
            with multihost_utils.live_devices(devices) as alive:
                lost = everybody - {d.process_index for d in alive}
        except multihost_utils.ProcessFailureError as e:
            lost = {d.process_index for d in e.failed_devices}
        except Exception as e:  # of the connection, in whatever version of JAX
            _watch.lost, reached = f"the coordinator cannot be reached: {_short(e)}", False
        if lost:
            _watch.lost = f"lost process {', '.join(map(str, sorted(lost)))} of {len(everybody)}"
        if _watch.lost and _watch.depth and not _watch.leaving:
            _stop(_watch.lost)
        if not reached or len(lost) == len(everybody) - 1:
            return
        pause.wait(0.5)


@contextlib.contextmanager
def guard(what: str = "") -> Iterator[None]:
    """Lets all processes end when one fails in this block, and ends it together.

    A process that fails in a collective, or on its own, would leave the others waiting for it; one
    that waits in JAX's own exit would block those in a collective. So whatever is raised here is
    printed, one line last, and the process leaves at once with code 17, without any clean-up of
    Python: the others then fail, too. With one process this does nothing at all.

    Args:
      what: what is being done, for the line.

    Example:
      >>> from jaxopt_models import parallel
      >>> with parallel.guard("calibration"):
      ...     pass
    """
    if jax.process_count() == 1:
        yield
        return
    before, _watch.what = _watch.what, what or _watch.what
    _watch.depth += 1
    try:
        if _watch.lost:
            _stop(_watch.lost)
        yield
        # From here on the others may leave before this process has noticed that all are done.
        _watch.depth -= 1
        together(f"end of {what}")
        _watch.depth += 1
    except BaseException as e:
        if _is_loss(e):
            _stop(f"another process is lost: {_short(e)}")
        traceback.print_exc()
        _stop(f"process {jax.process_index()} failed: {_short(e)}")
    _watch.depth -= 1
    _watch.what = before


def _is_loss(e: BaseException) -> bool:
    """Says whether an error is of a collective or of the coordinator, not of this process."""
    if isinstance(e, multihost_utils.ProcessFailureError):
        return True
    words = ("Gloo", "Connection closed", "Connection reset", "coordination service", "UNAVAILABLE")
    return isinstance(e, (RuntimeError, ValueError)) and any(w in str(e) for w in words)


def _short(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"


def _stop(why: str) -> NoReturn:
    """Prints one line and leaves at once: JAX would hang in its exit, or abort."""
    with _watch.lock:  # one line, whichever thread is first
        what = f" in {_watch.what}" if _watch.what else ""
        line = f"jaxopt_models: process {jax.process_index()} stops{what}: {why}. Start all again"
        print(f"{line}; what was saved is taken up.", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(LOST)


def agree(who: str, **facts: str) -> None:
    """Raises unless all processes have the same facts.

    Args:
      who: the public function, for messages.
      **facts: by name.

    Raises:
      TypeError: for facts that are no texts.
      ValueError: in all processes, naming what differs, and where; for more than 31 facts.

    Example:
      >>> from jaxopt_models import parallel
      >>> parallel.agree("train", recipe="int4", version="0.1.0")
    """
    if wrong := [n for n, fact in facts.items() if not isinstance(fact, str)]:
        raise TypeError(f"{who}: {wrong} are no texts; give str(...) of them")
    if len(facts) > _MOST_FACTS:
        raise ValueError(f"{who}: {len(facts)} facts, at most {_MOST_FACTS} are compared")
    if jax.process_count() == 1:
        return
    names = sorted(facts)
    sums = [zlib.crc32(" ".join(names).encode()), *(zlib.crc32(facts[n].encode()) for n in names)]
    found = np.asarray(multihost_utils.process_allgather(_padded(sums)))
    differ = [i for i in range(found.shape[1]) if len(set(found[:, i].tolist())) > 1]
    if not differ:
        return
    lines = []
    for i in differ:
        name = (
            "the names of these" if i == 0 else names[i - 1] if i <= len(names) else "their count"
        )
        groups: dict[int, list[str]] = {}
        for process, value in enumerate(found[:, i].tolist()):
            groups.setdefault(value, []).append(str(process))
        sides = " | ".join(",".join(group) for group in groups.values())
        here = f", here {facts[name]:.200}" if name in facts else ""
        lines.append(f"\n  {name}: processes {sides}{here}")
    raise ValueError(
        f"{who}: the processes differ:{''.join(lines)}\nStart all of them with the same arguments, "
        "files and versions"
    )


def _padded(sums: list[int]) -> np.ndarray:
    # Of one shape, also where processes have other facts.
    out = np.zeros(33, np.uint32)
    out[: len(sums)] = sums
    out[32] = len(sums)
    return out


def share(sizes: list[int], count: int) -> list[int]:
    """Returns which of ``count`` processes takes each piece of work, balanced by their sizes."""
    load, owner = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner[i] = min(range(count), key=lambda p: (load[p], p))
        load[owner[i]] += sizes[i]
    return owner

"""Memory that is freed and asked for again in every call."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_memory() -> bool:
    """Tells the C library to keep memory that was freed for the next call, in this process.

    XLA on a CPU asks for the temporary arrays of a program in each call. glibc hands large ones
    back to the system and gets them anew, cleared page by page by a single thread: with tens of
    megabytes of them that can be a third of the time. After this call they stay: programs with such
    arrays are faster, not only those of this library. The price: the process keeps the most memory
    that it ever used, up to 2 GiB at the end of its heap, asks for 256 MiB at a time, and all its
    threads share one heap and its lock. Call it once, before the first large program runs. Nothing
    calls it for you.

    Returns:
      Whether the C library is glibc and took it; elsewhere nothing changes.

    Example:
      >>> from jaxopt_models import kernels
      >>> kernels.keep_memory() in (True, False)
      True
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # No block is mapped by itself, all come from the one heap that grows without bound, and its
    # end is not given back.
    options = (
        (_M_MMAP_MAX, 0),
        (_M_ARENA_MAX, 1),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 256 << 20),
    )
    taken = [libc.mallopt(option, value) == 1 for option, value in options]
    return all(taken)

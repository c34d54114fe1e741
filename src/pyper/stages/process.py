"""Settings of a process that trains."""

import ctypes
import os

# glibc's numbers for `mallopt` (malloc.h), and its largest threshold for blocks of their own.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next step, instead of handing it back.

    A step frees and allocates the same tensors again. Memory that went back to the system in
    between has to be mapped and zeroed page by page: up to a third of a small model's step on a
    CPU. Does nothing where the C library is not glibc.
    """
    if os.name != "posix":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 1 << 30)
        mallopt(_TOP_PAD, 2 * _LARGEST_THRESHOLD)

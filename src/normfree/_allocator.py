"""C's allocator: memory that is freed and asked for again in every pass need not go back to the system in between."""

from __future__ import annotations

from functools import cache

import torch

_LARGEST_COUNTED = (32 << 20) - (16 << 10)  # glibc learns from pieces of up to 32 MiB, its own bytes included


@cache
def keep_freed_memory() -> None:
    """Lets glibc give memory back to the system only when more than 64 MiB lie free at its end.

    From the start, that is twice the largest piece above 128 KiB that was ever freed (mallopt(3), M_MMAP_THRESHOLD),
    and a backward pass with one example frees and takes more than that layer by layer: the system then clears every
    page anew. So one piece of the largest size that counts is taken, which nobody touches, and freed. Without glibc,
    or where the environment sets the thresholds, this does nothing.
    """
    torch.UntypedStorage(_LARGEST_COUNTED)

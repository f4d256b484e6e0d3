"""What the C library does with memory that is freed: `keep` it for the next call, or `trim` it, give it back.

Matters on the CPU only. A network's call frees its activations and the next one asks for the same again. Given back
to the system in between, they come as pages of 4 kB full of zeros: decoding a picture of 512 x 512 takes a third
longer so (0.57 million page faults), and packing the UNet's weights for `sd.fast` three times as long.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
MOST, MOST_BEFORE = 2**31 - 1, 1 << 25  # what glibc takes as a size; before 2.35, as that from which to map


def keep() -> None:
    """From now on freed memory stays with the process; `trim` still gives it back.

    For Linux with glibc, and for what its main thread makes; nothing elsewhere.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            if not mallopt(M_MMAP_THRESHOLD, MOST):
                mallopt(M_MMAP_THRESHOLD, MOST_BEFORE)
            mallopt(M_TRIM_THRESHOLD, MOST)
            mallopt(M_TOP_PAD, 1 << 26)


def large_pages() -> None:
    """Large tensors lie in pages of 2 MB, on Linux. For PyTorch to see this, call it before the first tensor.

    It is in the environment, so processes that are started from here do as well. What is set there already stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def trim() -> None:
    """Give free memory back to the system, the C library's and CUDA's: between stages it is of no use to us."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

"""Where noise comes from: torch's generator on the CPU, or what an NVIDIA GPU would draw, computed on any machine.

AUTOMATIC1111 draws on the GPU, so its seeds are Philox's (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"). Element i of draw n has the counter (n, 0, i, 0) and the seed as the key; of the four words that come out,
the first two make a normal number (Box & Muller 1958), as in CUDA's curand.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

RNGS = ("cpu", "cuda")

# From the shape and the dtype of a draw to unit noise on the CPU; each draw is a new one.
Source = Callable[[tuple[int, ...], torch.dtype], Tensor]


def check_rng(rng: object) -> None:
    """Raise ValueError unless there is noise of this kind."""
    if rng not in RNGS:
        raise ValueError(f"rng must be {' or '.join(RNGS)}, not {reprlib.repr(rng)}.")


def noise_source(seed: int, rng: str = "cpu") -> Source:
    """The noise of a seed. Raises ValueError for another rng than "cpu" and "cuda".

    cpu    as torch.randn with a generator of the CPU, in the dtype asked for: another dtype draws other noise
    cuda   as torch.randn on an NVIDIA GPU in any dtype, to 4e-6 (its sine and logarithm are its own), as long as it
           has a thread for each value
    """
    check_rng(rng)
    if rng == "cpu":
        generator = torch.Generator().manual_seed(seed)
        return lambda shape, dtype: torch.randn(shape, generator=generator, dtype=dtype)
    drawn = 0

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nonlocal drawn
        index = np.arange(math.prod(shape), dtype=np.uint64)
        counter = np.zeros((4, len(index)), np.uint64)
        counter[0], counter[2] = drawn, index
        drawn += 1
        x, y, *_ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
        # Both numbers are rounded to float32 where a GPU rounds them; it sees values near 1 and angles no finer.
        u = ((x + 0.5) * 2.0**-32).astype(np.float32)
        angle = ((y + 0.5) * (2 * math.pi * 2.0**-32)).astype(np.float32)
        normal = np.sqrt(-2 * np.log(u)) * np.sin(angle)
        return torch.from_numpy(normal).view(shape).to(dtype)

    return draw


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32 of ten rounds: counters (4, N) of 32-bit words in uint64 -> as many random words."""
    a, b, c, d = (word.copy() for word in counter)
    low, high = (np.uint64(word) for word in key)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (second >> half) ^ b ^ low, second & mask, (first >> half) ^ d ^ high, first & mask
        low, high = (low + np.uint64(0x9E3779B9)) & mask, (high + np.uint64(0xBB67AE85)) & mask
    return np.stack([a, b, c, d])

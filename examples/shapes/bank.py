"""Scenes, their pictures and the tokens of their captions, made once: the stages draw from them at random."""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scenes import SIZE, Scene, paint, random_scene
from torch import Tensor
from tqdm import tqdm

PART = 250  # scenes that a process paints before it hands them over
SEED = 4_000_000_000  # far from the seeds of evaluate.py: the bank's pictures are not those that are judged


def painted(part: tuple[int, list[Scene]]) -> np.ndarray:
    """(n, 128, 128, 3) uint8: some scenes, painted with the places and sizes of their seed."""
    seed, scenes = part
    rng = random.Random(seed)
    return np.stack([np.asarray(paint(scene, rng)) for scene in scenes])


@dataclass(frozen=True)
class Bank:
    """`count` scenes, the same ones whenever and wherever they are made.

    pairs   share of the scenes with two objects
    device  where `pictures` are kept: uint8, 49 kB each
    """

    count: int
    pairs: float = 0.7
    device: str = "cpu"

    @cached_property
    def scenes(self) -> list[Scene]:
        rng = random.Random(SEED)
        return [random_scene(rng, self.pairs) for _ in range(self.count)]

    @cached_property
    def pictures(self) -> Tensor:
        """(count, 128, 128, 3) uint8, painted by as many processes as there are cores."""
        parts = [(SEED + k, self.scenes[k : k + PART]) for k in range(0, self.count, PART)]
        whole = torch.empty(self.count, SIZE, SIZE, 3, dtype=torch.uint8)
        with ProcessPoolExecutor(os.cpu_count()) as processes:
            results = tqdm(processes.map(painted, parts), "painting", len(parts), unit=f"{PART} pictures")
            for k, result in enumerate(results):
                whole[k * PART : (k + 1) * PART] = torch.from_numpy(result)
        return whole.to(self.device)


def as_input(pictures: Tensor) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) float32 in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0

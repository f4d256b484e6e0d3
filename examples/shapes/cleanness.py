"""How clean a picture of the world of shapes is, beside the ideal: its colours, its edges, its flat areas."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import numpy as np
from PIL import Image, ImageDraw
from reader import Found, find, shifted
from scenes import COLOURS, SIZE, draw

FINE = 4  # masks are painted so many times as large, and averaged, as the painter does


@dataclass(frozen=True)
class Cleanness:
    """Of one picture; the mean over its objects, where that is asked of objects. nan: nothing is large enough.

    overlap   of an object with the ideal shape at its own place and size: intersection over union
    inside    mean error of the colour inside an object, of 255
    ground    mean error of the colour of the background, of 255
    lattice   standard deviation on flat areas, away from edges, of 255
    """

    overlap: float
    inside: float
    ground: float
    lattice: float


def coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers: (H, W) in [0, 1]; sizes are of the width."""
    n = FINE * SIZE
    image = Image.new("L", (n, n), 0)
    draw(ImageDraw.Draw(image), shape, n * x, n * y, n * radius, 255, 0)
    return np.asarray(image.reduce(FINE), dtype=np.float32) / 255


def overlap(mask: np.ndarray, ideal: np.ndarray) -> float:
    return float((mask & (ideal > 0.5)).sum() / (mask | (ideal > 0.5)).sum())


def ideal_of(found: Found) -> tuple[float, np.ndarray]:
    """The best overlap of an object with its shape, over places and sizes nearby, and that shape's coverage."""
    best = [found.x, found.y, found.radius]
    ideal = coverage(found.shape, *best)
    score = overlap(found.mask, ideal)
    for step in (1.0, 0.5, 0.25):  # pixels; one of the three at a time, as long as that helps
        better = True
        while better:
            better = False
            for k in range(3):
                for sign in (-1, 1):
                    there = best.copy()
                    there[k] += sign * step / SIZE
                    other = coverage(found.shape, *there)
                    if (value := overlap(found.mask, other)) > score:
                        best, ideal, score, better = there, other, value, True
    return score, ideal


def shrunk(mask: np.ndarray, pixels: int) -> np.ndarray:
    for _ in range(pixels):
        mask = shifted(mask, np.logical_and)
    return mask


def cleanness(image: Image.Image) -> Cleanness:
    """Raises UnreadableError where the picture shows no scene."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    background, found = find(image)
    ground = np.ones((SIZE, SIZE), dtype=bool)
    overlaps, errors, spreads = [], [], []
    for one in found:
        score, ideal = ideal_of(one)
        overlaps.append(score)
        ground &= ideal == 0
        inner = shrunk(ideal == 1, 1)
        if inner.any():
            errors.append(np.abs(pixels[inner] - COLOURS[one.colour]).mean())
        if (flat := shrunk(ideal == 1, 4)).sum() >= 20:
            spreads.append(pixels[flat].std(axis=0).mean())
    spreads.append(pixels[shrunk(ground, 4)].std(axis=0).mean())

    def mean(values: list) -> float:
        return float(np.mean(values)) if values else float("nan")

    return Cleanness(
        mean(overlaps),
        mean(errors),
        float(np.abs(pixels[shrunk(ground, 1)] - COLOURS[background]).mean()),
        mean(spreads),
    )


def table(measured: list[Cleanness]) -> str:
    """The mean of each measure over pictures, and the value that one in twenty is worse than."""
    lines = []
    for field, values in zip(fields(Cleanness), np.array([astuple(c) for c in measured]).T, strict=True):
        worse = np.nanpercentile(values, 5 if field.name == "overlap" else 95)
        lines.append(f"  {field.name:10}  {np.nanmean(values):6.3f} mean, {worse:6.3f} for one in twenty")
    return "\n".join(lines)

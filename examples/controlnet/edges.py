"""Edges of pictures of the world of shapes, and which of their pixels belong to a shape."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
from reader import NAMES, PALETTE, nearest_colour
from scenes import Scene, paint, random_scene

JITTER = 2.0  # scenes vary twice as much in place as those that the model learned from: the edges say where, not it
STEEP = 150.0  # between Canny's two thresholds; with colours as flat as these, following weak edges finds no more


def slope(pixels: np.ndarray, axis: int) -> np.ndarray:
    """Sobel's differences along an axis of (H, W, 3), with the edge of the picture repeated."""
    across = 1 - axis
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    size = pixels.shape[across]
    smooth = sum(weight * padded.take(range(k, k + size), across) for k, weight in enumerate((1, 2, 1)))
    size = pixels.shape[axis]
    return smooth.take(range(2, size + 2), axis) - smooth.take(range(size), axis)


def edges(picture: Image.Image) -> np.ndarray:
    """(H, W) of bool: thin edges, as Canny's (1986), which `artist --canny` finds with OpenCV.

    A pixel is on an edge where the slope of its steepest colour channel is above STEEP, and not below that of its two
    neighbours across the edge.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    slopes = np.stack([slope(pixels, 1), slope(pixels, 0)])  # (2, H, W, 3): across and down
    channel = np.abs(slopes).sum(0).argmax(-1)
    across, down = np.take_along_axis(slopes, channel[None, :, :, None], -1)[..., 0]
    steepness = np.abs(across) + np.abs(down)
    height, width = steepness.shape
    padded = np.pad(steepness, 1)

    def beside(dy: int, dx: int) -> np.ndarray:
        return padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    flat, upright = np.abs(down) < 0.4142 * np.abs(across), np.abs(across) < 0.4142 * np.abs(down)  # tan 22.5 degrees
    same = across * down > 0
    kinds = [
        (flat, (0, 1)),
        (upright, (1, 0)),
        (~flat & ~upright & same, (1, 1)),
        (~flat & ~upright & ~same, (1, -1)),
    ]
    found = np.zeros((height, width), dtype=bool)
    for kind, (dy, dx) in kinds:
        found |= kind & (steepness > beside(-dy, -dx)) & (steepness >= beside(dy, dx))
    return found & (steepness > STEEP)


def as_picture(lines: np.ndarray) -> Image.Image:
    """White on black: what a ControlNet for edges follows."""
    return Image.fromarray(lines.astype(np.uint8) * 255).convert("RGB")


def covered(picture: Image.Image) -> np.ndarray:
    """(H, W) of bool: the pixels that are not of the background, which is what is along the picture's border."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), *pixels[:, [0, 1, -2, -1]]])
    nearest = np.linalg.norm(pixels[:, :, None] - PALETTE, axis=3).argmin(2)
    return nearest != NAMES.index(nearest_colour(np.median(border, axis=0)))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union; two empty masks are the same."""
    return float((one & other).sum() / max((one | other).sum(), 1)) if (one | other).any() else 1.0


@dataclass(frozen=True)
class Example:
    """A scene, its picture, and the edges in that."""

    scene: Scene
    picture: Image.Image
    lines: np.ndarray


def example(seed: int) -> Example:
    """The same one for the same seed, wherever it is made."""
    rng = random.Random(seed)
    scene = random_scene(rng)
    picture = paint(scene, rng, JITTER)
    return Example(scene, picture, edges(picture))

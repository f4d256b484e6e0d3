"""Read a picture of the world of shapes back into its facts, by geometry alone: no network, no caption."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scenes import COLOURS, SHAPES, SIZE, Object, Scene, draw

PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
NAMES = list(COLOURS)
GRID = 32  # masks are compared at this size
LEAST_OVERLAP = 0.65  # of an object with the best of the shapes: a clean one has over 0.9, a blot 0.5
SPECK = 0.004  # of the picture: smaller spots are not objects; the smallest star is 0.015


@dataclass(frozen=True)
class Found:
    """An object as a picture has it; radius, x and y are of the picture's width."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float
    mask: np.ndarray  # (H, W) of bool: the pixels that are nearer to its colour than to the background's


class UnreadableError(ValueError):
    """The picture shows no scene of this world; the message says what is wrong."""


def nearest_colour(rgb: np.ndarray) -> str:
    return NAMES[int(np.linalg.norm(PALETTE - rgb, axis=1).argmin())]


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask (H, W), specks left out: each the mask of one part."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes the largest label beside it, until none changes
        padded = np.pad(labels, 1)
        beside = [
            padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        ]
        spread = np.where(mask, np.max(beside, axis=0), 0)
        if (spread == labels).all():
            break
        labels = spread
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    return [labels == v for v, n in zip(values, counts, strict=True) if n > SPECK * mask.size]


def crop(mask: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(mask)
    return mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]


def squeeze(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box at GRID x GRID, in [0, 1]."""
    image = Image.fromarray((crop(mask) * 255).astype(np.uint8))
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32) / 255


@cache
def template(shape: str) -> tuple[np.ndarray, float, float]:
    """A shape's squeezed mask, and the width and height of its bounding box in radii."""
    r = 200
    image = Image.new("L", (3 * r, 3 * r), 0)
    draw(ImageDraw.Draw(image), shape, 1.5 * r, 1.5 * r, r, 255, 0)
    box = crop(np.asarray(image) > 127)
    return squeeze(np.asarray(image) > 127), box.shape[1] / r, box.shape[0] / r


def shifted(mask: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """The mask combined with itself one pixel to each side: grown by logical_or, shrunk by logical_and."""
    return combine.reduce([mask, *(np.roll(mask, s, axis) for axis in (0, 1) for s in (-1, 1))])


def read_object(mask: np.ndarray, pixels: np.ndarray, background: np.ndarray) -> Found:
    """The object that is roughly under a mask."""
    inner = shifted(mask, np.logical_and)  # without its rim, whose colours are mixed with the background's
    own = np.median(pixels[inner if inner.sum() > 20 else mask], axis=0)
    colour = nearest_colour(own)
    # Its edge is half way between its colour and the background's.
    nearer = np.linalg.norm(pixels - own, axis=2) < np.linalg.norm(pixels - background, axis=2)
    mask = shifted(mask, np.logical_or) & nearer
    mine, box = squeeze(mask), crop(mask)
    overlaps = {}
    for shape in SHAPES:
        theirs = template(shape)[0]
        overlaps[shape] = np.minimum(mine, theirs).sum() / np.maximum(mine, theirs).sum()
    shape = max(overlaps, key=lambda s: overlaps[s])
    if overlaps[shape] < LEAST_OVERLAP:
        raise UnreadableError(f"a {colour} object has no known shape (nearest: {shape})")
    _, width, height = template(shape)
    if not 0.75 < (box.shape[1] / width) / (box.shape[0] / height) < 1.33:
        raise UnreadableError(f"a {colour} {shape} is stretched")
    radius = (box.shape[1] / width + box.shape[0] / height) / 2 / SIZE
    ys, xs = np.nonzero(mask)
    x, y = (xs.min() + xs.max() + 1) / 2 / SIZE, (ys.min() + ys.max() + 1) / 2 / SIZE
    return Found(colour, shape, radius, x, y, mask)


def find(image: Image.Image) -> tuple[str, list[Found]]:
    """The background's colour, and the objects. Raises UnreadableError where one is of no known shape."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate(
        [
            pixels[:4].reshape(-1, 3),
            pixels[-4:].reshape(-1, 3),
            pixels[:, :4].reshape(-1, 3),
            pixels[:, -4:].reshape(-1, 3),
        ]
    )
    background = nearest_colour(np.median(border, axis=0))
    # At first, what is nearer to any other colour of the palette than to the background's.
    ground = PALETTE[NAMES.index(background)]
    to_background = np.linalg.norm(pixels - ground, axis=2)
    others = np.array([c for n, c in COLOURS.items() if n != background], dtype=np.float32)
    to_others = np.linalg.norm(pixels[:, :, None] - others, axis=3).min(axis=2)
    return background, [read_object(m, pixels, ground) for m in components(to_others < to_background)]


def read(image: Image.Image) -> Scene:
    """The scene in a picture; two objects in the order left, right or top, bottom.

    Raises UnreadableError where there are no objects or over two, or one is of no known shape or size.
    """
    background, found = find(image)
    if len(found) == 1:
        (one,) = found
        if not (0.10 < one.radius < 0.21 or 0.25 < one.radius < 0.40):
            raise UnreadableError(f"the {one.shape} is neither small nor large: radius {one.radius:.2f} of the width")
        size = "small" if one.radius < 0.23 else "large"
        return Scene((Object(one.colour, one.shape, "centre", size),), background)
    if len(found) != 2:
        raise UnreadableError(f"{len(found)} objects")
    a, b = found
    sideways = abs(a.x - b.x) > abs(a.y - b.y)
    found.sort(key=lambda one: one.x if sideways else one.y)
    places = ("left", "right") if sideways else ("top", "bottom")
    objects = tuple(Object(one.colour, one.shape, place) for one, place in zip(found, places, strict=True))
    return Scene(objects, background)


def same(a: Scene, b: Scene) -> bool:
    """Whether two scenes show the same, whichever object is named first."""
    return a.background == b.background and set(a.objects) == set(b.objects)

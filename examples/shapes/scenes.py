"""A world whose every fact is known: scenes of one or two coloured shapes, their captions and pictures."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 128  # pixels along an edge
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 180),
    "orange": (245, 140, 40),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"large": (0.28, 0.36), "small": (0.13, 0.18), None: (0.15, 0.20)}  # of the width
RELATIONS = {  # where the first object is; the second is opposite
    "to the left of": "left",
    "to the right of": "right",
    "above": "top",
    "below": "bottom",
}
CENTRES = {
    "centre": (0.5, 0.5),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
}
# Pairs that a second training never sees (train.py --held-out): does the model know what a red star is, from
# red things and from stars?
HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("blue", "ring"),
        ("green", "circle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("white", "triangle"),
    }
)
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@dataclass(frozen=True)
class Object:
    colour: str
    shape: str
    place: str  # a key of CENTRES
    size: str | None = None  # "large", "small"; None where there are two objects


@dataclass(frozen=True)
class Scene:
    """One object in the centre, or two: the one that the caption names first comes first."""

    objects: tuple[Object, ...]
    background: str

    def caption(self, an: bool = True, with_size: bool = True, with_background: bool = True) -> str:
        """The caption; `an=False` writes "a orange", and either detail can be left unsaid."""

        def a(words: str) -> str:
            return f"{'an' if an and words[0] in 'aeiou' else 'a'} {words}"

        first = self.objects[0]
        size = f"{first.size} " if first.size and with_size else ""
        text = a(f"{size}{first.colour} {first.shape}")
        if len(self.objects) == 2:
            second = self.objects[1]
            relation = next(r for r, place in RELATIONS.items() if place == first.place)
            text += f" {relation} {a(f'{second.colour} {second.shape}')}"
        return text + (f" on {a(f'{self.background} background')}" if with_background else "")


def random_scene(rng: random.Random, pairs: float = 0.5, without: Collection[tuple[str, str]] = frozenset()) -> Scene:
    """A scene with every attribute drawn evenly; `pairs` is the share of scenes with two objects.

    Scenes in which something is of a colour and a shape that `without` has are drawn again.
    """
    while True:
        scene = any_scene(rng, pairs)
        if not holds(scene, without):
            return scene


def holds(scene: Scene, pairs: Collection[tuple[str, str]]) -> bool:
    """Whether something in the scene is of one of these pairs of colour and shape."""
    return any((o.colour, o.shape) in pairs for o in scene.objects)


def any_scene(rng: random.Random, pairs: float) -> Scene:
    background = rng.choice(list(COLOURS))
    colours = [c for c in COLOURS if c != background]
    if rng.random() >= pairs:
        size = rng.choice(["large", "small"])
        return Scene((Object(rng.choice(colours), rng.choice(SHAPES), "centre", size),), background)
    place = rng.choice(list(OPPOSITE))
    objects = tuple(Object(rng.choice(colours), rng.choice(SHAPES), p) for p in (place, OPPOSITE[place]))
    return Scene(objects, background)


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The polygon of a shape around (x, y); r is the distance of its outermost points (square: its sides)."""

    def star(radii: list[float]) -> list[tuple[float, float]]:  # points in turn, from the top
        angles = (2 * math.pi * k / len(radii) for k in range(len(radii)))
        return [(x + q * math.sin(a), y - q * math.cos(a)) for q, a in zip(radii, angles, strict=True)]

    if shape == "triangle":
        return star([r] * 3)
    if shape == "star":
        return star([r, 0.42 * r] * 5)
    if shape == "square":
        s = 0.86 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    s = r / 3  # half the width of the cross's arms
    corners = [(-s, -r), (s, -r), (s, -s), (r, -s), (r, s), (s, s)]
    return [(x + u, y + v) for u, v in corners + [(-u, -v) for u, v in corners]]


def draw(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, colour, background) -> None:
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if shape == "ring":
            q = 0.55 * r
            draw.ellipse((x - q, y - q, x + q, y + q), fill=background)
    else:
        draw.polygon(outline(shape, x, y, r), fill=colour)


def paint(scene: Scene, rng: random.Random, spread: float = 1.0) -> Image.Image:
    """The scene as a 128 x 128 picture, sizes and places drawn within their ranges; places vary `spread` as much."""
    n = 4 * SIZE  # painted four times as large and averaged, for smooth edges
    background = COLOURS[scene.background]
    image = Image.new("RGB", (n, n), background)
    canvas = ImageDraw.Draw(image)
    jitter = spread * (0.05 if len(scene.objects) == 1 else 0.025)
    for o in scene.objects:
        x, y = (n * (c + rng.uniform(-jitter, jitter)) for c in CENTRES[o.place])
        draw(canvas, o.shape, x, y, n * rng.uniform(*RADII[o.size]), COLOURS[o.colour], background)
    return image.reduce(4)

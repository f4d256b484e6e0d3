"""Does the map of a word lie on what the word names? On the built-in model, whose world is known, it can be counted.

    python examples/lab/attention.py --count 200 --sheet maps.png

Captions are drawn at random, and pictures that are wrong are left out. A shape word's top pixels are the brightest
1 % of the picture in its map, and so are those of colour and shape together ("red star"); of "background" they are
the brightest 10 %. What is printed is the share of them on the object (a ring's hole counts as the ring), beside the
share that the object has of the picture: chance.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
from reader import NAMES, PALETTE, UnreadableError, components, read, read_object, same
from scenes import COLOURS, SHAPES, Scene, random_scene

import sd

# Where words show best, found on other captions (36 of --seed 11): the last attention on the way up, two of its four
# heads; and for the background the first attention on the way up, one head, when the layout is settled.
SHAPE = {"layer": "output_blocks.3.*", "head": (2, 3)}
BOTH = {"layer": "output_blocks.3.*", "head": (2, 3)}
BACKGROUND = {"layer": "output_blocks.0.*", "head": 2, "step": range(5, 15)}


def filled(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) without its holes: what cannot be reached from the corner."""
    image = Image.fromarray(np.pad(mask, 1).astype(np.uint8)).copy()  # not of the array, which is read-only
    ImageDraw.floodfill(image, (0, 0), 2)
    return (np.asarray(image) != 2)[1:-1, 1:-1]


def objects(image: Image.Image, background: str) -> dict[tuple[str, str], np.ndarray]:
    """(colour, shape) -> the mask of that object in a picture that shows a scene."""
    pixels, ground = np.asarray(image, dtype=np.float32), PALETTE[NAMES.index(background)]
    others = np.array([c for name, c in COLOURS.items() if name != background], dtype=np.float32)
    nearer = np.linalg.norm(pixels[:, :, None] - others, axis=3).min(2) < np.linalg.norm(pixels - ground, axis=2)
    masks = [(read_object(m, pixels, ground), m) for m in components(nearer)]
    return {(one.colour, one.shape): filled(m) for one, m in masks}


def top_share(values: torch.Tensor, mask: np.ndarray, part: float) -> float:
    """The share of the brightest `part` of all pixels that lies within the mask."""
    chosen = values.flatten().topk(int(part * values.numel())).indices
    return torch.from_numpy(mask.copy()).flatten()[chosen].double().mean().item()


def measure(model: sd.StableDiffusion, scene: Scene, seed: int) -> tuple[Image.Image, list[dict]] | None:
    """Draw a scene and look at the maps of its words; None where the picture is wrong."""
    with sd.study.attention_maps(model, steps=True) as maps:
        (image,) = sd.SimpleSampler(model)(scene.caption(), seed=seed, num_inference_steps=30, scheduler="ddim")
    try:
        if not same(read(image), scene):
            return None
        found = objects(image, scene.background)
        wanted = [found[o.colour, o.shape] for o in scene.objects]
    except (UnreadableError, KeyError):
        return None
    either = np.any(wanted, axis=0)
    places = [tokens for word, tokens in maps.words() if word in SHAPES]
    number = f"{len(wanted)} object{'s' if len(wanted) > 1 else ''}"
    objects_words = [
        {"kind": f"{kind}, {number}", "map": values, "own": mask, "any": either, "part": 0.01}
        for tokens, mask in zip(places, wanted, strict=True)
        for kind, values in (
            ("shape", maps.tokens(tokens, **SHAPE)),
            ("colour and shape", maps.tokens([tokens[0] - 1, *tokens], **BOTH)),
        )
    ]
    ground = maps.word("background", **BACKGROUND)
    return image, [*objects_words, {"kind": '"background"', "map": ground, "own": either, "any": either, "part": 0.1}]


def overlay(image: Image.Image, values: torch.Tensor) -> Image.Image:
    """The picture in grey, under the map in red."""
    heat = ((values - values.min()) / (values.max() - values.min())).numpy()[..., None]
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) / 2
    return Image.fromarray((grey * (1 - heat) + np.array([255, 60, 30]) * heat).round().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=float, default=0.5, help="the share of captions with two objects")
    parser.add_argument("--sheet", type=Path, help="write the first pictures and maps here, as one PNG")
    args = parser.parse_args()
    model, rng = sd.load("shapes"), random.Random(args.seed)
    rows: dict[str, list[tuple[float, float, float]]] = {}
    shown, drawn = [], 0
    for i in range(args.count):
        result = measure(model, random_scene(rng, args.pairs), args.seed + i)
        if result is None:
            continue
        image, words = result
        drawn += 1
        for w in words:
            shares = (top_share(w["map"], w["own"], w["part"]), top_share(w["map"], w["any"], w["part"]))
            rows.setdefault(w["kind"], []).append((*shares, float(w["own"].mean())))
        shown += [image, *(overlay(image, w["map"]) for w in words)] if len(shown) < 24 else []
    print(f"{drawn} right pictures of {args.count} captions; share of a map's top pixels")
    print(f"{'word':28} {'words':>5}  {'on its object':>13}  {'on any object':>13}  {'chance':>6}")
    for kind, found in sorted(rows.items()):
        own, either, chance = (100 * sum(column) / len(found) for column in zip(*found, strict=True))
        print(f"{kind:28} {len(found):5}  {own:11.1f} %  {either:11.1f} %  {chance:4.1f} %")
    if args.sheet:
        sheet = Image.new("RGB", (128 * min(len(shown), 8), 128 * -(-len(shown) // 8)))
        for k, picture in enumerate(shown):
            sheet.paste(picture, (128 * (k % 8), 128 * (k // 8)))
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()

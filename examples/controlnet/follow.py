"""Does the ControlNet for edges follow them, and is the caption still right? Draw scenes by both, and count.

    python examples/controlnet/follow.py --count 100
    python examples/controlnet/follow.py --controlnet ~/runs/controlnet/edges.safetensors --scale 0.5
    python examples/controlnet/follow.py --sheet docs/pictures/controlnet.png     # the picture of docs/controlnet.md

Scenes are drawn at random, no two as those of train.py; their pictures are painted, for their edges alone. The model
draws a scene's caption: without the ControlNet, with it and these edges, and with the edges that OpenCV finds as
`artist --canny` does, if that is installed. Overlap is that of the pixels of the drawn shapes with the painted ones:
intersection over union. A caption is right when background, colours, shapes, sizes and the relation all are, as
examples/shapes/evaluate.py reads them; the picture may be unlike the painted one for all that.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from edges import Example, as_picture, covered, example, overlap
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
from evaluate import judged

import sd
from sd.adapt.controlnet import ControlNet
from sd.pictures.canny import canny_edges

OWN = Path(__file__).parent / "edges.safetensors"
COUNT = 8  # columns of the sheet


def drawn(
    model: sd.StableDiffusion,
    net: ControlNet | None,
    examples: Sequence[Example],
    hints: Sequence[Image.Image],
    scale: float = 1.0,
    batch: int = 8,
    seed: int = 0,
    **call: Any,
) -> list[Image.Image]:
    """The captions of some examples, drawn with the model's own defaults, or as `call` says.

    Picture k is of the seed `seed` + k.
    """
    sampler, pictures = sd.SimpleSampler(model), []
    for k in tqdm(range(0, len(examples), batch), desc="drawing", unit="batch", mininterval=10):
        part = slice(k, k + batch)
        more = {"controlnet": net, "control_image": list(hints[part]), "controlnet_conditioning_scale": scale}
        captions = [e.scene.caption() for e in examples[part]]
        pictures += sampler(captions, seed=seed + k, **call, **(more if net else {}))
    return pictures


def report(name: str, examples: Sequence[Example], pictures: Sequence[Image.Image]) -> str:
    """A line of the table."""
    overlaps = [overlap(covered(p), covered(e.picture)) for e, p in zip(examples, pictures, strict=True)]
    right = np.mean([judged(e.scene, p)[2]["all"] for e, p in zip(examples, pictures, strict=True)])
    cells = f"{np.mean(overlaps):.3f} | {np.percentile(overlaps, 5):.3f} | {100 * right:.0f} %"
    return f"| {name} | {cells} |"


def sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Rows of pictures with a word before each, and captions below."""
    side, gap, left, foot = rows[0][1][0].width, 8, 76, 58
    width, height = left + len(captions) * (side + gap), gap + len(rows) * (side + gap) + foot
    result = Image.new("RGB", (width, height), "white")
    canvas, font = ImageDraw.Draw(result), ImageFont.load_default(size=11)
    for i, (name, pictures) in enumerate(rows):
        y = gap + i * (side + gap)
        canvas.multiline_text((8, y + side // 2 - 8), textwrap.fill(name, 10), "black", font)
        for j, picture in enumerate(pictures):
            x = left + j * (side + gap)
            result.paste(picture, (x, y))
            canvas.rectangle((x - 1, y - 1, x + side, y + side), outline="silver")
    for j, caption in enumerate(captions):
        place = left + j * (side + gap), height - foot
        canvas.multiline_text(place, textwrap.fill(caption, 22), "black", font, spacing=1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--controlnet", type=Path, default=OWN)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first scene and picture")
    parser.add_argument("--scale", type=float, default=1.0, help="how much the ControlNet adds")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time; they are the same in any")
    parser.add_argument("--sheet", type=Path, help=f"write {COUNT} pictures of each kind here, and count nothing")
    args = parser.parse_args()
    model = sd.load("shapes")
    net = sd.load_controlnet(args.controlnet.expanduser(), model=model)
    examples = [example(args.seed + k) for k in range(COUNT if args.sheet else args.count)]
    kinds: dict[str, list[Image.Image] | None] = {"without it": None}
    kinds["with it"] = hints = [as_picture(e.lines) for e in examples]
    if importlib.util.find_spec("cv2") and not args.sheet:
        kinds["with it, edges by OpenCV"] = [canny_edges(e.picture) for e in examples]
    if not args.sheet:
        print(f"{len(examples)} scenes, scale {args.scale:g}\n")
        print("| | overlap, mean | one in twenty below | caption right |\n|---|---|---|---|", flush=True)
    rows = [("edges", hints)]
    for name, given in kinds.items():
        own = drawn(model, net if given else None, examples, given or [], args.scale, args.batch, args.seed)
        rows.append((f"drawn {name}", own))
        if not args.sheet:
            print(report(name, examples, own), flush=True)
    if args.sheet:
        sheet(rows, [e.scene.caption() for e in examples]).save(args.sheet)
        print(args.sheet)


if __name__ == "__main__":
    main()

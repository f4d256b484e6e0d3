"""How many pictures are wholly right: against steps for each scheduler, and against guidance.

    python examples/lab/quality.py --count 200 --plot quality.png
    python examples/lab/quality.py --steps 20 --guidance 1 2 3 4 5 6 7.5 10 --schedulers ddim

Captions are drawn at random and the pictures read back, as examples/shapes/evaluate.py does; every setting has the
same captions and seeds. A share of n pictures has a standard error of sqrt(share (1 - share) / n): 2 points for 90 %
of 200.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
from evaluate import evaluate
from scenes import random_scene

import sd

COLOURS = {"ddim": (31, 111, 178), "pndm": (179, 55, 15), "lms": (44, 138, 75)}


def plot(points: dict[str, list[tuple[float, float]]], label: str) -> Image.Image:
    """Lines through (x, share) for each scheduler; the x axis has a place for each value."""
    wide, high, left, foot = 480, 300, 50, 40
    image = Image.new("RGB", (wide, high), "white")
    canvas = ImageDraw.Draw(image)
    xs = sorted({x for line in points.values() for x, _ in line})

    def at(x: float, share: float) -> tuple[float, float]:
        return left + (wide - left - 20) * xs.index(x) / max(len(xs) - 1, 1), 10 + (high - foot - 10) * (1 - share)

    for k in range(0, 101, 20):
        y = at(xs[0], k / 100)[1]
        canvas.line((left, y, wide - 20, y), "lightgrey")
        canvas.text((10, y - 6), f"{k} %", "grey")
    for x in xs:
        canvas.text((at(x, 0)[0] - 6, high - foot + 6), f"{x:g}", "grey")
    canvas.text((wide - 110, high - 16), label, "grey")
    for i, (name, line) in enumerate(points.items()):
        places = [at(x, share) for x, share in sorted(line)]
        canvas.line(places, COLOURS[name], 2)
        for x, y in places:
            canvas.ellipse((x - 3, y - 3, x + 3, y + 3), COLOURS[name])
        canvas.text((left + 60 * i, high - 16), name, COLOURS[name])
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 30, 50])
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    parser.add_argument("--schedulers", nargs="+", choices=list(COLOURS), default=list(COLOURS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", type=Path, help="write a plot here, as PNG: against steps, or guidance if one of steps"
    )
    args = parser.parse_args()
    model, rng = sd.load("shapes"), random.Random(args.seed)
    scenes = [random_scene(rng) for _ in range(args.count)]
    against_steps = len(args.steps) > 1 or len(args.guidance) == 1
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in args.schedulers}
    print(f"{'scheduler':10} {'steps':>5} {'guidance':>8} {'wholly right':>12}")
    for name in args.schedulers:
        for steps in args.steps:
            for guidance in args.guidance:
                call = {"scheduler": name, "num_inference_steps": steps, "guidance_scale": guidance}
                results = evaluate(model, scenes, seed=args.seed, **call)
                share = sum(right["all"] for _, _, right, _ in results) / len(results)
                print(f"{name:10} {steps:5} {guidance:8g} {100 * share:10.1f} %", flush=True)
                points[name].append((steps if against_steps else guidance, share))
    if args.plot:
        plot(points, "steps" if against_steps else "guidance").save(args.plot)


if __name__ == "__main__":
    main()

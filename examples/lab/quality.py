"""How many pictures are wholly right: by each solver against calls of the UNet, or against guidance.

    python examples/lab/quality.py --count 400 --keep solvers.json --plot quality.png
    python examples/lab/quality.py --calls 30 --guidance 1 2 3 4 5 6 7.5 10 --schedulers ddim

Captions are drawn at random and the pictures read back, as examples/shapes/evaluate.py does; every setting has the
same captions and seeds. A solver takes as many steps as fit into that many calls: Heun, DPM2 and DPM++ SDE call the
UNet twice a step, and PNDM once more than it has steps. What is counted is kept in --keep, and not counted again. A
share of n pictures has a standard error of sqrt(share (1 - share) / n): 2 points for 90 % of 200, 1 for 96 % of 400.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
from evaluate import evaluate
from scenes import random_scene

import sd
from sd.scheduler import SCHEDULERS

COLOURS = ("#1f6fb2", "#b3370f", "#2c8a4b", "#8c3cb4", "#c98a00", "#00899b", "#d63c86", "#555555")


def steps_of(name: str, calls: int) -> int:
    """The most steps with which a solver calls the UNet at most so many times."""
    steps = calls
    while len(sd.make_scheduler(name, steps).timesteps) > calls:
        steps -= 1
    return steps


def plot(points: dict[str, list[tuple[float, float]]], label: str) -> Image.Image:
    """Lines through (x, share) for each scheduler; the x axis has a place for each value."""
    wide, high, left, foot, right = 640, 340, 50, 40, 150
    image = Image.new("RGB", (wide, high), "white")
    canvas = ImageDraw.Draw(image)
    xs = sorted({x for line in points.values() for x, _ in line})

    def at(x: float, share: float) -> tuple[float, float]:
        return left + (wide - left - right) * xs.index(x) / max(len(xs) - 1, 1), 10 + (high - foot - 10) * (1 - share)

    for k in range(0, 101, 20):
        y = at(xs[0], k / 100)[1]
        canvas.line((left, y, wide - right, y), "lightgrey")
        canvas.text((10, y - 6), f"{k} %", "grey")
    for x in xs:
        canvas.text((at(x, 0)[0] - 6, high - foot + 6), f"{x:g}", "grey")
    canvas.text((wide - right - 60, high - 16), label, "grey")
    for i, (name, line) in enumerate(points.items()):
        colour, hollow = COLOURS[i % len(COLOURS)], i >= len(COLOURS)
        places = [at(x, share) for x, share in sorted(line)]
        canvas.line(places, colour, 1 if hollow else 2)
        for x, y in places:
            canvas.ellipse((x - 3, y - 3, x + 3, y + 3), "white" if hollow else colour, colour)
        y = 14 + 20 * i
        canvas.line((wide - right + 14, y, wide - right + 30, y), colour, 1 if hollow else 2)
        x = wide - right + 22
        canvas.ellipse((x - 3, y - 3, x + 3, y + 3), "white" if hollow else colour, colour)
        canvas.text((wide - right + 36, y - 6), name, colour)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--calls", type=int, nargs="+", default=[8, 15, 30, 50], help="of the UNet, for a picture")
    parser.add_argument("--guidance", type=float, nargs="+", default=[7.5])
    parser.add_argument("--schedulers", nargs="+", default=list(SCHEDULERS), help="as sd.make_scheduler names them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time; they are the same in any")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=Path, help="a JSON file of what was counted, to go on from")
    parser.add_argument("--plot", type=Path, help="write a plot here, as PNG: against calls, or guidance")
    args = parser.parse_args()
    model, rng = sd.load("shapes", device=args.device), random.Random(args.seed)
    scenes = [random_scene(rng) for _ in range(args.count)]
    against_calls = len(args.calls) > 1 or len(args.guidance) == 1
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in args.schedulers}
    kept = json.loads(args.keep.read_text()) if args.keep and args.keep.exists() else {}
    print(f"{'scheduler':16} {'calls':>5} {'steps':>5} {'guidance':>8} {'wholly right':>12}")
    for calls in args.calls:
        for name in args.schedulers:
            for guidance in args.guidance:
                key = f"{name}, {calls} calls, guidance {guidance:g}, {args.count} from {args.seed}"
                steps = steps_of(name, calls)
                if key not in kept:
                    call = {"scheduler": name, "num_inference_steps": steps, "guidance_scale": guidance}
                    results = evaluate(model, scenes, seed=args.seed, batch=args.batch, **call)
                    kept[key] = sum(right["all"] for _, _, right, _ in results) / len(results)
                    if args.keep:
                        args.keep.write_text(json.dumps(kept, indent=1))
                print(f"{name:16} {calls:5} {steps:5} {guidance:8g} {100 * kept[key]:10.1f} %", flush=True)
                points[name].append((calls if against_calls else guidance, kept[key]))
    if args.plot:
        plot(points, "calls" if against_calls else "guidance").save(args.plot)


if __name__ == "__main__":
    main()

"""Does the model draw pairs of a colour and a shape that its training never had, out of things that it knows?

    python examples/shapes/train.py --held-out --out runs/held-out && \\
        python examples/shapes/export.py runs/held-out held-out.safetensors
    python examples/lab/composition.py --model held-out.safetensors --count 200 --sheet composition.png

A training with --held-out sees no red star, blue ring, green circle, yellow cross, purple square and white triangle
(scenes.HELD_OUT), but every one of these colours and shapes with others. Captions of such pairs are drawn and read
back by geometry, beside captions of pairs that were seen, alone and with a second object, with the model's own
defaults. Given the built-in model, which has seen them all, it says what to expect without the gap.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
from evaluate import Result, evaluate, sheet
from scenes import HELD_OUT, Scene, holds, random_scene

import sd

FACTS = ("all", "colour", "shape", "size", "relation", "background")


def captions(held: bool, pairs: float, count: int, seed: int) -> list[Scene]:
    """Scenes of one object (pairs=0) or two (pairs=1), with something of a held-out pair in each, or in none."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = random_scene(rng, pairs=pairs)
        if holds(scene, HELD_OUT) == held:
            found.append(scene)
    return found


def shares(results: list[Result]) -> list[str]:
    """The share right of every fact, in percent; a dash where it does not apply."""
    cells = []
    for fact in FACTS:
        hits = [right[fact] for _, _, right, _ in results if fact in right]
        cells.append(f"{100 * sum(hits) / len(hits):.1f}" if hits else "-")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--count", type=int, default=200, help="captions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="the first pictures of each kind, a row each, as one PNG")
    args = parser.parse_args()
    model, rows, shown, wrong = sd.load(args.model), [], [], []
    for pairs, objects in ((0, "one object"), (1, "two objects")):
        for held in (True, False):
            results = evaluate(model, captions(held, pairs, args.count, args.seed), seed=args.seed)
            rows.append([f"{objects}, {'held out' if held else 'seen'}", *shares(results)])
            shown += [image for _, image, _, _ in results[:12]]
            wrong += [f"    {scene.caption()}  ->  {seen}" for scene, _, right, seen in results if not right["all"]]
    print(f"percent right, of {args.count} captions each")
    for row in [["", *FACTS], *rows]:
        print("| " + " | ".join(row) + " |")
    print("wrong:", *wrong, sep="\n")
    if args.sheet:
        sheet(shown, columns=12).save(args.sheet)


if __name__ == "__main__":
    main()

"""How often is the built-in model right, how clean are its pictures? Draw captions, read pictures back, count.

    python examples/shapes/evaluate.py --count 400 --guidance 4 7.5
    python examples/shapes/evaluate.py --vae                     # true scenes through the VAE alone
    python examples/shapes/evaluate.py --held-out                # only pairs that train.py --held-out leaves out
    python examples/shapes/evaluate.py --model runs/shapes/model.safetensors --sheet wrong.png

A picture is right when background, colours, shapes, sizes and the relation all are. The share is printed with
its standard error, and for each fact apart; then colours, edges and flat areas beside the ideal (cleanness.py).
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from cleanness import cleanness, table
from reader import UnreadableError, read, same
from scenes import HELD_OUT, SIZE, Scene, paint, random_scene

import sd
from sd.image import from_pil, to_pil

Result = tuple[Scene, Image.Image, dict[str, bool], str]  # what was asked for, drawn, right, and what the reader saw


def right_facts(wanted: Scene, got: Scene | None) -> dict[str, bool]:
    """Fact by fact, whether the picture has it. What cannot be read has nothing right."""
    facts = ["background", "colour", "shape", "size" if len(wanted.objects) == 1 else "relation"]
    if got is None:
        return dict.fromkeys([*facts, "all"], False)

    def values(scene: Scene, name: str) -> list:
        return sorted(getattr(o, name) for o in scene.objects)

    right = {
        "background": got.background == wanted.background,
        "colour": values(got, "colour") == values(wanted, "colour"),
        "shape": values(got, "shape") == values(wanted, "shape"),
    }
    if len(wanted.objects) == 1:
        right["size"] = len(got.objects) == 1 and got.objects[0].size == wanted.objects[0].size
    else:  # which object is where
        right["relation"] = set(got.objects) == set(wanted.objects)
    return right | {"all": same(wanted, got)}


def evaluate(
    model: sd.StableDiffusion, scenes: list[Scene], *, batch: int = 8, seed: int = 0, **call
) -> list[Result]:
    """Each scene with the picture drawn for it, which facts are right, and what the reader saw."""
    sampler, results = sd.SimpleSampler(model), []
    for start in tqdm(range(0, len(scenes), batch), desc="drawing", unit="batch"):
        part = scenes[start : start + batch]
        images = sampler([s.caption() for s in part], seed=seed + start, **call)
        results += [judged(scene, image) for scene, image in zip(part, images, strict=True)]
    return results


def judged(scene: Scene, image: Image.Image) -> Result:
    try:
        got = read(image)
        seen = got.caption()
    except UnreadableError as error:
        got, seen = None, str(error)
    return scene, image, right_facts(scene, got), seen


@torch.no_grad()
def reconstructions(model: sd.StableDiffusion, scenes: list[Scene]) -> list[Result]:
    """True pictures of the scenes, encoded and decoded again."""
    results = []
    for k, scene in enumerate(tqdm(scenes, desc="reconstructing", unit="picture")):
        x = from_pil(paint(scene, random.Random(k))).to(model.device, model.dtype)
        (image,) = to_pil((model.vae.decode(model.vae.encode(x)) / 2 + 0.5).clamp(0, 1).cpu())
        results.append(judged(scene, image))
    return results


def report(results: list[Result], title: str) -> None:
    print(title)
    for fact in ("background", "colour", "shape", "size", "relation", "all"):
        hits = [right[fact] for _, _, right, _ in results if fact in right]
        if hits:
            share = sum(hits) / len(hits)
            error = (share * (1 - share) / len(hits)) ** 0.5
            print(f"  {fact:10}  {100 * share:5.1f} % right (+- {100 * error:.1f}) of {len(hits)}")
    if clean := [cleanness(image) for _, image, right, _ in results if right["all"]]:
        print(table(clean))
    for scene, _, right, seen in results:
        if not right["all"]:
            print(f"    wrong: {scene.caption()}  ->  {seen}")


def sheet(images: list[Image.Image], columns: int = 8) -> Image.Image:
    rows = -(-len(images) // columns)
    result = Image.new("RGB", (columns * (SIZE + 4), rows * (SIZE + 4)), "grey")
    for i, image in enumerate(images):
        result.paste(image, (i % columns * (SIZE + 4) + 2, i // columns * (SIZE + 4) + 2))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scheduler", default="pndm")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0, 7.5])
    parser.add_argument("--seed", type=int, default=0, help="of the captions and of the first picture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time; they are the same in any")
    parser.add_argument("--sheet", type=Path, help="write the wrong pictures here, as one PNG")
    parser.add_argument("--all", action="store_true", help="all pictures on the sheet, not only the wrong ones")
    parser.add_argument("--vae", action="store_true", help="true scenes through the VAE alone; nothing is drawn")
    parser.add_argument("--held-out", action="store_true", help="one object, of a pair that was held out")
    args = parser.parse_args()
    model = sd.load(args.model, device=args.device)
    rng = random.Random(args.seed)
    scenes: list[Scene] = []
    while len(scenes) < args.count:
        scene = random_scene(rng, pairs=0 if args.held_out else 0.5)
        if not args.held_out or (scene.objects[0].colour, scene.objects[0].shape) in HELD_OUT:
            scenes.append(scene)
    if args.vae:
        show(reconstructions(model, scenes), "true scenes, encoded and decoded", args, "vae")
        return
    for guidance in args.guidance:
        start = time.time()
        call = {"num_inference_steps": args.steps, "guidance_scale": guidance, "scheduler": args.scheduler}
        results = evaluate(model, scenes, batch=args.batch, seed=args.seed, **call)
        title = f"{args.scheduler}, {args.steps} steps, guidance {guidance:g}, {time.time() - start:.0f} s"
        show(results, title, args, f"{guidance:g}")


def show(results: list[Result], title: str, args: argparse.Namespace, name: str) -> None:
    report(results, title)
    shown = [image for _, image, right, _ in results if args.all or not right["all"]]
    if args.sheet and shown:
        sheet(shown).save(args.sheet.with_stem(f"{args.sheet.stem}-{name}"))


if __name__ == "__main__":
    main()

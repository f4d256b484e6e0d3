"""Train the built-in model from scratch: text encoder, then VAE, then UNet, as Stable Diffusion was.

    python examples/shapes/train.py                    # minutes on a large GPU, a night on two CPU cores
    python examples/shapes/train.py --out runs/shapes  # where its files go; run again to go on
    python examples/shapes/train.py --held-out --out runs/held-out --unet-steps 12000

A GPU takes larger batches and more scenes than a CPU, for it has the time: RECIPES, below, has both. Every stage
writes a checkpoint each two minutes, and the same command goes on from it; log.csv keeps the losses. `export.py`
packs the result into one file for `sd.load`.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from bank import Bank
from fitting import Run, TrainingError, outcome
from scenes import HELD_OUT
from text_stage import Text, train_text
from unet_stage import SPREAD, UNET, make_latents, train_unet
from vae_stage import VAE_SIZES, train_vae

from sd.files import reason_of
from sd.unet import UNet
from sd.vae import VAE

RECIPES = {  # what is done where nothing else is asked for, by the kind of the device
    "cpu": {
        "text_steps": 1200,
        "vae_scenes": 32_000,
        "vae_steps": 6000,
        "vae_batch": 8,
        "unet_scenes": 32_000,
        "unet_steps": 40_000,
        "unet_batch": 32,
    },
    "cuda": {
        "text_steps": 1200,
        "vae_scenes": 128_000,
        "vae_steps": 8000,
        "vae_batch": 32,
        "unet_scenes": 128_000,
        "unet_steps": 18_000,
        "unet_batch": 128,
    },
}


def bfloat16_is_faster(device: str) -> bool:
    """Whether a convolution, forward and backward, is quicker in bfloat16: it has units of its own, or it has not."""
    if torch.device(device).type != "cpu":
        return True
    conv, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(32, 64, 32, 32)

    def seconds(enabled: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            conv(x).float().square().mean().backward()
        return time.perf_counter() - start

    times = [(seconds(False), seconds(True)) for _ in range(12)][2:]
    single, half = (min(column) for column in zip(*times, strict=True))
    return half < 0.8 * single


def train(args: argparse.Namespace) -> None:
    out, device = args.out, args.device
    kind = torch.device(device).type
    sizes = RECIPES.get(kind, RECIPES["cpu"])
    sizes = {name: getattr(args, name) if getattr(args, name) is not None else n for name, n in sizes.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"The folder {out} cannot be made ({reason_of(error)}): give another as --out."
        ) from error
    bfloat16 = args.bfloat16 if args.bfloat16 is not None else bfloat16_is_faster(device)
    run = Run(out, device, bfloat16, graphs=args.graphs and kind == "cuda")
    torch.backends.cudnn.benchmark = True
    print(f"computing in {'bfloat16' if run.bfloat16 else 'float32'} on {device}, {torch.get_num_threads()} threads")
    without = HELD_OUT if args.held_out else frozenset()
    vae_bank = Bank(sizes["vae_scenes"], device=device)
    same = sizes["unet_scenes"] == vae_bank.count
    unet_bank = vae_bank if same else Bank(sizes["unet_scenes"], device=device)
    text_recipe = {"held_out": args.held_out, "steps": sizes["text_steps"], "lr": args.text_lr, "batch": 64}
    vae_recipe = {"steps": sizes["vae_steps"], "lr": args.vae_lr, "batch": sizes["vae_batch"]}
    vae_recipe |= {"scenes": vae_bank.count, "noise": 0.3, "kl": 3e-4}
    latents_recipe = {"scenes": unet_bank.count, "vae": vae_recipe}
    unet_recipe = {"steps": sizes["unet_steps"], "lr": args.unet_lr, "batch": sizes["unet_batch"], "spread": SPREAD}
    unet_recipe |= {"held_out": args.held_out, "text": text_recipe, "latents": latents_recipe}

    torch.manual_seed(0)
    text = Text(out).to(device)
    vae = VAE(VAE_SIZES).to(device)
    unet, average = UNet(UNET).to(device), UNet(UNET).to(device)
    train_text(text, run, text_recipe, without)
    train_vae(vae, vae_bank, run, vae_recipe)
    data = make_latents(vae, text, unet_bank, latents_recipe, run, without)
    train_unet(unet, average, data, run, unet_recipe)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/shapes"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bfloat16", action=argparse.BooleanOptionalAction, help="default: whether it is faster here")
    add("--held-out", action="store_true", help="without the pairs of colour and shape in scenes.HELD_OUT")
    add("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs, on a GPU (default)")
    add("--text-steps", type=int, help="this and the other numbers: see RECIPES, if not given")
    add("--text-lr", type=float, default=1e-3)
    add("--vae-scenes", type=int, help="so many are painted once, and learned from")
    add("--vae-steps", type=int)
    add("--vae-lr", type=float, default=2e-3)
    add("--vae-batch", type=int)
    add("--unet-scenes", type=int)
    add("--unet-steps", type=int)
    add("--unet-lr", type=float, default=1e-3)
    add("--unet-batch", type=int)
    add("--threads", type=int, default=None)
    args = parser.parse_args()
    return outcome(partial(train, args), args.threads)


if __name__ == "__main__":
    sys.exit(main())

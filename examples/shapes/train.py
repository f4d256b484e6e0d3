"""Train the built-in model from scratch: text encoder, then VAE, then UNet, as Stable Diffusion was.

    python examples/shapes/train.py                    # a night on two CPU cores
    python examples/shapes/train.py --out runs/shapes  # where its files go; run again to go on
    python examples/shapes/train.py --held-out --out runs/held-out --unet-steps 12000

Every stage writes a checkpoint each two minutes, and the same command goes on from it; log.csv keeps the losses.
`export.py` packs the result into one file for `sd.load`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from fitting import Run, TrainingError
from scenes import HELD_OUT
from text_stage import Text, train_text
from unet_stage import SPREAD, UNET, make_latents, train_unet
from vae_stage import VAE_SIZES, train_vae

from sd.files import reason_of
from sd.unet import UNet
from sd.vae import VAE


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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"The folder {out} cannot be made ({reason_of(error)}): give another as --out."
        ) from error
    run = Run(out, device, args.bfloat16 if args.bfloat16 is not None else bfloat16_is_faster(device))
    print(f"computing in {'bfloat16' if run.bfloat16 else 'float32'} on {device}, {torch.get_num_threads()} threads")
    without = HELD_OUT if args.held_out else frozenset()
    both = {"held_out": args.held_out}
    text_recipe = both | {"steps": args.text_steps, "lr": args.text_lr, "batch": 64}
    vae_recipe = {"steps": args.vae_steps, "lr": args.vae_lr, "batch": args.vae_batch, "noise": 0.3, "kl": 3e-4}
    latents_recipe = both | {"latents": args.latents, "vae": vae_recipe}
    unet_recipe = both | {"steps": args.unet_steps, "lr": args.unet_lr, "batch": args.unet_batch, "spread": SPREAD}
    unet_recipe |= {"text": text_recipe, "latents": latents_recipe}

    torch.manual_seed(0)
    text = Text(out).to(device)
    vae = VAE(VAE_SIZES).to(device)
    unet, average = UNet(UNET).to(device), UNet(UNET).to(device)
    train_text(text, run, text_recipe, without)
    train_vae(vae, run, vae_recipe)
    z, scenes = make_latents(vae, latents_recipe, run, without)
    train_unet(unet, average, text, z, scenes, run, unet_recipe)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/shapes"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bfloat16", action=argparse.BooleanOptionalAction, help="default: whether it is faster here")
    add("--held-out", action="store_true", help="without the pairs of colour and shape in scenes.HELD_OUT")
    add("--text-steps", type=int, default=1200)
    add("--text-lr", type=float, default=1e-3)
    add("--vae-steps", type=int, default=6000)
    add("--vae-lr", type=float, default=2e-3)
    add("--vae-batch", type=int, default=8)
    add("--latents", type=int, default=32_000)
    add("--unet-steps", type=int, default=40_000)
    add("--unet-lr", type=float, default=1e-3)
    add("--unet-batch", type=int, default=32)
    add("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        train(args)
    except TrainingError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a ControlNet for the built-in model that follows edges: half an hour on one CPU core.

    python examples/controlnet/train.py                         # files in ~/runs/controlnet; run again to go on
    python examples/controlnet/train.py --file edges.safetensors # where the ControlNet is written in the end
    python examples/controlnet/train.py --scenes 200 --steps 20 --out /tmp/try    # a try

As Zhang et al. 2023 (arXiv:2302.05543) train theirs: it begins as a copy of the UNet's way down with zeros at the
ends (`controlnet_for`), the model stays as it is, and some captions are left out, so that the edges alone have to
tell what is drawn. The loss is that of the model's own training (examples/shapes/unet_stage.py), guidance and
all. One thing is not as theirs, for they have more time: the layers that read the picture begin awake (`awaken`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edges import example
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "shapes"))
from fitting import Run, TrainingError, fit, outcome, read_checkpoint, write_checkpoint
from stepping import Batch
from unet_stage import overshoot, plain_attention

import sd
from sd.adapt.controlnet import ControlNet, controlnet_for
from sd.attention import use_attention
from sd.cli.options import whole
from sd.files import check_output, reason_of
from sd.image import from_pil
from sd.scheduler import NoiseSchedule

SEED = 5_000_000_000  # far from evaluate.py's: what is learned from is not what is judged
HINT_WIDTHS = (8, 16, 32, 64)  # a quarter of those of Stable Diffusion's: the edges of flat shapes are plain
SILENT = 0.3  # share of the pictures whose caption is left out


@dataclass(frozen=True)
class Data:
    """What the ControlNet learns from; picture k of each.

    z         (N, 4, 16, 16) float32: latents
    contexts  (N, 77, 128) float16: embeddings of the captions; `nothing`, (77, 128), that of none
    lines     (N, 128, 16) uint8: edges, eight pixels to a byte
    """

    z: Tensor
    contexts: Tensor
    nothing: Tensor
    lines: np.ndarray

    def hints(self, index: Tensor) -> Tensor:
        """(B, 3, 128, 128) float32, 0 or 1."""
        bits = np.unpackbits(self.lines[index.numpy()], axis=-1)
        return torch.from_numpy(bits)[:, None].float().expand(-1, 3, -1, -1)


@torch.no_grad()
def made(model: sd.StableDiffusion, recipe: Mapping[str, Any], run: Run) -> Data:
    """Scenes, painted, encoded and read for edges; once, and then from data.pt."""
    path = run.folder / "data.pt"
    saved = read_checkpoint(path, recipe)
    if saved is None:
        parts: dict[str, list[Tensor]] = {"z": [], "contexts": [], "lines": []}
        for k in tqdm(range(0, recipe["scenes"], 32), desc="scenes", mininterval=10):
            batch = [example(SEED + i) for i in range(k, min(k + 32, recipe["scenes"]))]
            rng = random.Random(SEED + k)
            captions = [e.scene.caption(with_background=rng.random() < 0.8) for e in batch]
            parts["z"].append(model.vae.encode(torch.cat([from_pil(e.picture) for e in batch])))
            parts["contexts"].append(model.encode_prompt(captions).half())
            parts["lines"].append(torch.from_numpy(np.packbits(np.stack([e.lines for e in batch]), axis=-1)))
        saved = {name: torch.cat(tensors) for name, tensors in parts.items()} | {"recipe": json.dumps(dict(recipe))}
        write_checkpoint(path, saved)
    nothing = model.encode_prompt([""])[0].half()
    return Data(saved["z"], saved["contexts"], nothing, saved["lines"].numpy())


@torch.no_grad()
def awaken(layers: nn.Sequential, hints: Tensor) -> None:
    """Scale the layers that read the picture, the last one too, so that what each returns has a deviation of 1.

    As torch begins them, thin lines on black die out in the eight layers: what comes out varies by 0.002, and a few
    thousand steps do not bring it back. Nothing is drawn otherwise for that at first: the zeros behind the blocks do.
    After Mishkin & Matas 2015 (arXiv:1511.06422).
    """
    x = hints
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            if not layer.weight.any():
                layer.reset_parameters()
            layer.bias.zero_()
            layer.weight /= layer(x).std()
        x = layer(x)


def teach(net: ControlNet, model: sd.StableDiffusion, data: Data, run: Run, recipe: Mapping[str, Any]) -> None:
    """Move the ControlNet's weights, and no others. Checkpoints are in the run's folder; a second call goes on."""
    batch = recipe["batch"]
    low = max(batch * 7 // 32, 1)
    abar, parts = NoiseSchedule().alphas_cumprod, torch.arange(batch)

    def batch_of(step: int) -> Batch:
        index = torch.randint(len(data.z), (batch,))
        told = torch.rand(batch) >= SILENT
        context = torch.where(told[:, None, None], data.contexts[index], data.nothing).float()
        # One timestep from each of `batch` equal parts: less noise in the loss than independent draws.
        t = ((parts + torch.rand(batch)) * 1000 / batch).long().clamp(max=999)
        a, x0 = abar[t][:, None, None, None], data.z[index]
        noise = torch.randn_like(x0) + overshoot(x0)
        # Where guidance has gone to another picture, the caption is to be believed, and the edges.
        astray = torch.rand(batch) * 0.7 * (torch.rand(batch) < 0.25) * told * (parts >= low)
        noise += astray[:, None, None, None] * (a / (1 - a)).sqrt() * (x0.roll(1, 0) - x0)
        x, weight = a.sqrt() * x0 + (1 - a).sqrt() * noise, ((1 - a) / a) ** 0.7 + 0.5
        # Those with the least noise are seen once more without their captions, and are to agree.
        t, x, index = (torch.cat([tensor, tensor[:low]]) for tensor in (t, x, index))
        context = torch.cat([context, data.nothing.float().expand(low, -1, -1)])
        return x, t, context, data.hints(index), noise, weight

    def loss_of(x: Tensor, t: Tensor, context: Tensor, hints: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        predicted = model.unet(x, t, context, control=net(x, t, context, net.hint(hints)))
        apart = (predicted[:low] - predicted[batch:]).square().mean()
        return (weight * (predicted[:batch] - noise) ** 2).mean() + 2 * apart

    model.unet.requires_grad_(False)
    net.requires_grad_(True)
    with use_attention(model.unet, plain_attention), use_attention(net, plain_attention):
        fit("controlnet", net, batch_of, loss_of, run, recipe)


def train(args: argparse.Namespace) -> None:
    folder, file = args.out.expanduser(), args.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"The folder {folder} cannot be made ({reason_of(error)}): give another as --out."
        ) from error
    file = file.expanduser() if file else folder / "edges.safetensors"
    check_output(file, force=True)  # before any work is done
    if file.suffix != ".safetensors":
        raise TrainingError(f"The file {file} must end in .safetensors: give another as --file.")
    run = Run(folder)
    torch.manual_seed(0)
    model = sd.load("shapes")
    net = controlnet_for(model.unet, HINT_WIDTHS)
    scenes = {"scenes": args.scenes, "model": model.hash}
    data = made(model, scenes, run)
    recipe = {"steps": args.steps, "lr": args.lr, "batch": args.batch, "silent": SILENT, "data": scenes}
    if args.begin:
        before = sd.load_controlnet(args.begin.expanduser(), model=model)
        net.load_state_dict(before.state_dict())
        recipe["begin"] = before.hash
    else:
        awaken(net.input_hint_block, data.hints(torch.arange(min(64, args.scenes))))
    teach(net, model, data, run, recipe)
    sd.save_controlnet(net, file, torch.float16, force=True)
    print(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("~/runs/controlnet"), help="checkpoints and log.csv")
    add("--file", type=Path, help="the ControlNet, in float16; edges.safetensors in --out if not given")
    add("--begin", type=Path, help="go on from this ControlNet, in another folder as --out")
    add("--scenes", type=whole(1), default=8000)
    add("--steps", type=whole(1), default=6000)
    add("--batch", type=whole(1), default=8)
    add("--lr", type=float, default=6e-4)
    add("--threads", type=int, help="torch's choice if not given")
    args = parser.parse_args()
    return outcome(partial(train, args), args.threads)


if __name__ == "__main__":
    sys.exit(main())

"""The third stage: a UNet that predicts the noise in latents, and stands what guidance does with it."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bank import Bank, as_input
from fitting import Run, fit, read_checkpoint, write_checkpoint
from scenes import holds
from stepping import Batch
from text_stage import Text, random_caption
from torch import Tensor, nn
from tqdm import tqdm

from sd.attention import use_attention
from sd.scheduler import NoiseSchedule
from sd.unet import UNet, UNetConfig
from sd.vae import VAE

UNET = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(2, 4),
    num_heads=4,
    context_dim=128,
)
# Latents are scaled to this standard deviation, where Stable Diffusion's have 1. A picture of flat areas says its
# colours so many times over that at 1 they are decided in the very first steps, faster than PNDM can follow with
# guidance 7.5: see stiffness.py. Much smaller, and details are decided in the last steps, which are long.
SPREAD = 0.22
FORMS = 2  # captions of a scene: "a" or "an", a size or a background left unsaid


@dataclass(frozen=True)
class Latents:
    """What the UNet learns from.

    z         (N, 4, 16, 16) float32, scaled to a standard deviation of `SPREAD`
    contexts  (N, FORMS, 77, 128) float16: the embeddings of captions of each, in several of their forms
    nothing   (77, 128) float16: the embedding of no caption

    All on the run's device, where a step takes its batch from them without waiting for the processor.
    """

    z: Tensor
    contexts: Tensor
    nothing: Tensor


def make_latents(
    vae: VAE, text: Text, bank: Bank, recipe: Mapping[str, Any], run: Run, without: Collection[tuple[str, str]]
) -> Latents:
    """Of the bank's scenes without anything of a pair in `without`; the file latents.pt keeps those of all."""
    path = run.folder / "latents.pt"
    saved = read_checkpoint(path, recipe)
    if saved is None:
        parts = []
        for k in tqdm(range(0, bank.count, 64), desc="latents", mininterval=10):
            x = as_input(bank.pictures[k : k + 64].to(run.device))
            with torch.no_grad(), run.autocast():
                parts.append(vae.moments(x)[0].float().cpu())
        z = torch.cat(parts)
        saved = {"latents": z.half(), "scale": SPREAD / z.std().item(), "recipe": json.dumps(dict(recipe))}
        write_checkpoint(path, saved)
    kept = [i for i, scene in enumerate(bank.scenes) if not holds(scene, without)]
    rng = random.Random("captions")
    captions = [random_caption(bank.scenes[i], rng)[0] for i in kept for _ in range(FORMS)]
    contexts = embedded(text, captions, run)
    z = saved["latents"][kept].float() * saved["scale"]
    return Latents(
        z.to(run.device), contexts.view(len(kept), FORMS, *contexts.shape[1:]), embedded(text, [""], run)[0]
    )


def embedded(text: Text, captions: list[str], run: Run) -> Tensor:
    """(N, 77, 128) float16 on the run's device."""
    parts = []
    with torch.no_grad(), run.autocast():
        for k in tqdm(range(0, len(captions), 512), desc="captions", mininterval=10):
            parts.append(text(text.tokens(captions[k : k + 512]).to(run.device)).half())
    return torch.cat(parts)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sdpa's backward pass is slow on the CPU at these sizes; three plain operations take half the time."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v


def overshoot(x0: Tensor) -> Tensor:
    """What guidance adds to the noise: some of the picture itself, and of another one, (B, 4, 16, 16).

    Guidance draws the first steps with colours several times too strong, and away from those of other pictures,
    which plain noise never does. What is left of that in x_t has to be taken for noise; measured, it is -0.3 to 0.3
    of the picture at guidance 3. Half of the samples have the one, half of them the other.
    """
    own, other = torch.rand(2, len(x0), 1, 1, 1, device=x0.device)
    chosen = torch.rand(2, len(x0), 1, 1, 1, device=x0.device) < 0.5
    return chosen[0] * (own - 0.4) * x0 + chosen[1] * 0.6 * (other - 0.5) * x0.roll(1, 0)


def start_as_identity(unet: UNet) -> None:
    """Zero the last layer of every residual branch, as ldm does (zero_module): training starts steadier."""
    for name, layer in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")) and isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def train_unet(unet: UNet, average: UNet, data: Latents, run: Run, recipe: Mapping[str, Any]) -> None:
    batch, device = recipe["batch"], run.device
    low = max(batch * 7 // 32, 1)
    abar = NoiseSchedule().alphas_cumprod.to(device)
    parts = torch.arange(batch, device=device)
    above_low = (parts >= low).float()
    rand = partial(torch.rand, device=device)

    def batch_of(step: int) -> Batch:
        index = torch.randint(len(data.z), (batch,), device=device)
        form = torch.randint(FORMS, (batch,), device=device)
        x0 = data.z[index]
        captioned = rand(batch) >= 0.25
        context = torch.where(captioned[:, None, None], data.contexts[index, form], data.nothing).float()
        # One timestep from each of `batch` equal parts: less noise in the loss than independent draws.
        t = ((parts + rand(batch)) * 1000 / batch).long().clamp(max=999)
        a = abar[t][:, None, None, None]
        noise = torch.randn_like(x0) + overshoot(x0)
        # Where guidance has gone to another colour than the caption's, the caption is to be believed.
        astray = rand(batch) * 0.7 * (rand(batch) < 0.25) * captioned * above_low
        noise += astray[:, None, None, None] * (a / (1 - a)).sqrt() * (x0.roll(1, 0) - x0)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        # With little noise the picture itself says what the caption says. Where the two predictions still differ,
        # guidance multiplies a mere error of the model, and PNDM, whose last steps are long, lets it grow: so
        # these samples, the first in the batch, are seen once more without their captions, and are to agree.
        t, x = torch.cat([t, t[:low]]), torch.cat([x, x[:low]])
        context = torch.cat([context, data.nothing.float().expand(low, -1, -1)])
        # Near t = 1000 the picture is hardly 2 % of the signal: unweighted, the loss does not pay for its colours.
        # (1 - abar) / abar would be the error of the predicted x0; a power between makes both ends learn.
        weight = ((1 - a) / a) ** 0.7 + 0.5
        return x, t, context, noise, weight

    def loss_of(x: Tensor, t: Tensor, context: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        predicted = unet(x, t, context).float()
        apart = (predicted[:low] - predicted[batch:]).square().mean()
        return (weight * (predicted[:batch] - noise) ** 2).mean() + 2 * apart

    start_as_identity(unet)
    average.load_state_dict(unet.state_dict())
    on_cpu = torch.device(device).type == "cpu"
    with use_attention(unet, plain_attention) if on_cpu else nullcontext():
        fit("unet", unet, batch_of, loss_of, run, recipe, average)

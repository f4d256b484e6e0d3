"""The third stage: a UNet that predicts the noise in latents, and stands what guidance does with it."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping
from typing import Any

import torch
from fitting import Run, fit, read_checkpoint, write_checkpoint
from scenes import Scene, random_scene
from text_stage import Text, random_caption
from torch import Tensor, nn
from tqdm import tqdm
from vae_stage import pictures

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


def make_latents(
    vae: VAE, recipe: Mapping[str, Any], run: Run, without: Collection[tuple[str, str]]
) -> tuple[Tensor, list[Scene]]:
    """recipe["latents"] scenes and their latents, scaled to a standard deviation of `SPREAD`; kept in a file."""
    rng = random.Random("latents")
    scenes = [random_scene(rng, 0.7, without) for _ in range(recipe["latents"])]
    path = run.folder / "latents.pt"
    saved = read_checkpoint(path, recipe)
    if saved is None:
        latents = []
        for k in tqdm(range(0, len(scenes), 64), desc="latents", mininterval=10):
            x = pictures(scenes[k : k + 64], random.Random(k))
            with torch.no_grad(), run.autocast():
                latents.append(vae.moments(x.to(run.device))[0].float().cpu())
        saved = {"latents": torch.cat(latents), "recipe": json.dumps(dict(recipe))}
        write_checkpoint(path, saved)
    z = saved["latents"]
    return z * (SPREAD / z.std()), scenes


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sdpa's backward pass is slow on the CPU at these sizes; three plain operations take half the time."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v


def overshoot(x0: Tensor) -> Tensor:
    """What guidance adds to the noise: some of the picture itself, and of another one, (B, 4, 16, 16).

    Guidance draws the first steps with colours several times too strong, and away from those of other pictures,
    which plain noise never does. What is left of that in x_t has to be taken for noise; measured, it is -0.3 to 0.3
    of the picture at guidance 3. Half of the samples have the one, half of them the other.
    """
    own, other = torch.rand(2, len(x0), 1, 1, 1) - torch.tensor([0.4, 0.5]).view(2, 1, 1, 1, 1)
    chosen = (torch.rand(2, len(x0), 1, 1, 1) < 0.5).float()
    return (chosen[0] * own).to(x0) * x0 + (chosen[1] * 0.6 * other).to(x0) * x0.roll(1, 0)


def start_as_identity(unet: UNet) -> None:
    """Zero the last layer of every residual branch, as ldm does (zero_module): training starts steadier."""
    for name, layer in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out", "out.2")) and isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def train_unet(
    unet: UNet,
    average: UNet,
    text: Text,
    z: Tensor,
    scenes: list[Scene],
    run: Run,
    recipe: Mapping[str, Any],
) -> None:
    batch, device = recipe["batch"], run.device
    abar = NoiseSchedule().alphas_cumprod.to(device)
    with torch.no_grad():
        nothing = text(text.tokens([""]).to(device)).float()

    def loss_of(step: int) -> Tensor:
        rng = random.Random(step)
        index = rng.sample(range(len(scenes)), batch)
        captions = ["" if rng.random() < 0.25 else random_caption(scenes[i], rng)[0] for i in index]
        with torch.no_grad():
            context = text(text.tokens(captions).to(device)).float()
        x0 = z[index].to(device)
        # One timestep from each of `batch` equal parts: less noise in the loss than independent draws.
        t = ((torch.arange(batch) + torch.rand(batch)) * 1000 / batch).long().to(device)
        a = abar[t][:, None, None, None]
        low = max(batch * 7 // 32, 1)
        noise = torch.randn_like(x0) + overshoot(x0)
        # Where guidance has gone to another colour than the caption's, the caption is to be believed.
        astray = torch.rand(batch) * 0.7 * (torch.rand(batch) < 0.25) * torch.tensor([bool(c) for c in captions])
        astray[:low] = 0
        noise += astray.to(x0)[:, None, None, None] * (a / (1 - a)).sqrt() * (x0.roll(1, 0) - x0)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        # With little noise the picture itself says what the caption says. Where the two predictions still differ,
        # guidance multiplies a mere error of the model, and PNDM, whose last steps are long, lets it grow: so
        # these samples, the first in the batch, are seen once more without their captions, and are to agree.
        t, x = torch.cat([t, t[:low]]), torch.cat([x, x[:low]])
        context = torch.cat([context, nothing.expand(low, -1, -1)])
        predicted = unet(x, t, context).float()
        # Near t = 1000 the picture is hardly 2 % of the signal: unweighted, the loss does not pay for its colours.
        # (1 - abar) / abar would be the error of the predicted x0; a power between makes both ends learn.
        weight = ((1 - a) / a) ** 0.7 + 0.5
        apart = (predicted[:low] - predicted[batch:]).square().mean()
        return (weight * (predicted[:batch] - noise) ** 2).mean() + 2 * apart

    start_as_identity(unet)
    average.load_state_dict(unet.state_dict())
    with use_attention(unet, plain_attention):
        fit("unet", unet, loss_of, run, recipe, average)

"""Train the built-in model from scratch: text encoder, then VAE, then UNet, as Stable Diffusion was.

    python examples/shapes/train.py              # an evening on two CPU cores
    python examples/shapes/train.py --out runs/shapes   # where checkpoints go; run again to resume

Every stage writes a checkpoint now and then, and the same command resumes from it. `export.py` packs the
result into one file for `sd.load`.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from scenes import CENTRES, COLOURS, SHAPES, Scene, paint, random_scene, to_array
from vocabulary import tokenizer_files

from sd.attention import use_attention
from sd.unet import UNet, UNetConfig
from sd.vae import VAE, VAEConfig

UNET = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(2, 4),
    num_heads=4,
    context_dim=128,
)
VAE_SIZES = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, num_groups=16, scale_factor=1.0)
# Latents are scaled to this standard deviation, where Stable Diffusion's have 1. A picture of flat areas says its
# colours so many times over that at 1 they are decided in the very first steps, faster than PNDM can follow with
# guidance 7.5: see stiffness.py. Much smaller, and details are decided in the last steps, which are long.
SPREAD = 0.3
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


# --- what the stages share ---------------------------------------------------------------------------


def random_caption(scene: Scene, rng: random.Random) -> tuple[str, bool, bool]:
    """A caption of the scene in one of its forms, and whether it tells the size and the background."""
    size, background = rng.random() > 0.06, rng.random() > 0.06
    return scene.caption(rng.random() < 0.5, size, background), size, background


def fit(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], Tensor],
    steps: int,
    lr: float,
    out: Path,
    device: str,
    ema: nn.Module | None = None,
    watch: Callable[[int], None] | None = None,
) -> None:
    """AdamW over `steps` losses: warm-up, cosine to zero, checkpoints each two minutes, resume."""
    opt = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    path, start = out / f"{name}.pt", 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        module.load_state_dict(saved["module"])
        opt.load_state_dict(saved["opt"])
        start = saved["step"]
        if ema is not None:
            ema.load_state_dict(saved["ema"])

    def save(step: int) -> None:
        state = {"module": module.state_dict(), "opt": opt.state_dict(), "step": step}
        torch.save(state | ({"ema": ema.state_dict()} if ema is not None else {}), path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    module.train()
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=10)
    mean, saved_at = None, time.time()
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = lr * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        torch.manual_seed(step)  # a resumed run draws what an unbroken one would have drawn
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if ema is not None:
            decay = min(0.9995, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{mean:.4f}")
        if watch and (step + 1) % 1000 == 0:
            watch(step + 1)
        if time.time() - saved_at > 120:
            save(step + 1)
            saved_at = time.time()
    if start < steps:
        save(steps)
    module.eval().requires_grad_(False)


# --- text encoder: predict every fact of the scene from the end of the text ---------------------------


class Text(nn.Module):
    """CLIP's text encoder, small, and the linear heads it is trained with."""

    def __init__(self, folder: Path):
        super().__init__()
        for file, content in tokenizer_files().items():
            (folder / file).write_text(content, encoding="utf-8")
        self.tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        end = self.tokenizer.eos_token_id
        config = CLIPTextConfig(**TEXT, vocab_size=end + 1, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
        self.clip = CLIPTextModel(config)
        # Background, size, and what is at each of the five places: 0 stands for "nothing" or "not said".
        self.classes = [1 + len(COLOURS), 3] + len(CENTRES) * [1 + len(COLOURS), 1 + len(SHAPES)]
        self.heads = nn.Linear(TEXT["hidden_size"], sum(self.classes))

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip(tokens).last_hidden_state  # (B, 77, 128)

    def loss(self, tokens: Tensor, facts: Tensor) -> Tensor:
        """Cross-entropy of all facts (B, 12), read at the end of the text and at its copies, the padding."""
        hidden = self(tokens)
        ends = (tokens == self.tokenizer.eos_token_id).float()
        places = torch.multinomial(ends, 4, replacement=True)  # (B, 4)
        read = self.heads(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))
        losses = (
            F.cross_entropy(logits.flatten(0, 1).float(), facts[:, i].repeat_interleave(4))
            for i, logits in enumerate(read.split(self.classes, dim=-1))
        )
        return sum(losses) / len(self.classes)


def facts_of(scene: Scene, size_said: bool, background_said: bool) -> list[int]:
    """The scene as class numbers, in the order of `Text.classes`."""
    size = {"small": 1, "large": 2}.get(scene.objects[0].size or "", 0)
    facts = [1 + list(COLOURS).index(scene.background) if background_said else 0, size if size_said else 0]
    at = {o.place: o for o in scene.objects}
    for place in CENTRES:
        o = at.get(place)
        facts += [1 + list(COLOURS).index(o.colour), 1 + SHAPES.index(o.shape)] if o else [0, 0]
    return facts


def train_text(text: Text, out: Path, steps: int, device: str) -> None:
    def loss_of(step: int) -> Tensor:
        rng = random.Random(step)
        captions, facts = [""] * 4, [[0] * len(text.classes)] * 4
        for _ in range(60):
            scene = random_scene(rng, pairs=0.75)
            caption, size, background = random_caption(scene, rng)
            captions.append(caption)
            facts.append(facts_of(scene, size, background))
        return text.loss(text.tokens(captions).to(device), torch.tensor(facts, device=device))

    fit("text", text, loss_of, steps, 1e-3, out, device)


# --- VAE: reconstruct -------------------------------------------------------------------------------


def pictures(scenes: list[Scene], rng: random.Random) -> Tensor:
    return torch.from_numpy(np.stack([to_array(paint(s, rng)) for s in scenes]))


def train_vae(vae: VAE, out: Path, steps: int, batch: int, device: str) -> None:
    def loss_of(step: int) -> Tensor:
        rng = random.Random(step)
        if step < 0.9 * steps:  # mostly on quarters: four times as many pictures for the same work
            x = pictures([random_scene(rng, pairs=0.6) for _ in range(2 * batch)], rng).to(device)
            top, left = rng.randrange(0, 65, 8), rng.randrange(0, 65, 8)
            x = x[:, :, top : top + 64, left : left + 64].contiguous()
        else:
            x = pictures([random_scene(rng, pairs=0.6) for _ in range(batch)], rng).to(device)
        mean, logvar = vae.moments(x)
        y = vae.decode(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
        # Flat areas are easy and most of the picture: pixels beside an edge count four times.
        contrast = (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).amax(1, keepdim=True)
        difference = (y.float() - x) * torch.where(contrast > 0.1, 4.0, 1.0)
        return difference.abs().mean() + 0.5 * difference.square().mean() + 3e-4 * kl

    fit("vae", vae, loss_of, steps, 2e-3, out, device)


# --- UNet: predict the noise ------------------------------------------------------------------------


def make_latents(vae: VAE, count: int, out: Path, device: str) -> tuple[Tensor, list[Scene]]:
    """`count` scenes and their latents, scaled to a standard deviation of `SPREAD`; kept in a file."""
    rng = random.Random("latents")
    scenes, latents, path = [], [], out / "latents.pt"
    for _ in tqdm(range(0, count, 64), desc="latents", mininterval=10):
        batch = [random_scene(rng, pairs=0.7) for _ in range(64)]
        scenes += batch
        x = pictures(batch, rng)
        if not path.exists():
            with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
                latents.append(vae.moments(x.to(device))[0].float().cpu())
    if not path.exists():
        torch.save(torch.cat(latents), path)
    z = torch.load(path, weights_only=True)
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
    ema: UNet,
    text: Text,
    z: Tensor,
    scenes: list[Scene],
    out: Path,
    steps: int,
    batch: int,
    device: str,
) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0).float().to(device)
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
        low = batch * 7 // 32
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
    ema.load_state_dict(unet.state_dict())
    with use_attention(unet, plain_attention):
        fit("unet", unet, loss_of, steps, 1e-3, out, device, ema=ema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--latents", type=int, default=24_000)
    parser.add_argument("--unet-steps", type=int, default=30_000)
    parser.add_argument("--unet-batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text = Text(args.out).to(args.device)
    vae = VAE(VAE_SIZES).to(args.device)
    unet, ema = UNet(UNET).to(args.device), UNet(UNET).to(args.device)
    ema.requires_grad_(False)

    train_text(text, args.out, args.text_steps, args.device)
    train_vae(vae, args.out, args.vae_steps, args.vae_batch, args.device)
    z, scenes = make_latents(vae, args.latents, args.out, args.device)
    train_unet(unet, ema, text, z, scenes, args.out, args.unet_steps, args.unet_batch, args.device)


if __name__ == "__main__":
    main()

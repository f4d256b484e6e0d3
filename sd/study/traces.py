"""`trace`: every step's tensors of a drawing, kept in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import __version__
from ..files import parse_json
from ..image import model_name, to_pil
from ..pictures import told_of_controls
from ..sampler import Call, Step
from ..scheduler import scheduler_name
from ..vae import VAE
from ..weights.checkpoint import read, write_safetensors
from ..weights.unread import computes_in
from .calls import listen, model_of, rows_of
from .colours import latent_rgb, to_rgb

TENSORS = ("timesteps", "x", "noise_without", "noise_with", "noise", "x0", "latents", "rgb")


@dataclass(frozen=True)
class Trace:
    """A sampling, step by step: S steps (calls of the UNet) of B pictures. Tensors are on the CPU.

    `x0`, the clean latents that a step's noise points to, is what one watches: it begins as a blur.
    """

    timesteps: Tensor  # (S,) float32: what the UNet was told
    x: Tensor  # (S, B, 4, h, w): x_t, what the UNet was given
    noise_without: Tensor | None  # (S, B, 4, h, w): predicted for the negative prompt; None without guidance
    noise_with: Tensor  # (S, B, 4, h, w): predicted for the prompt
    noise: Tensor  # (S, B, 4, h, w): guided
    x0: Tensor  # (S, B, 4, h, w)
    latents: Tensor  # (B, 4, h, w): the result
    rgb: Tensor  # (5, 3): latents to rough colours, see `latent_rgb`
    settings: dict[str, Any]  # prompt, seeds, guidance_scale, scheduler, model, ...

    @property
    def norms(self) -> dict[str, Tensor]:
        """The root mean square of each kind of tensor, (S, B) float64: 1 for unit noise."""
        kinds = ("x", "noise_without", "noise_with", "noise", "x0")
        found = {kind: getattr(self, kind) for kind in kinds}
        return {k: t.double().flatten(2).square().mean(2).sqrt() for k, t in found.items() if t is not None}

    @property
    def angle(self) -> Tensor | None:
        """Between the two predictions, in degrees: (S, B) float64; None without guidance."""
        if self.noise_without is None:
            return None
        a, b = (
            t.double().flatten(2) / t.double().flatten(2).norm(dim=2, keepdim=True)
            for t in (self.noise_without, self.noise_with)
        )
        # Half the angle by the sides of its triangle: acos of the product loses small angles to rounding.
        return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=2), (a + b).norm(dim=2)))

    def picture(self, step: int = -1, image: int = 0, kind: str = "x0", vae: VAE | None = None) -> Image.Image:
        """One of x, noise, ..., x0 as a picture: by a VAE if given, else roughly, by the matrix `rgb`."""
        if kind not in TENSORS[1:6] or getattr(self, kind) is None:
            raise ValueError(f"There is no {kind!r} to show: choose from {', '.join(TENSORS[1:6])}.")
        latents = getattr(self, kind)[step, image][None]
        if vae is None:
            return to_pil(to_rgb(latents, self.rgb).repeat_interleave(8, 2).repeat_interleave(8, 3))[0]
        with torch.no_grad():
            return to_pil((vae.decode(latents.to(*computes_in(vae))) / 2 + 0.5).clamp(0, 1))[0]

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write one .safetensors file, whole or not at all. Raises ValueError where it exists, unless `force`."""
        if Path(path).exists() and not force:
            raise ValueError(f"{path} exists: choose another name, or write over it with force=True (--force).")
        tensors = {name: t for name in TENSORS if (t := getattr(self, name)) is not None}
        write_safetensors(path, tensors, {"format": "pt", "trace": json.dumps(self.settings)}, force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """What `save` wrote; tensors are read when they are used. Raises ValueError for another file."""
        file = read(path)
        missing = [n for n in TENSORS if n not in file.tensors and n != "noise_without"]
        if missing or "trace" not in file.metadata:
            raise ValueError(f"{path} is no trace: sd.study.trace(...).save(path) writes one.")
        tensors = {name: file.tensors.get(name) for name in TENSORS}
        try:
            check_shapes({name: tensor for name, tensor in tensors.items() if tensor is not None})
            settings = parse_json(str(file.metadata["trace"]))
            if not isinstance(settings, dict):
                raise ValueError("its settings are no JSON object")
        except ValueError as error:
            raise ValueError(f"{path} is a damaged trace: {error}; write it again.") from None
        return cls(**tensors, settings=settings)  # type: ignore[arg-type]


def check_shapes(tensors: dict[str, Tensor]) -> None:
    """Raise ValueError, the rest of a sentence, unless the tensors of a trace fit together."""
    steps, shape = tensors["timesteps"].shape, tensors["latents"].shape
    sound = len(steps) == 1 and len(shape) == 4
    known = {"timesteps": steps, "latents": shape, "rgb": (shape[1] + 1, 3) if sound else ()}
    for name, tensor in tensors.items():
        wanted = known.get(name, (*steps, *shape))
        if not sound or not tensor.is_floating_point() or tuple(tensor.shape) != tuple(wanted):
            raise ValueError(f"its tensor {name} does not fit the others")


@torch.no_grad()
def trace(sampler: Any, prompt: Any = None, *, progress: Callable[..., Any] | None = None, **call: Any) -> Trace:
    """Draw, and keep what every step knew. Arguments are those of the sampler, but for `output_type`.

    progress: `tqdm`, or what is called like it, progress(steps, total=...), and gives the steps one by one.

    The tensors are the sampler's own, to the last bit; `sampler.decode(trace.latents)` is its picture, before a mask
    is pasted. Memory: five latents a step and picture, 0.3 MB at 512 x 512. Raises ValueError as the sampler does.
    """
    model = model_of(sampler)
    request = sampler.request(prompt, **call)
    images = len(request.context)
    heard: list[tuple[Call, Tensor, Tensor]] = []  # what the UNet was given in a step, and what it answered
    kinds: dict[str, list[Tensor]] = {kind: [] for kind in TENSORS[1:6]}

    def note(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        if made := now():
            heard.append((made, (args[0] if args else kwargs["x"]).cpu().clone(), out.cpu().clone()))

    def steps() -> Iterator[Step]:
        running = sampler.run(request)
        while True:
            heard.clear()  # of what others call between two steps
            step = next(running, None)
            if step is None:
                return
            keep(step)
            yield step

    def keep(step: Step) -> None:
        halves: tuple[list[Tensor], list[Tensor]] = [], []  # the prompt's, the negative prompt's
        for made, _, out in heard:
            for half, rows in zip(halves, rows_of(made, len(out)), strict=True):
                half.append(out[rows])
        told, away = (torch.cat(half) if half else torch.empty(0) for half in halves)
        if [len(told), len(away)] != [images, 0 if request.negative is None else images]:
            raise ValueError("This sampler's UNet sees only a part of the pictures: trace a SimpleSampler.")
        tensors = {
            "x": heard[0][1][
                :images, : step.latents.shape[1]
            ],  # without what weights of 9 channels are told beside it
            "noise": step.noise.cpu(),
            "x0": step.denoised.cpu(),
            "noise_with": told,
        }
        if request.negative is not None:
            tensors["noise_without"] = away
        for kind, tensor in tensors.items():
            kinds[kind].append(tensor.clone())

    handle = model.unet.register_forward_hook(note, with_kwargs=True)
    try:
        with listen(model) as now:  # after the hook, which still belongs to the call
            for step in progress(steps(), total=len(request.timesteps)) if progress else steps():
                latents = step.latents.cpu().clone()
    finally:
        handle.remove()
    scheduler = request.scheduler
    negative = call.get("negative_prompt", "")
    settings = {
        "prompt": prompt if isinstance(prompt, str | list) else None,  # else embeddings
        "negative_prompt": negative if isinstance(negative, str | list) else None,
        "guidance_scale": request.guidance[0],
        "guidance_rescale": request.guidance[1],
        "prompt_style": request.style,
        "clip_skip": call.get("clip_skip"),
        "rng": request.rng,
        "num_inference_steps": scheduler.num_inference_steps,
        "scheduler": scheduler_name(scheduler),
        "eta": scheduler.eta,
        "seeds": request.seeds,
        "num_images_per_prompt": call.get("num_images_per_prompt", 1),
        "height": request.height,
        "width": request.width,
        "model": model_name(model.name),
        "model_hash": model.hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "version": __version__,
    }
    if request.pictures is not None:
        settings["strength"] = request.pictures.strength
    if request.controls:
        settings |= told_of_controls(request.controls)
    return Trace(
        timesteps=torch.tensor(request.timesteps, dtype=torch.float32),
        latents=latents,
        rgb=latent_rgb(model),
        settings=settings,
        **{kind: torch.stack(parts) if parts else None for kind, parts in kinds.items()},  # type: ignore[arg-type]
    )

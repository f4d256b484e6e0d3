"""From a real picture to the noise that it is drawn again from: DDIM, run backwards (arXiv:2010.02502, section 4.3).

DDIM without eta decides everything by the noise it starts from, so its steps can be taken the other way. A step back
needs the prediction at the noisier end, which is where it leads: it is found by taking the step several times, each
time with the prediction of what the last one gave (Garibi et al. 2024, arXiv:2403.14602).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inversion:
    """What `invert` found.

    latents   (1, 4, h, w) unit noise: sampler(prompt, latents=latents, **call) draws the picture again
    call      the other arguments of that call: scheduler, steps, guidance
    original  (1, 3, H, W) in [0, 1]: the picture, at the size that it was inverted at
    again     (1, 3, H, W) in [0, 1]: drawn again
    """

    latents: Tensor
    call: dict[str, Any]
    original: Tensor
    again: Tensor

    @property
    def error(self) -> float:
        """Mean difference between the picture and what is drawn again, of 255."""
        return 255 * (self.original - self.again).abs().mean().item()


def invert(
    sampler: Any,
    image: Any,
    prompt: Any = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    rounds: int = 3,
    progress: Callable[..., Iterable[Any]] | None = None,
    **call: Any,
) -> Inversion:
    """The noise from which `sampler` draws a picture again, with a prompt that says what is in it.

    image     a picture, as a sampler takes it; height and width as there
    rounds    how often each step is taken: 1 is plain DDIM inversion; each calls the UNet once
    progress  `tqdm`, or what is called like it

    Guidance above 1 makes errors grow: 1 inverts best. Attention maps of the picture are those of drawing it again.
    Raises ValueError as the sampler does.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 100:
        raise ValueError(f"rounds must be a whole number from 1 to 100, not {rounds!r}.")
    for name in ("scheduler", "strength", "eta", "mask_image", "latents", "num_images_per_prompt"):
        if name in call:
            raise ValueError(f"sd.invert takes no argument {name}: it takes all steps of ddim back, of one picture.")
    if call.get("controlnet") is not None:
        raise ValueError(
            "sd.invert takes no argument controlnet: it knows of no steps in which one acts; leave it out."
        )
    if sampler.model.unet.config.in_channels != 4:
        raise ValueError("Weights for inpainting are told a mask, too: invert with weights of 4 channels.")
    fixed = {"scheduler": "ddim", "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    with torch.no_grad():
        request = sampler.request(prompt, image=image, strength=1.0, **fixed, **call)
    if len(request.context) != 1:
        raise ValueError("One picture is inverted at a time: give one prompt.")
    pictures, scheduler = request.pictures, request.scheduler
    steps = range(len(scheduler.timesteps) - 1, -1, -1)
    with torch.no_grad():
        mean, _ = sampler.moments(pictures.images)
        x = mean * sampler.model.vae.config.scale_factor
        with sampler.denoiser(request) as denoiser:
            for i in progress(steps) if progress else steps:
                x = step_back(denoiser, scheduler, i, x, rounds)
    same = {k: v for k, v in call.items() if k not in ("height", "width")}
    again = sampler(prompt, latents=x, output_type="pt", **fixed, **same)
    return Inversion(x, fixed | same, pictures.images / 2 + 0.5, again.cpu().float())


def step_back(denoiser: Callable[[Tensor, Tensor], Tensor], scheduler: Any, i: int, x: Tensor, rounds: int) -> Tensor:
    """From x as it stands after step i to x before it."""
    t = torch.full((len(x),), scheduler.timesteps[i], dtype=torch.float32, device=x.device)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    # A step is x' = a x + b e, for the prediction e: a and b are what it makes of 1 and 0, and of 0 and 1.
    a = scheduler.step(i, zero, one, scheduler.init_state())[0].item()
    b = scheduler.step(i, one, zero, scheduler.init_state())[0].item()
    before = x
    for _ in range(rounds):
        before = (x - b * denoiser(before, t)) / a
    return before

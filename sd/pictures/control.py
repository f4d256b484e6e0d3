"""ControlNets in a call: what a person gives, checked; and the UNet that they add to.

Scale, start, end and guess mode are those of diffusers' StableDiffusionControlNetPipeline. What is known here of a
ControlNet: its `config`, `place`, `files` and `name`, its `hint`, and how it is called (`sd/adapt/controlnet.py`).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..unet import UNetConfig
from .given import fitted, float_tensors, on_white, read_picture, size_of, spread

ARGUMENTS: dict[str, Any] = {  # of a sampler, and what they are where they are not given
    "controlnet": None,
    "control_image": None,
    "controlnet_conditioning_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "guess_mode": False,
}
# of the UNet that it shares
SIZES = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_heads", "context_dim",
         "transformer_depth", "num_groups", "num_head_channels", "use_linear_in_transformer")  # fmt: skip


@dataclass(frozen=True)
class Control:
    """A ControlNet, and what it is told.

    net     a ControlNet, or what is called like it: hint(picture), and net(x, t, context, hint)
    image   (n, 3, H, W) float32, in [0, 1]
    which   for each image of the call, the picture that it follows
    """

    net: Any
    image: Tensor
    which: tuple[int, ...]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def part(self, images: slice) -> Control:
        """For some images of the call."""
        return replace(self, which=self.which[images])

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step of so many."""
        return not (step / steps < self.start or (step + 1) / steps > self.end)

    def added(self, x: Tensor, t: Tensor, context: Any, hint: Tensor) -> list[Tensor]:
        """What is added to each skip of the UNet, and to its middle block."""
        out = self.net(x, t, context, hint)
        scales: Any = [self.scale] * len(out)
        if self.guess and not self.net.config.global_pool:
            scales = torch.logspace(-1, 0, len(out), device=x.device) * self.scale  # a tenth for the first skip
        out = [residual * scale for residual, scale in zip(out, scales, strict=True)]
        return [r.mean(dim=(2, 3), keepdim=True) for r in out] if self.net.config.global_pool else out


def controlled(
    unet: Callable[..., Tensor],
    controls: Sequence[Control],
    steps: int,
    now: Callable[[], Any],
    announced: Callable[..., AbstractContextManager[None]],
) -> Callable[..., Tensor]:
    """The UNet, to which these ControlNets are added; without any, as it is.

    now, announced: a sampler's, to hear which step and which half of guidance a call is for, and to say it where it
    becomes another. A context is a tensor (B, 77, C), or what has its `chunk`.
    """
    if not controls:
        return unet
    hints: dict[tuple[int, int], Tensor] = {}  # of each ControlNet, for so many rows: the same in every step

    def hint_of(k: int, control: Control, x: Tensor) -> Tensor:
        if (k, len(x)) not in hints:
            pictures = control.image[list(control.which)]
            hints[k, len(x)] = control.net.hint(pictures.repeat(len(x) // len(pictures), 1, 1, 1))
        return hints[k, len(x)]

    def residuals(x: Tensor, t: Tensor, context: Any) -> list[Tensor] | None:
        total: list[Tensor] | None = None
        call = now()
        for k, control in enumerate(controls):
            if not control.acts(call.step, steps) or (control.guess and call.half == "uncond"):
                continue
            if control.guess and call.half == "both":  # the prompt's half alone is told
                rows = slice(len(x) // 2, None)
                with announced(half="cond"):
                    told = x[rows], t[rows], context.chunk(2)[1]
                    out = control.added(*told, hint_of(k, control, x[rows]))
                out = [torch.cat([torch.zeros_like(r), r]) for r in out]
            else:
                out = control.added(x, t, context, hint_of(k, control, x))
            total = out if total is None else [a + b for a, b in zip(total, out, strict=True)]
        return total

    def call_unet(x: Tensor, t: Tensor, context: Any) -> Tensor:
        for control in controls:
            control.net.files.check()
        added = residuals(x, t, context)
        return unet(x, t, context) if added is None else unet(x, t, context, control=added)

    return call_unet


def told_of_controls(controls: Sequence[Control]) -> dict[str, Any]:
    """What a drawing says of its ControlNets: the arguments of the call, with a list for each that can be one."""
    return {
        "controlnet": [control.net.name for control in controls],
        "controlnet_hash": [control.net.hash for control in controls],
        "controlnet_conditioning_scale": [control.scale for control in controls],
        "control_guidance_start": [control.start for control in controls],
        "control_guidance_end": [control.end for control in controls],
        "guess_mode": any(control.guess for control in controls),
    }


# ---- a call's arguments


def control_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call that are about ControlNets. Raises ValueError where one that is needed is missing."""
    given = ARGUMENTS | {name: value for name, value in options.items() if name in ARGUMENTS}
    if (given["controlnet"] is None) != (given["control_image"] is None):
        if given["controlnet"] is None:
            raise ValueError("control_image is for a ControlNet, and there is none: give one as controlnet.")
        raise ValueError("A ControlNet needs a picture to follow: give it as control_image.")
    return given


def control_size(given: Mapping[str, Any], factor: int) -> tuple[int, int] | None:
    """(width, height) of the pictures that are followed, cut to multiples of `factor`; None where there are none."""
    images = given["control_image"]
    if images is None:
        return None
    flat = [
        one for image in (images if is_list(images) else [images]) for one in (image if is_list(image) else [image])
    ]
    return size_of(flat, factor)


def controls_in(
    given: Mapping[str, Any], unet: UNetConfig, place: tuple[torch.device, torch.dtype],
    size: tuple[int, int], counts: tuple[int, int], factor: int,
) -> tuple[Control, ...]:  # fmt: skip
    """Check what a call is given (`control_arguments`).

    place: device and dtype of the UNet; size: (width, height); counts: of images, and of those that share a prompt.
    Raises ValueError.
    """
    if given["controlnet"] is None:
        return ()
    several = is_list(given["controlnet"])
    nets = list(given["controlnet"]) if several else [given["controlnet"]]
    if not nets:
        raise ValueError("controlnet is an empty list: give a ControlNet, or leave it out.")
    for net in nets:
        check_net(net, unet, place, factor)
    images = given["control_image"]
    if not several:
        images = [images]
    elif not is_list(images) or len(images) != len(nets):
        count = len(images) if is_list(images) else 1
        raise ValueError(
            f"There are {len(nets)} ControlNets and {count} control image{'s' * (count != 1)}: give control_image as "
            "a list with one for each."
        )
    scales = one_each(given, "controlnet_conditioning_scale", len(nets))
    starts, ends = (one_each(given, f"control_guidance_{end}", len(nets)) for end in ("start", "end"))
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start < end <= 1:
            raise ValueError(
                "control_guidance_start and control_guidance_end are shares of the steps, from 0 to 1, the start "
                f"below the end, not {start:g} and {end:g}."
            )
    if not isinstance(given["guess_mode"], bool):
        raise ValueError(f"guess_mode must be True or False, not {reprlib.repr(given['guess_mode'])}.")
    result = []
    for net, image, scale, start, end in zip(nets, images, scales, starts, ends, strict=True):
        pictures = hint_tensors(image, net.config.hint_channels, *size)
        which = spread(len(pictures), *counts, "control_image")
        guess = given["guess_mode"] or net.config.global_pool
        result.append(Control(net, pictures, which, scale, start, end, guess))
    return tuple(result)


def check_net(net: Any, unet: UNetConfig, place: tuple[torch.device, torch.dtype], factor: int) -> None:
    """Raise ValueError unless a ControlNet is for this UNet, and computes where and in what it does."""
    if not isinstance(net, nn.Module) or not hasattr(net, "hint") or not hasattr(net, "config"):
        raise ValueError(
            f"controlnet must be what sd.load_controlnet gives, or a list of such, not {reprlib.repr(net)}."
        )
    own: Any = net.config
    others = [name for name in SIZES if getattr(own, name) != getattr(unet, name)]
    if own.in_channels != unet.out_channels:
        others.append("in_channels")
    if others:
        ours = getattr(unet, "out_channels" if others[0] == "in_channels" else others[0])
        raise ValueError(
            f"The ControlNet {net.name} is for another model: its {others[0]} is {getattr(own, others[0])}, and "
            f"this model has {ours}; give one that was made for this model."
        )
    times = 2 ** (len(own.hint_widths) - 1)
    if times != factor:
        raise ValueError(
            f"The ControlNet {net.name} is for another model: it makes a picture {times} times smaller, and this "
            f"model's VAE {factor} times; give one that was made for this model."
        )
    theirs: Any = net.place
    if theirs != place:
        own, ours = (f"{str(dtype).removeprefix('torch.')} on {device}" for device, dtype in (theirs, place))
        raise ValueError(
            f"The ControlNet {net.name} computes in {own}, and the UNet in {ours}: load it with "
            "sd.load_controlnet(..., model=model), which takes the model's."
        )


def one_each(given: Mapping[str, Any], name: str, count: int) -> list[float]:
    """A number for each ControlNet, from one for all of them or a list. Raises ValueError."""
    values = given[name]
    values = list(values) if is_list(values) else [values] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} numbers for {count} ControlNets: give one, or one for each.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"{name} must be a number, or a list of one for each ControlNet, not {reprlib.repr(value)}."
            )
    return [float(value) for value in values]


def is_list(given: Any) -> bool:
    return isinstance(given, (list, tuple))


def hint_tensors(given: Any, channels: int, width: int, height: int) -> Tensor:
    """(n, 3, H, W) in [0, 1], to the last bit as diffusers computes it, of a picture or of several.

    A picture of another size is treated as `image` is, so that the two still lie on each other: it is scaled to cover
    what is drawn, and cut. Tensors are taken as they are, from -1 on: that is where ControlNets for inpainting are
    told to draw.
    """
    if is_list(given):
        if not given:
            raise ValueError("control_image is an empty list: give a picture.")
        if any(is_list(one) for one in given):
            raise ValueError("control_image is a list of lists: give a list of pictures, one for each prompt.")
        return torch.cat([hint_tensors(one, channels, width, height) for one in given])
    if isinstance(given, Tensor):
        given = float_tensors(given, "control_image", channels, width, height)
        if not given.isfinite().all() or given.min() < -1 or given.max() > 1:
            raise ValueError("control_image as a tensor must have values from 0 to 1, or -1 where it is to be drawn.")
        return given
    if channels != 3:
        raise ValueError(f"This ControlNet takes {channels} channels: give control_image as a tensor.")
    picture = fitted(on_white(read_picture(given, "control_image"), "control_image"), width, height,
                     Image.Resampling.LANCZOS)  # fmt: skip
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
    return pixels[None].permute(0, 3, 1, 2).contiguous()

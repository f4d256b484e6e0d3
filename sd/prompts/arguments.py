"""What a sampler is called with, checked before any work is done; each fault is one sentence."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..image import MAX_SIDE

MOST_TOKENS = 77 * 256  # of a context
OTHER_NAMES = {  # arguments of diffusers and others, and what to do instead
    "generator": "give seed=, from which image i takes the noise of seed + i",
    "num_images": "it is called num_images_per_prompt here",
    "num_steps": "it is called num_inference_steps here",
    "steps": "it is called num_inference_steps here",
    "guidance": "it is called guidance_scale here",
    "cfg_scale": "it is called guidance_scale here",
    "timesteps": "give num_inference_steps, or a scheduler",
    "sigmas": "give num_inference_steps, or a scheduler",
    **dict.fromkeys(["callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"],
        "sampler.stream(...) hands over every step, to watch it or to stop"),
    "mask": "it is called mask_image here",
    "init_image": "it is called image here",
    "denoising_strength": "it is called strength here",
    "padding_mask_crop": "cut the part out, draw it, and paste it back",
    "return_dict": "leave it out, a list of pictures is returned",
    "cross_attention_kwargs": "sd.use_attention and sd.study.edit change the attention",
}  # fmt: skip


class UnknownArgumentError(TypeError, ValueError):
    """An argument that samplers do not take: TypeError as from any function, ValueError as all that they refuse."""


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise UnknownArgumentError for the first of these arguments, and say what is taken in its place."""
    for name in names:
        hint = OTHER_NAMES.get(name, "help(sd.SimpleSampler.__call__) lists them")
        raise UnknownArgumentError(f"Samplers take no argument {name}: {hint}.")


def check_numbers(guidance_scale: Any, guidance_rescale: Any, num_images_per_prompt: Any, seed: Any) -> None:
    if not is_number(guidance_scale) or not 0 <= guidance_scale <= 100:
        raise ValueError(f"guidance_scale must be a number from 0 to 100 (7.5 is usual), not {guidance_scale!r}.")
    if not is_number(guidance_rescale) or not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be a number from 0 to 1, not {guidance_rescale!r}.")
    if not is_whole(num_images_per_prompt) or not 1 <= num_images_per_prompt <= 1000:
        raise ValueError(
            f"num_images_per_prompt must be a whole number from 1 to 1000, not {num_images_per_prompt!r}."
        )
    if not is_whole(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed!r}.")


def checked_size(
    height: int | None, width: int | None, latents: Any, usual: tuple[int, int], factor: int, channels: int
) -> tuple[int, int]:
    """(height, width) in pixels. usual: the width and the height where nothing is asked for."""
    if latents is not None:
        if not isinstance(latents, Tensor):
            raise ValueError(f"latents must be a tensor, not {reprlib.repr(latents)}.")
        if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
            raise ValueError(
                f"latents must be floating-point, of shape (images, {channels}, height/{factor}, width/{factor}), "
                f"not {latents.dtype} of {tuple(latents.shape)}."
            )
        own = factor * latents.shape[2], factor * latents.shape[3]
        if (height or own[0], width or own[1]) != own:
            raise ValueError(f"latents are for {own[1]} x {own[0]} pixels, not {width} x {height}.")
        height, width = own
    height = usual[1] if height is None else height
    width = usual[0] if width is None else width
    for name, side in (("height", height), ("width", width)):
        if not is_whole(side) or side % factor or not factor <= side <= MAX_SIDE:
            raise ValueError(
                f"{name} must be a multiple of {factor} from {factor} to {MAX_SIDE} pixels, not {side!r}."
            )
    return height, width


def check_embeddings(prompt: Tensor, name: str, wanted: int) -> None:
    """Raise ValueError unless these can be embeddings of a model that takes `wanted` channels."""
    usable = prompt.is_floating_point() and prompt.layout == torch.strided and not prompt.is_meta
    if prompt.ndim != 3 or prompt.shape[-1] != wanted or not prompt.numel() or not usable:
        raise ValueError(
            f"{name} embeddings must be of shape (prompts, 77, {wanted}), dense, floating-point, not empty, "
            f"not {tuple(prompt.shape)} of {prompt.dtype} ({prompt.layout}, {prompt.device})."
        )


def common_length(lengths: Sequence[int]) -> int:
    """The least length in tokens that all of these divide. Raises ValueError where that is too long."""
    length = math.lcm(*lengths)
    if length > MOST_TOKENS:
        counts = " and ".join(str(n // 77) for n in sorted(set(lengths)))
        raise ValueError(
            f"Prompts and negative prompts of {counts} chunks have to be repeated up to {length // 77} chunks, and "
            f"{MOST_TOKENS // 77} are the most: make them of the same length, with BREAK for example."
        )
    return length


def as_long_as_each_other(context: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts of chunks of 77 repeated to one length, which is exact. Raises ValueError for other lengths."""
    a, b = context.shape[1], negative.shape[1]
    if a % 77 or b % 77:
        raise ValueError(
            f"prompt has {a} tokens and negative_prompt {b}: give embeddings of the same length for both."
        )
    length = common_length([a, b])
    return context.repeat(1, length // a, 1), negative.repeat(1, length // b, 1)


def prompt_list(prompt: Any) -> list[str]:
    """The texts of a prompt; none where it is something else."""
    if isinstance(prompt, str):
        return [prompt]
    return list(prompt) if isinstance(prompt, (list, tuple)) else []


def plain(x: Any) -> Any:
    """NumPy's numbers, and others that are none of Python's own, as those; what is no number as it is."""
    if isinstance(x, bool) or not isinstance(x, Real):
        return x
    return int(x) if isinstance(x, Integral) else float(x)


def is_whole(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)

"""From a prompt to pictures: guidance, the denoising loop, and `SimpleSampler`, which hands it what it needs.

The order of operations is that of diffusers' StableDiffusionPipeline, so that the pictures are the same to
the last bit. Variants (lean, parallel) hand the same loop another denoiser, and decode in another way.

Whoever calls the UNet here says what the call is for (`Call`), so that instruments need not guess it.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from numbers import Integral, Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .image import to_pil
from .model import StableDiffusion
from .scheduler import Scheduler, make_scheduler
from .weights.unread import computes_in

Denoiser = Callable[[Tensor, Tensor], Tensor]  # x (B, 4, h, w), t (B,) -> the noise in x
Prompt = str | list[str] | Tensor

MAX_SIDE = 8192  # pixels; far beyond what the v1 models draw well
FLOAT32 = "dtype=torch.float32 (--dtype float32)"  # the remedy for what is not finite

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
    "return_dict": "leave it out, a list of pictures is returned",
    "cross_attention_kwargs": "sd.use_attention and sd.study.edit change the attention",
    "clip_skip": "give prompt_embeds, computed from another layer",
}  # fmt: skip


RUNS = count(1)


@dataclass(frozen=True)
class Call:
    """What one call of the UNet is for. Whoever knows a fact announces it; what nobody announced has its default."""

    run: int = field(default_factory=RUNS.__next__)  # which drawing; each has a number of its own
    prompts: list[str] | None = None  # one text an image; None where embeddings were given
    images: int = 0
    size: tuple[int, int] = (0, 0)  # height and width of the latents
    step: int = 0
    timestep: float = math.nan
    half: str = "cond"  # of guidance: "cond" (the prompt), "uncond" (the negative prompt), "both" (that one first)
    whole: bool = True  # False: a picture that is cut by rows, of which this rank has some


# One a thread, and one a task of asyncio: samplers that draw side by side do not hear each other.
_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call | None:
    """The call of the UNet that is under way in this thread; None where no sampler makes one."""
    return _CALL.get()


@contextmanager
def announced(**facts: Any) -> Iterator[None]:
    """Within the block, calls of the UNet are for this: fields of `Call`, beside those that are announced already.

    The block must not yield to other code, which may make calls of its own.
    """
    call = _CALL.get()
    token = _CALL.set(Call(**facts) if call is None else replace(call, **facts))
    try:
        yield
    finally:
        _CALL.reset(token)


class UnknownArgumentError(TypeError, ValueError):
    """An argument that samplers do not take: TypeError as from any function, ValueError as all that they refuse."""


class NotFiniteError(ValueError):
    """A stage returned NaN or infinity; the message names it and the remedy."""


@dataclass(frozen=True)
class Step:
    """What one turn of the loop knows. Tensors are (B, 4, h, w)."""

    index: int  # 0, 1, ...
    timestep: float  # what the model was told
    latents: Tensor  # after this step
    noise: Tensor  # predicted, guided
    denoised: Tensor  # the clean latents that this prediction points to: for previews


def with_text(unet: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor) -> Denoiser:
    """The UNet, told what to draw: context (B, 77, C)."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        with announced(half="cond"):
            return unet(x, t, context)

    return denoiser


def guide(away: Tensor, towards: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: away from one prediction, towards the other (Ho & Salimans, arXiv:2207.12598)."""
    return away + scale * (towards - away)


def guided(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, negative: Tensor, scale: float
) -> Denoiser:
    """Guided away from `negative`, towards `context`.

    One call with the batch doubled, the negative half first, as in ldm and diffusers.
    """
    both = torch.cat([negative, context])

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        with announced(half="both"):
            away, towards = unet(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(away, towards, scale)

    return denoiser


def denoise(
    denoiser: Denoiser, x: Tensor, scheduler: Scheduler, draw: Callable[[], Tensor] | None = None
) -> Iterator[Step]:
    """The denoising loop. x: (B, 4, h, w), unit noise times the scheduler's `init_noise_sigma`.

    `draw` gives fresh unit noise like x; it is called where a step of the scheduler needs that.
    """
    run, images, size = next(RUNS), len(x), (x.shape[-2], x.shape[-1])
    state = scheduler.init_state()
    for i, timestep in enumerate(scheduler.timesteps):
        t = torch.full((len(x),), timestep, dtype=torch.float32, device=x.device)
        with announced(run=run, images=images, size=size, step=i, timestep=timestep):
            noise = denoiser(scheduler.scale_input(i, x), t)
        denoised = scheduler.denoised(i, noise, x)
        x, state = scheduler.step(i, noise, x, state, variance_noise=draw() if draw and scheduler.draws(i) else None)
        yield Step(i, timestep, x, noise, denoised)


@dataclass(frozen=True)
class Request:
    """The arguments of a call, checked. B images: those of the first prompt, then those of the next."""

    prompts: list[str] | None  # one text an image; None where embeddings were given
    context: Tensor  # (B, 77, C)
    negative: Tensor | None  # (B, 77, C), or None where there is no guidance
    guidance_scale: float
    height: int
    width: int
    seeds: list[int]  # one an image
    scheduler: Scheduler
    latents: Tensor | None  # (B, 4, h, w)


class SimpleSampler:
    """Draws with the model as it stands: the textbook, and the reference for every other sampler."""

    def __init__(self, model: StableDiffusion):
        self.model = model

    def __call__(self, prompt: Prompt | None = None, *, output_type: str = "pil", **options: Any) -> Any:
        """Draw: a list of PIL images, in the order of the prompts.

        Arguments are those of diffusers' StableDiffusionPipeline, but for the seed:

        prompt                a text, a list of texts, or their embeddings (P, 77, C)
        negative_prompt       what to stay away from; one for all prompts, or one for each
        num_inference_steps   1 to 1000
        guidance_scale        at 1 or less there is no guidance, and half the work
        height, width         in pixels, multiples of 8
        num_images_per_prompt 1
        seed                  0; image i starts from the noise of seed + i
        scheduler             a name that sd.make_scheduler knows, such as "ddim" or "dpmpp_2m_karras", or a scheduler
        eta                   0.0 to 1.0, for "ddim"
        latents               (B, 4, h, w) unit noise to start from in place of the seed's
        output_type           "pil"; "pt": (B, 3, H, W) in [0, 1]; "latent": (B, 4, h, w), scaled
        prompt_embeds, negative_prompt_embeds   diffusers' names for embeddings in place of texts

        Steps, guidance, size and scheduler are those of `model.defaults` where they are not given: for Stable
        Diffusion v1, 50 steps of "pndm" at a guidance of 7.5, and the size that the model was trained for.

        Raises ValueError, in one sentence, for what is out of range; NotFiniteError where a stage yields NaN.
        """
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'pt' or 'latent', not {output_type!r}.")
        latents = None
        for step in self.stream(prompt, **options):
            latents = step.latents
        assert latents is not None  # every scheduler has at least one step
        return self.decode(latents, output_type)

    def stream(self, prompt: Prompt | None = None, **options: Any) -> Iterator[Step]:
        """The same call as a generator: one `Step` after each call of the UNet. Stop when you like.

        Arguments are checked at once, before the first step is asked for.
        """
        with torch.no_grad():
            request = self.request(prompt, **options)
        return self.run(request)

    def run(self, request: Request) -> Iterator[Step]:
        """The steps of a request that `request` has checked."""
        draw = noise_like_diffusers(self.model, request)
        x = request.latents if request.latents is not None else draw()
        x = x * request.scheduler.init_noise_sigma
        with self.denoiser(request) as denoiser:
            steps = denoise(denoiser, x, request.scheduler, draw)
            while True:
                # Entered for each step, not around the loop: the caller's code runs between two steps.
                self.model.check_file()
                with torch.no_grad(), announced(prompts=request.prompts):
                    step = next(steps, None)
                    if step is None:
                        return
                    finite(step.latents, f"UNet (step {step.index + 1})", FLOAT32)
                yield step

    def request(
        self,
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        scheduler: str | Scheduler | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **unknown: Any,
    ) -> Request:
        """Check the arguments of a call, and encode its texts."""
        for name in unknown:
            hint = OTHER_NAMES.get(name, "help(sd.SimpleSampler.__call__) lists them")
            raise UnknownArgumentError(f"Samplers take no argument {name}: {hint}.")
        usual = self.model.defaults
        seed, num_images_per_prompt, eta = plain(seed), plain(num_images_per_prompt), plain(eta)
        num_inference_steps, guidance_scale = plain(num_inference_steps), plain(guidance_scale)
        height, width = plain(height), plain(width)
        scheduler = usual.scheduler if scheduler is None else scheduler
        guidance_scale = usual.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(scheduler, str):
            steps = usual.num_inference_steps if num_inference_steps is None else num_inference_steps
            scheduler = make_scheduler(scheduler, steps, eta, schedule=usual.schedule)
        if not is_number(guidance_scale) or not 0 <= guidance_scale <= 100:
            raise ValueError(f"guidance_scale must be a number from 0 to 100 (7.5 is usual), not {guidance_scale!r}.")
        if not is_whole(num_images_per_prompt) or not 1 <= num_images_per_prompt <= 1000:
            raise ValueError(
                f"num_images_per_prompt must be a whole number from 1 to 1000, not {num_images_per_prompt!r}."
            )
        if not is_whole(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, not {seed!r}.")
        height, width = self._size(height, width, latents)

        given = prompt if prompt_embeds is None else prompt_embeds
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negatives = negative_prompt if negative_prompt_embeds is None else negative_prompt_embeds
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and not isinstance(embeds, Tensor):
                raise ValueError(f"{name} must be a tensor, not {reprlib.repr(embeds)}; texts are a prompt.")
        context = self._encode(given, "prompt", None)
        negative = self._encode(negatives, "negative_prompt", len(context)) if guidance_scale > 1 else None
        if negative is not None and negative.shape[1] != context.shape[1]:
            lengths = f"prompt has {context.shape[1]} tokens and negative_prompt {negative.shape[1]}"
            raise ValueError(f"{lengths}: give embeddings of the same length for both.")
        context = context.repeat_interleave(num_images_per_prompt, dim=0)
        if negative is not None:
            negative = negative.repeat_interleave(num_images_per_prompt, dim=0)
        if latents is not None:
            if len(latents) != len(context):
                raise ValueError(
                    f"latents are for {len(latents)} images, but {len(context)} are asked for: give one each."
                )
            latents = latents.to(device=context.device, dtype=context.dtype)
        texts = None
        if not isinstance(given, Tensor):
            texts = [text for text in prompt_list(given) for _ in range(num_images_per_prompt)]
        seeds = [seed + i for i in range(len(context))]
        return Request(texts, context, negative, guidance_scale, height, width, seeds, scheduler, latents)

    def _size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        f, channels = self.model.vae.config.downsampling, self.model.unet.config.in_channels
        if latents is not None:
            if not isinstance(latents, Tensor):
                raise ValueError(f"latents must be a tensor, not {reprlib.repr(latents)}.")
            if latents.ndim != 4 or latents.shape[1] != channels or not latents.is_floating_point():
                raise ValueError(
                    f"latents must be floating-point, of shape (images, {channels}, height/{f}, width/{f}), "
                    f"not {latents.dtype} of {tuple(latents.shape)}."
                )
            own = f * latents.shape[2], f * latents.shape[3]
            if (height or own[0], width or own[1]) != own:
                raise ValueError(f"latents are for {own[1]} x {own[0]} pixels, not {width} x {height}.")
            height, width = own
        usual = self.model.defaults
        height = usual.height or self.model.size if height is None else height
        width = usual.width or self.model.size if width is None else width
        for name, side in (("height", height), ("width", width)):
            if not is_whole(side) or side % f or not f <= side <= MAX_SIDE:
                raise ValueError(f"{name} must be a multiple of {f} from {f} to {MAX_SIDE} pixels, not {side!r}.")
        return height, width

    def _encode(self, prompt: Prompt | None, name: str, count: int | None) -> Tensor:
        """(P, 77, C) on the UNet's device; `count`: how many are wanted, where it is known."""
        if isinstance(prompt, Tensor):
            wanted = self.model.unet.config.context_dim
            usable = prompt.is_floating_point() and prompt.layout == torch.strided and not prompt.is_meta
            if prompt.ndim != 3 or prompt.shape[-1] != wanted or not prompt.numel() or not usable:
                raise ValueError(
                    f"{name} embeddings must be of shape (prompts, 77, {wanted}), dense, floating-point, not empty, "
                    f"not {tuple(prompt.shape)} of {prompt.dtype} ({prompt.layout}, {prompt.device})."
                )
            context = prompt.to(device=self.model.device, dtype=self.model.dtype)
            if not context.isfinite().all():
                raise ValueError(f"{name} embeddings have NaN or infinity in {context.dtype}: give finite ones.")
        else:
            texts = prompt_list(prompt)
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} must be a text or a list of texts, not {reprlib.repr(prompt)}.")
            context = self.encode_prompt(texts)
        if count is not None and len(context) != count:
            if len(context) != 1:
                raise ValueError(f"{name} has {len(context)} entries for {count} prompts: give one, or one each.")
            context = context.expand(count, -1, -1)
        finite(context, "text encoder", FLOAT32)
        return context

    def encode_prompt(self, texts: list[str]) -> Tensor:
        return self.model.encode_prompt(texts)

    @contextmanager
    def denoiser(self, request: Request) -> Iterator[Denoiser]:
        """What predicts the noise for a request, while it is drawn."""
        if request.negative is None:
            yield with_text(self.model.unet, request.context)
        else:
            yield guided(self.model.unet, request.context, request.negative, request.guidance_scale)

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> list[Image.Image] | Tensor:
        """Scaled latents (B, 4, h, w) -> pictures, as `output_type` says in `__call__`. One at a time."""
        if output_type == "latent":
            return latents
        self.model.check_file()
        place = computes_in(self.model.vae)  # may differ: the VAE in float32 beside a float16 UNet, or elsewhere
        images = torch.cat([self.model.vae.decode(z.to(*place)) for z in latents.split(1)])
        return finished(images, output_type)


def finished(images: Tensor, output_type: str) -> list[Image.Image] | Tensor:
    """The VAE's (B, 3, H, W), about [-1, 1], which is written over, as `output_type` says."""
    finite(images, "VAE", f"{FLOAT32}, or model.vae.float() for the VAE alone")
    images = images.div_(2).add_(0.5).clamp_(0, 1)
    return images if output_type == "pt" else to_pil(images)


def noise_like_diffusers(model: StableDiffusion, request: Request) -> Callable[[], Tensor]:
    """A function that draws (B, 4, h, w) of unit noise, each image's from the CPU generator of its own seed.

    Drawn in the model's dtype, as diffusers does: another dtype draws other noise from the same seed.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    f = model.vae.config.downsampling
    shape = (1, model.unet.config.in_channels, request.height // f, request.width // f)

    def draw() -> Tensor:
        noise = [torch.randn(shape, generator=g, dtype=request.context.dtype) for g in generators]
        return torch.cat(noise).to(request.context.device)

    return draw


def finite(x: Tensor, stage: str, remedy: str) -> None:
    if not torch.isfinite(x).all():
        raise NotFiniteError(
            f"The {stage} returned NaN or infinity in {str(x.dtype).removeprefix('torch.')}: "
            f"try {remedy}; if it stays, the weights are damaged."
        )


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

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
from functools import partial
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .image import to_pil
from .model import StableDiffusion
from .noise import check_rng, noise_source
from .pictures import (
    Control,
    Pictures,
    Start,
    begin_from,
    beside,
    control_arguments,
    control_size,
    controlled,
    controls_in,
    pasted,
)
from .pictures.given import pictures_in, size_of
from .prompts.arguments import (
    as_long_as_each_other,
    check_embeddings,
    check_numbers,
    checked_size,
    plain,
    prompt_list,
    refuse_unknown,
)
from .scheduler import Scheduler
from .weights.unread import computes_in

Denoiser = Callable[[Tensor, Tensor], Tensor]  # x (B, 4, h, w), t (B,) -> what the model predicts for x
Prompt = str | list[str] | Tensor

FLOAT32 = "dtype=torch.float32 (--dtype float32)"  # the remedy for what is not finite

RUNS = count(1)


@dataclass(frozen=True)
class Call:
    """What one call of the UNet is for. Whoever knows a fact announces it; what nobody announced has its default."""

    run: int = field(default_factory=RUNS.__next__)  # which drawing; each has a number of its own
    prompts: list[str] | None = None  # one text an image; None where embeddings were given
    style: str = "plain"  # in which they are written
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


class NotFiniteError(ValueError):
    """A stage returned NaN or infinity; the message names it and the remedy."""


@dataclass(frozen=True)
class Step:
    """What one turn of the loop knows. Tensors are (B, 4, h, w)."""

    index: int  # 0, 1, ...
    timestep: float  # what the model was told
    latents: Tensor  # after this step
    noise: Tensor  # in the latents before it, by the guided prediction
    denoised: Tensor  # the clean latents, by the same: for previews


def with_text(unet: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor) -> Denoiser:
    """The UNet, told what to draw: context (B, 77, C)."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        with announced(half="cond"):
            return unet(x, t, context)

    return denoiser


def guide(away: Tensor, towards: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: away from one prediction, towards the other (Ho & Salimans, arXiv:2207.12598).

    rescale takes back so much, 0 to 1, of what that adds to the contrast (arXiv:2305.08891, formulas 15 and 16).
    """
    result = away + scale * (towards - away)
    if not rescale:
        return result
    dims = tuple(range(1, result.ndim))
    as_before = result * (towards.std(dims, keepdim=True) / result.std(dims, keepdim=True))
    return rescale * as_before + (1 - rescale) * result


def guided(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor], context: Tensor, negative: Tensor, *how: float
) -> Denoiser:
    """Guided away from `negative`, towards `context`; how: scale and rescale of `guide`.

    One call with the batch doubled, the negative half first, as in ldm and diffusers.
    """
    both = torch.cat([negative, context])

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        with announced(half="both"):
            away, towards = unet(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guide(away, towards, *how)

    return denoiser


def denoise(
    denoiser: Denoiser,
    x: Tensor,
    scheduler: Scheduler,
    draw: Callable[[torch.dtype | None], Tensor] | None = None,
    begin: int = 0,
    restore: Callable[[int, Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """The denoising loop. x: (B, 4, h, w), unit noise times the scheduler's `init_noise_sigma`.

    draw      gives fresh unit noise like x, drawn in the scheduler's `noise_dtype`, where a step of it needs that
    begin     the scheduler's step to begin with; x is then what `scheduler.add_noise` makes of clean latents
    restore   from the scheduler's step i, and x after it, to x with what is to stay put back: a mask
    """
    run, images, size = next(RUNS), len(x), (x.shape[-2], x.shape[-1])
    state = scheduler.init_state()
    for step, (i, timestep) in enumerate(list(enumerate(scheduler.timesteps))[begin:]):
        t = torch.full((len(x),), timestep, dtype=torch.float32, device=x.device)
        with announced(run=run, images=images, size=size, step=step, timestep=timestep):
            prediction = denoiser(scheduler.scale_input(i, x), t)
        noise, denoised = scheduler.noise(i, prediction, x), scheduler.denoised(i, prediction, x)
        fresh = draw(scheduler.noise_dtype) if draw and scheduler.draws(i) else None
        x, state = scheduler.step(i, prediction, x, state, variance_noise=fresh)
        if restore is not None:
            x = restore(i, x)
        yield Step(step, timestep, x, noise, denoised)


@dataclass(frozen=True)
class Request:
    """The arguments of a call, checked. B images: those of the first prompt, then those of the next."""

    prompts: list[str] | None  # one text an image; None where embeddings were given
    context: Tensor  # (B, 77, C)
    negative: Tensor | None  # (B, 77, C), or None where there is no guidance
    guidance: tuple[float, float]  # scale and rescale
    height: int
    width: int
    seeds: list[int]  # one an image
    scheduler: Scheduler
    latents: Tensor | None  # (B, 4, h, w)
    pictures: Pictures | None = None  # to draw from
    beside: Tensor | None = None  # (B, 5, h, w): what weights of 9 channels are told; known when the loop starts
    style: str = "plain"  # in which the prompts are written
    rng: str = "cpu"  # where noise comes from
    controls: tuple[Control, ...] = ()  # ControlNets, and what each is told

    @property
    def begin(self) -> int:
        """The scheduler's step that the loop begins with."""
        return 0 if self.pictures is None else self.scheduler.begin(self.pictures.strength)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of the steps that are taken."""
        return self.scheduler.timesteps[self.begin :]


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
        guidance_scale        at 1 or less there is no guidance, and half the work; LCM's UNets are told it, and
                              draw in half the work at any
        guidance_rescale      0.0 to 1.0: how much of the contrast that guidance adds is taken back
        height, width         in pixels, multiples of 8
        num_images_per_prompt 1
        seed                  0; image i starts from the noise of seed + i
        scheduler             a name that sd.make_scheduler knows, such as "ddim" or "dpmpp_2m_karras", or a scheduler
        eta                   0.0 to 1.0, for "ddim"
        latents               (B, 4, h, w) unit noise to start from in place of the seed's
        image                 a picture to draw from: PIL's, a path, or (n, 3, H, W) in [0, 1]; or a list, one for
                              each prompt. The size is then the picture's, cut to multiples of 8; with height and
                              width it is scaled to cover them, and cut
        strength              0.8; above 0, to 1: the share of the steps that is taken, from the picture under noise
        mask_image            of the picture's size: what is white is drawn anew, what is black stays, grey is drawn
                              anew in the last of the steps; (n, 1, H, W) in [0, 1]
        paste                 True; pixels where the mask is black are the picture's own, with a seam of 4 pixels
        prompt_style          "plain"; "a1111", "comfy": weights as (word:1.2), and prompts of any length; "compel":
                              the same, with weights as word++ and (two words)1.2
        clip_skip             so many of the text encoder's last layers are left out; 1 is AUTOMATIC1111's 2
        rng                   "cpu"; "cuda": the noise that an NVIDIA GPU draws for a seed, as in AUTOMATIC1111
        output_type           "pil"; "pt": (B, 3, H, W) in [0, 1]; "latent": (B, 4, h, w), scaled
        prompt_embeds, negative_prompt_embeds   diffusers' names for embeddings in place of texts
        controlnet            what sd.load_controlnet gives; or a list, and then the next four may be lists, too
        control_image         the picture that it follows, such as edges: as `image` is given, and scaled and cut like
                              it; a list of them, one for each prompt. It says the size where there is no `image`
        controlnet_conditioning_scale   1.0; how much of what it says is added
        control_guidance_start, control_guidance_end   0.0 and 1.0; the shares of the steps before and after which it
                              is left out
        guess_mode            False; True: it alone says what to draw, for empty prompts; guidance of 3 to 5 is usual

        Steps, guidance, size and scheduler are those of `model.defaults` where they are not given: for Stable
        Diffusion v1, 50 steps of "pndm" at a guidance of 7.5, and the size that the model was trained for.

        Raises ValueError, in one sentence, for what is out of range; NotFiniteError where a stage yields NaN.
        """
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'pt' or 'latent', not {output_type!r}.")
        latents = None
        with torch.no_grad():
            request = self.request(prompt, **options)
        for step in self.run(request):
            latents = step.latents
        assert latents is not None  # every scheduler has at least one step
        return self.finish(latents, request, output_type)

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
        with torch.no_grad():
            start = self.start(request, draw)
        if start.beside is not None:
            request = replace(request, beside=start.beside)
        with self.denoiser(request) as denoiser:
            steps = denoise(denoiser, start.x, request.scheduler, draw, start.begin, start.restore)
            while True:
                # Entered for each step, not around the loop: the caller's code runs between two steps.
                self.model.check_file()
                with torch.no_grad(), announced(prompts=request.prompts, style=request.style):
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
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        scheduler: str | Scheduler | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        image: Any = None,
        strength: float = 0.8,
        mask_image: Any = None,
        paste: bool = True,
        prompt_style: str = "plain",
        clip_skip: int | None = None,
        rng: str = "cpu",
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        **more: Any,
    ) -> Request:
        """Check the arguments of a call, and encode its texts. more: those about ControlNets."""
        control = control_arguments(more)
        refuse_unknown(name for name in more if name not in control)
        usual = self.model.defaults
        seed, num_images_per_prompt, eta = plain(seed), plain(num_images_per_prompt), plain(eta)
        num_inference_steps, guidance_scale = plain(num_inference_steps), plain(guidance_scale)
        height, width = plain(height), plain(width)
        guidance_scale = usual.guidance_scale if guidance_scale is None else guidance_scale
        if scheduler is None or isinstance(scheduler, str):
            scheduler = usual.make_scheduler(scheduler, num_inference_steps, eta)
        guidance = guidance_scale, plain(guidance_rescale)
        check_numbers(*guidance, num_images_per_prompt, seed)
        check_rng(rng)
        if image is None and mask_image is not None:
            raise ValueError("mask_image says what of a picture is drawn anew: give image as well.")
        f, channels = self.model.vae.config.downsampling, self.model.vae.config.z_channels
        followed = control_size(control, f) if image is None and latents is None and not (height and width) else None
        own = followed or (usual.width, usual.height) if image is None or latents is not None else size_of(image, f)
        own = own[0] or self.model.size, own[1] or self.model.size
        height, width = checked_size(height, width, latents, own, f, channels)

        given = prompt if prompt_embeds is None else prompt_embeds
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negatives = negative_prompt if negative_prompt_embeds is None else negative_prompt_embeds
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is not None and not isinstance(embeds, Tensor):
                raise ValueError(f"{name} must be a tensor, not {reprlib.repr(embeds)}; texts are a prompt.")
        how = {"prompt_style": prompt_style, "clip_skip": plain(clip_skip)}
        context = self._encode(given, "prompt", None, **how)
        halves = guidance_scale > 1 and not self.model.unet.config.guidance_dim  # else told, as in LCM, or none
        negative = self._encode(negatives, "negative_prompt", len(context), **how) if halves else None
        if negative is not None and negative.shape[1] != context.shape[1]:
            context, negative = as_long_as_each_other(context, negative)
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
        pictures, counts = None, (len(context), num_images_per_prompt)
        if image is not None:
            pictures = pictures_in(image, mask_image, (width, height), plain(strength), paste, counts, f)
            scheduler.begin(pictures.strength)  # where it leaves no step, that is said now
        place = computes_in(self.model.unet)
        controls = controls_in(control, self.model.unet.config, place, (width, height), counts, f)
        return Request(texts, context, negative, guidance, height, width, seeds, scheduler, latents, pictures,
                       style=prompt_style, rng=rng, controls=controls)  # fmt: skip

    def _encode(self, prompt: Prompt | None, name: str, count: int | None, **how: Any) -> Tensor:
        """(P, 77k, C) on the UNet's device; `count`: how many are wanted, where it is known."""
        if isinstance(prompt, Tensor):
            check_embeddings(prompt, name, self.model.unet.config.context_dim)
            context = prompt.to(device=self.model.device, dtype=self.model.dtype)
            if not context.isfinite().all():
                raise ValueError(f"{name} embeddings have NaN or infinity in {context.dtype}: give finite ones.")
        else:
            texts = prompt_list(prompt)
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} must be a text or a list of texts, not {reprlib.repr(prompt)}.")
            context = self.encode_prompt(texts, **how)
        if count is not None and len(context) != count:
            if len(context) != 1:
                raise ValueError(f"{name} has {len(context)} entries for {count} prompts: give one, or one each.")
            context = context.expand(count, -1, -1)
        finite(context, "text encoder", FLOAT32)
        return context

    def encode_prompt(self, texts: list[str], **how: Any) -> Tensor:
        return self.model.encode_prompt(texts, **how)

    def start(self, request: Request, draw: Callable[..., Tensor]) -> Start:
        """Where the loop begins: with noise, or with a picture under noise."""

        def encode(images: Tensor, which: tuple[int, ...], noise: Tensor) -> Tensor:
            moments = {k: self.moments(images[k : k + 1]) for k in sorted(set(which))}
            drawn = [moments[k][0] + moments[k][1] * noise[i : i + 1] for i, k in enumerate(which)]
            return torch.cat(drawn) * self.model.vae.config.scale_factor

        return begin_from(request, draw, encode, self.model.unet.config.in_channels, self.model.vae.draws)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) in [-1, 1] -> mean and standard deviation of its latents, for the UNet."""
        mean, logvar = self.posterior(image)
        finite(mean, "VAE's encoder", f"{FLOAT32}, or model.vae.float() for the VAE alone")
        like = self.model.device, self.model.dtype
        return mean.to(*like), torch.exp(0.5 * logvar).to(*like)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The same picture -> mean and log-variance, where and in what the VAE computes."""
        self.model.check_file()
        return self.model.vae.moments(image.to(*computes_in(self.model.vae)))

    def around(self, unet: Callable[..., Tensor], request: Request) -> Callable[..., Tensor]:
        """The UNet, told what a request has beside x: LCM's guidance, the mask of 9 channels, and ControlNets."""
        if self.model.unet.config.guidance_dim:
            unet = partial(unet, guidance=request.guidance[0])
        unet, steps = beside(unet, request.beside), len(request.timesteps)
        return controlled(unet, request.controls, steps, current_call, announced)

    @contextmanager
    def denoiser(self, request: Request) -> Iterator[Denoiser]:
        """What predicts the noise for a request, while it is drawn."""
        unet = self.around(self.model.unet, request)
        if request.negative is None:
            yield with_text(unet, request.context)
        else:
            yield guided(unet, request.context, request.negative, *request.guidance)

    def finish(self, latents: Tensor, request: Request, output_type: str = "pil") -> list[Image.Image] | Tensor:
        """`decode`, and the request's own picture where its mask is black."""
        pictures = request.pictures
        if output_type == "latent" or pictures is None or pictures.mask is None or not pictures.paste:
            return self.decode(latents, output_type)
        images = self.decode(latents, "pt")
        assert isinstance(images, Tensor)
        images = pasted(images, pictures)
        return images if output_type == "pt" else to_pil(images)

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


def noise_like_diffusers(model: StableDiffusion, request: Request) -> Callable[..., Tensor]:
    """A function that draws (B, 4, h, w) of unit noise, each image's from the source of its own seed.

    Drawn in the model's dtype if no other is given, as diffusers does: another draws other noise from the same seed.
    """
    sources = [noise_source(seed, request.rng) for seed in request.seeds]
    f = model.vae.config.downsampling
    shape = (1, model.vae.config.z_channels, request.height // f, request.width // f)

    def draw(dtype: torch.dtype | None = None) -> Tensor:
        like = request.context
        return torch.cat([source(shape, dtype or like.dtype) for source in sources]).to(like.device)

    return draw


def finite(x: Tensor, stage: str, remedy: str) -> None:
    if not torch.isfinite(x).all():
        raise NotFiniteError(
            f"The {stage} returned NaN or infinity in {str(x.dtype).removeprefix('torch.')}: "
            f"try {remedy}; if it stays, the weights are damaged."
        )

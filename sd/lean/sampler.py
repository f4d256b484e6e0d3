"""`LeanSampler`: the picture that `SimpleSampler` draws, in a fraction of the memory.

It hands the same loop a UNet whose layers take their weights from the file when they need them (`stream.py`), and
decodes by bands (`bands.py`), as a plan says (`plan.py`). Text encoder, UNet and VAE are never in memory together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..model import StableDiffusion, refuse_fast
from ..sampler import Denoiser, Prompt, Request, SimpleSampler, Step, announced, finished, guide
from ..speed.malloc import trim
from ..unet import ResBlock, UNet, timestep_embedding
from .bands import Bands
from .plan import PROCESS, TEXT_PIECE, Job, Plan, bytes_of, make_plan
from .stream import Weights, streamed, weights_on


class LeanSampler(SimpleSampler):
    """Draws what `SimpleSampler` draws, up to rounding, in little memory; the call is the same.

    model    best from `sd.load(source, lazy=True)`, which leaves the weights in the file; one that is in memory
             already is used as it is, and only its activations are lean
    memory   "600MB", "1.5GB" or bytes: the peak to stay below, counted from the process as it is before the first
             call; if not given, four fifths of what is free. With more memory more weights are kept: faster.

    `sampler.plan(...)`, called like the sampler, says how a call will be done and what it takes.
    A call raises ValueError, naming the least that would do, where `memory` is too little.
    """

    def __init__(self, model: StableDiffusion, memory: str | int | None = None):
        refuse_fast(model, "LeanSampler")
        self.base = anonymous()
        self.model = model
        self.memory = None if memory is None else bytes_of(memory)
        self.weights: Weights | None = None
        self.current: Plan | None = None

    # ---- the plan

    def job(self, request: Request) -> Job:
        model, itemsize = self.model, self.model.dtype.itemsize
        ready = Weights(model.dtype, model.device).ready
        streamable = sum(w.numel() for w in large_weights(model.unet) if not ready(w))
        return Job(
            model.unet.config,
            model.vae.config,
            model.text.config.hidden_size,
            request.height,
            request.width,
            len(request.context),
            request.negative is not None,
            len(request.scheduler.timesteps),
            itemsize,
            PROCESS if model.device.type == "cpu" else 0,
            itemsize * streamable,
        )

    def make_plan(self, request: Request) -> Plan:
        return make_plan(self.job(request), free_memory(self.model.device) if self.memory is None else self.memory)

    def plan(self, prompt: Prompt | None = None, **options: Any) -> Plan:
        """How this call would be done. Takes the arguments of a call; `str(plan)` is for people."""
        with torch.no_grad():
            return self.make_plan(self.request(prompt, **options))

    # ---- the stages, each with its own weights

    def _encode(self, prompt: Prompt | None, name: str, count: int | None) -> Tensor:
        if isinstance(prompt, Tensor):
            return super()._encode(prompt, name, count)
        weights = weights_on(self.model.device, self.model.dtype, TEXT_PIECE)
        with self.stage("text encoder"), streamed(self.model.text.model, weights):
            return super()._encode(prompt, name, count)

    def run(self, request: Request) -> Iterator[Step]:
        try:
            yield from super().run(request)
        finally:
            if self.weights is not None:
                self.weights.release()  # text encoder, UNet and VAE are not in memory together

    def denoiser(self, request: Request) -> Denoiser:
        trim()
        self.current = plan = self.make_plan(request)
        self.weights = weights_on(self.model.device, self.model.dtype, plan.piece, self.tidier(plan.peaks["UNet"]))
        contexts = [request.context] if request.negative is None else [request.negative, request.context]
        with self.stage("UNet"):
            unet = LeanUNet(self.model.unet, self.weights, request, contexts)
            self.weights.keep(large_weights(self.model.unet), plan.kept)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            with self.stage("UNet"):
                if request.negative is None:
                    with announced(half="cond"):
                        return unet(x, t, slice(0, 1))
                if plan.halves:
                    with announced(half="uncond"):
                        away = unet(x, t, slice(0, 1))
                    with announced(half="cond"):
                        towards = unet(x, t, slice(1, 2))
                else:
                    with announced(half="both"):
                        away, towards = unet(torch.cat([x, x]), torch.cat([t, t]), slice(0, 2)).chunk(2)
                return guide(away, towards, request.guidance_scale)

        return denoiser

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> list[Image.Image] | Tensor:
        if output_type == "latent":
            return latents
        trim()
        plan = self.current
        f = self.model.vae.config.downsampling
        if plan and (f * latents.shape[2], f * latents.shape[3]) != (plan.job.height, plan.job.width):
            plan = None  # of another call
        like = next(self.model.vae.parameters())  # may differ from the UNet's, where it is in memory
        weights = Weights(*((latents.dtype, self.model.device) if self.model.lazy else (like.dtype, like.device)))
        latents = latents.to(weights.device, weights.dtype)

        def ready(layer: nn.Module) -> tuple[Tensor, Tensor]:
            return weights.whole(layer.weight), weights.whole(layer.bias)  # type: ignore[arg-type]

        images = []
        for z in latents.split(1):
            with self.stage("VAE"):
                if plan:
                    bands = Bands(plan.band, plan.choices, ready, tidy=self.tidier(plan.peaks["VAE"]))
                else:
                    bands = Bands(weights=ready)
                images.append(bands.decode(self.model.vae, z))
            trim()
        result = torch.cat(images) if len(images) > 1 else images[0]
        del images
        return finished(result, output_type)

    def tidier(self, peak: int) -> Callable[[], None]:
        """A function that keeps the C library's heap within a predicted peak.

        Tensors of many sizes leave holes in it. Mapping each tensor on its own would avoid them, at the price of
        new pages for every tensor (a quarter of the speed); giving the holes back when they add up costs little.
        """
        check = self.model.check_file
        usual = limit = self.base + int(0.88 * peak)

        def tidy() -> None:
            nonlocal limit
            check()
            if anonymous() > limit:
                trim()
                limit = max(
                    usual, anonymous() + max(peak // 16, 1 << 24)
                )  # not at every turn, if what is left is in use

        return tidy if self.model.device.type == "cpu" else check

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a part of the work: says what to do where the file or the device fails in it."""
        self.model.check_file()
        try:
            yield
        except torch.OutOfMemoryError:
            plan = self.current
            needs = f"it should take {plan.peak / 1e6:.0f} MB" if plan else "it is the first stage"
            advice = f"pass memory= less than {plan.peak / 1e6:.0f} MB, or free some" if plan else "free some"
            raise ValueError(f"The device ran out of memory in the {name} ({needs}): {advice}.") from None


class LeanUNet:
    """The UNet with streamed weights, for the prompts and the timesteps of one request.

    What depends on the time alone, or on the text alone, is computed once; those weights are not needed again.
    """

    def __init__(self, unet: UNet, weights: Weights, request: Request, contexts: list[Tensor]):
        self.unet, self.weights = unet, weights
        self.images = len(contexts[0])
        self.texts: dict[nn.Module, Tensor] = {}  # of each to_k and to_v of cross-attention: (parts*B, 77, C)
        self.times: dict[nn.Module, Tensor] = {}  # of each emb_layers: (timesteps, C)
        timesteps = torch.tensor(request.scheduler.timesteps, dtype=torch.float32, device=weights.device).unique()
        self.row = {t: i for i, t in enumerate(timesteps.tolist())}
        with torch.no_grad(), streamed(unet, weights):
            for name, module in unet.named_modules():
                if name.endswith(("attn2.to_k", "attn2.to_v")):
                    self.texts[module] = torch.cat([module(context) for context in contexts])
            wave = timestep_embedding(timesteps, unet.config.model_channels).to(weights.dtype)
            emb = unet.time_embed(wave)  # (timesteps, 4 * model_channels)
            for block in unet.modules():
                if isinstance(block, ResBlock):
                    self.times[block.emb_layers] = block.emb_layers(emb)

    def __call__(self, x: Tensor, t: Tensor, parts: slice) -> Tensor:
        """parts: which of the contexts x stands for."""
        rows = slice(parts.start * self.images, parts.stop * self.images)
        now = self.row[t[0].item()]
        forwards: dict[nn.Module, Callable[..., Tensor]] = {self.unet.time_embed: lambda wave: wave}
        forwards |= {layer: constant(kv[rows]) for layer, kv in self.texts.items()}
        forwards |= {layer: constant(table[now : now + 1]) for layer, table in self.times.items()}
        with streamed(self.unet, self.weights, forwards):
            return self.unet(x, t, x)  # the context is not looked at


def constant(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_: value


def large_weights(unet: UNet) -> Iterator[Tensor]:
    """The weights that every step needs, in order of the modules."""
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(
            part in name for part in ("attn2.to_k", "attn2.to_v", "emb_layers", "time_embed")
        ):
            yield module.weight


def free_memory(device: torch.device) -> int:
    """Four fifths of what is free on a device, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + cached) * 4 // 5
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return free * 4 // 5


def anonymous() -> int:
    """The process's anonymous memory in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0

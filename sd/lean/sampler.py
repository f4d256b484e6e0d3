"""`LeanSampler`: the picture that `SimpleSampler` draws, in a fraction of the memory.

It hands the same loop a UNet whose layers take their weights from the file when they need them (`stream.py`), and
decodes by bands (`bands.py`), as a plan says (`plan.py`). Text encoder, UNet and VAE are never in memory together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..adapt.adapters import Adapted
from ..adapt.controlnet import ControlNet
from ..adapt.taesd import TinyVAE
from ..attention import BasicTransformerBlock
from ..model import StableDiffusion
from ..operations import TEXTBOOK, copy_of
from ..sampler import Denoiser, Prompt, Request, SimpleSampler, announced, finished, guide
from ..speed.malloc import trim
from ..time_embedding import guidance_embedding, timestep_embedding
from ..unet import ResBlock, UNet
from ..vae import VAE
from ..weights.unread import Patch, at_rest, computes_in, patches_of
from .bands import Bands, Whole
from .plan import PROCESS, TEXT_PIECE, Adapting, Job, MemoryPlan, bytes_of, choose_bands, least, plan_memory
from .stream import Streamed, Weights, streamed_linear, weights_on


class LeanSampler(SimpleSampler):
    """Draws what `SimpleSampler` draws, up to rounding, in little memory; the call is the same.

    model    as `sd.load` gives it, with the weights still in their file; one that is in memory already is used as it
             is, and only its activations are lean
    memory   "600MB", "1.5GB" or bytes: the peak to stay below, counted from the process as it is before the first
             call; if not given, four fifths of what is free. With more memory more weights are kept: faster.

    `sampler.plan(...)`, called like the sampler, says how a call will be done and what it takes.
    A call raises ValueError, naming the least that would do, where `memory` is too little.
    """

    def __init__(self, model: StableDiffusion, memory: str | int | None = None):
        super().__init__(model)
        self.base = anonymous()
        self.memory = None if memory is None else bytes_of(memory)

    # ---- the plan

    def job(
        self, height: int, width: int, batch: int, guidance: bool, steps: int, nets: Sequence[ControlNet] = ()
    ) -> Job:
        model, itemsize = self.model, self.model.dtype.itemsize
        weights = Weights(model.dtype, model.device)
        weights.patch(model.unet, patches_of(model.unet))
        networks: list[UNet | ControlNet] = [model.unet, *nets]
        streamable = sum(w.numel() for network in networks for w in large_weights(network) if not weights.ready(w))
        return Job(
            model.unet.config,
            model.vae.config,
            model.text.config.hidden_size,
            height,
            width,
            batch,
            guidance,
            steps,
            itemsize,
            PROCESS if model.device.type == "cpu" else 0,
            itemsize * streamable,
            adapting=[cost_of(patches_of(part), itemsize) for part in (model.unet, model.text.model)],
            tiny=isinstance(model.vae, TinyVAE),
            hints=tuple(net.config.hint_widths for net in nets),
        )

    def available(self) -> int:
        return free_memory(self.model.device) if self.memory is None else self.memory

    def make_plan(self, request: Request) -> MemoryPlan:
        guidance, steps = request.negative is not None, len(request.timesteps)
        nets = [control.net for control in request.controls]
        job = self.job(request.height, request.width, len(request.context), guidance, steps, nets)
        return plan_memory(replace(job, tokens=request.context.shape[1]), self.available())

    def plan(self, prompt: Prompt | None = None, **options: Any) -> MemoryPlan:
        """How this call would be done. Takes the arguments of a call; `str(plan)` is for people."""
        with torch.no_grad():
            return self.make_plan(self.request(prompt, **options))

    # ---- the stages, each with its own weights: text encoder, UNet and VAE are not in memory together

    def encode_prompt(self, texts: list[str], **how: Any) -> Tensor:
        weights = weights_on(self.model.device, self.model.dtype, TEXT_PIECE)
        with at_rest(self.model.text.model):
            text = self.model.text.with_model(copy_of(self.model.text.model, Streamed(weights)))
            weights.patch(text.model, patches_of(self.model.text.model))
        with self.stage("text encoder"), torch.no_grad():
            return text.encode(texts, **how).to(device=self.model.device, dtype=self.model.dtype)

    @contextmanager
    def denoiser(self, request: Request) -> Iterator[Denoiser]:
        trim()
        plan = self.make_plan(request)
        weights = weights_on(self.model.device, self.model.dtype, plan.piece, self.tidier(plan.peaks["UNet"]))
        contexts = [request.context] if request.negative is None else [request.negative, request.context]
        with self.stage("UNet", plan):
            lean = LeanNetwork(self.model.unet, weights, request, contexts, self.model.adapters)
            nets = [LeanNetwork(control.net, weights, request, contexts) for control in request.controls]
            weights.keep((w for net in (lean, *nets) for w in large_weights(net.network)), plan.kept)
        controls = tuple(replace(c, net=net) for c, net in zip(request.controls, nets, strict=True))
        unet = self.around(lean, replace(request, controls=controls))

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            with self.stage("UNet", plan):
                if request.negative is None:
                    with announced(half="cond"):
                        return unet(x, t, Parts(0, 1))
                if plan.halves:
                    with announced(half="uncond"):
                        away = unet(x, t, Parts(0, 1))
                    with announced(half="cond"):
                        towards = unet(x, t, Parts(1, 2))
                else:
                    with announced(half="both"):
                        away, towards = unet(torch.cat([x, x]), torch.cat([t, t]), Parts(0, 2)).chunk(2)
                return guide(away, towards, *request.guidance)

        try:
            yield denoiser
        finally:
            weights.release()
            for network in (lean, *nets):
                network.ops.known.clear()

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> list[Image.Image] | Tensor:
        if output_type == "latent":
            return latents
        f = self.model.vae.config.downsampling
        images = []
        for z in latents.split(1):
            with self.vae_by_bands(f * latents.shape[2], f * latents.shape[3], len(latents)) as (vae, bands, place):
                images.append(bands.decode(vae, z.to(*place)))
        result = torch.cat(images) if len(images) > 1 else images[0]
        del images
        return finished(result, output_type)

    def posterior(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with self.vae_by_bands(image.shape[2], image.shape[3], 1, encode=True) as (vae, bands, place):
            return bands.encode(vae, image.to(*place))

    @contextmanager
    def vae_by_bands(
        self, height: int, width: int, images: int, *, encode: bool = False
    ) -> Iterator[tuple[VAE, Bands | Whole, tuple[torch.device, torch.dtype]]]:
        """A VAE whose weights are read as they are needed, the bands that fit, and where and in what it computes.

        TAESD is read and computed whole.
        """
        trim()
        place = computes_in(self.model.vae)  # may differ from the UNet's
        job = self.job(height, width, images, guidance=False, steps=1)
        plan = least(replace(job, itemsize=place[1].itemsize))
        if job.tiny:
            with self.stage("VAE", plan):
                yield self.model.vae, Whole(), place
            trim()
            return
        if not encode:  # the choices of a plan are those of the decoder's blocks
            plan = choose_bands(plan, self.available())
        weights = Weights(place[1], place[0])

        def ready(layer: nn.Module) -> tuple[Tensor, Tensor]:
            return weights.whole(layer.weight), weights.whole(layer.bias)  # type: ignore[arg-type]

        with at_rest(self.model.vae):
            vae = copy_of(self.model.vae, TEXTBOOK)
        with self.stage("VAE", plan):
            yield vae, Bands(plan.band, plan.choices, ready, tidy=self.tidier(plan.peaks["VAE"])), place
        trim()

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
    def stage(self, name: str, plan: MemoryPlan | None = None) -> Iterator[None]:
        """Around a part of the work: says what to do where the file or the device fails in it."""
        self.model.check_file()
        try:
            yield
        except torch.OutOfMemoryError:
            needs = f"it should take {plan.peak / 1e6:.0f} MB" if plan else "it is the first stage"
            advice = f"pass memory= less than {plan.peak / 1e6:.0f} MB, or free some" if plan else "free some"
            raise ValueError(f"The device ran out of memory in the {name} ({needs}): {advice}.") from None


class Parts(NamedTuple):
    """Which of a request's contexts a call is for; it stands where the textbook has the contexts themselves."""

    start: int
    stop: int

    def chunk(self, count: int) -> list[Parts]:
        step = (self.stop - self.start) // count
        return [Parts(a, a + step) for a in range(self.start, self.stop, step)]


class LeanNetwork:
    """The UNet, or a ControlNet, with streamed weights, for the prompts and the timesteps of one request.

    What depends on the time alone, or on the text alone, is computed once, here; those weights are not needed again.
    Another request has other prompts and timesteps, so it makes another one of these.
    """

    def __init__(
        self,
        network: UNet | ControlNet,
        weights: Weights,
        request: Request,
        contexts: list[Tensor],
        adapters: Sequence[Any] = (),
    ):
        self.ops, self.original, self.adapters, self.contexts = Streamed(weights), network, adapters, contexts
        with at_rest(network):  # another thread may draw with it for the first time
            self.network = copy_of(network, self.ops)
            weights.patch(self.network, patches_of(network))
        self.images, self.guidance = len(contexts[0]), request.guidance[0]
        self.timesteps = torch.tensor(request.timesteps, dtype=torch.float32, device=weights.device).unique()
        self.row = {t: i for i, t in enumerate(self.timesteps.tolist())}
        self.now, self.rows = 0, slice(0)  # of the call under way: its timestep, and its rows of the contexts
        self.prepare()

    def prepare(self) -> None:
        """Compute what depends on the time alone, or on the text alone."""
        self.scales = self.scales_now()
        self.ops.known = {}

        # Computed by the layers' function, not by calling them: hooks act in each step, on what the layer then gives.
        def layer_of(layer: Any, x: Tensor) -> Tensor:
            return streamed_linear(self.ops, layer, x)

        time = self.network.time_embed
        first, last = time[0], time[2]
        with torch.no_grad():
            self.texts: dict[nn.Module, Tensor] = {
                layer: torch.cat([layer_of(layer, context) for context in self.contexts])  # (parts*B, 77, C)
                for block in self.network.modules()
                if isinstance(block, BasicTransformerBlock)
                for layer in (block.attn2.to_k, block.attn2.to_v)
            }
            wave = timestep_embedding(self.timesteps, self.network.config.model_channels).to(self.ops.weights.dtype)
            told: dict[nn.Module, Tensor] = {}
            if time.cond_proj is not None:  # of LCM
                scale = guidance_embedding(self.guidance, time.cond_proj.in_features).to(wave)
                told = {time.cond_proj: layer_of(time.cond_proj, scale).expand_as(wave)}
                wave = wave + told[time.cond_proj]
            emb = layer_of(last, F.silu(layer_of(first, wave)))
            self.times: dict[nn.Module, Tensor] = {first: wave, last: emb, **told}  # (timesteps, C)
            blocks = [block for block in self.network.modules() if isinstance(block, ResBlock)]
            self.times |= {b.emb_layers[1]: layer_of(b.emb_layers[1], F.silu(emb)) for b in blocks}
        self.ops.known = {layer: partial(self.of_text, layer) for layer in self.texts}
        self.ops.known |= {layer: partial(self.of_time, layer) for layer in self.times}

    def scales_now(self) -> list[dict[str, float]]:
        return [adapter.scales for adapter in self.adapters]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)  # a ControlNet's config and files

    def hint(self, pictures: Tensor) -> Tensor:
        """Of a ControlNet: one picture at a time."""
        block: Any = self.network.input_hint_block
        place = self.ops.weights.device, self.ops.weights.dtype
        return torch.cat([block(picture.to(*place)) for picture in pictures.split(1)])

    def keep_up(self) -> None:
        """Where `sd.study.scale` has changed how much of a LoRA is added, all that was computed with it is stale."""
        if self.scales != self.scales_now():
            self.ops.weights.refresh()
            self.prepare()

    def of_text(self, layer: nn.Module) -> Tensor:
        self.keep_up()
        return self.texts[layer][self.rows]

    def of_time(self, layer: nn.Module) -> Tensor:
        """A row for each image of the call, as the textbook has it."""
        self.keep_up()
        return self.times[layer][self.now].expand(self.rows.stop - self.rows.start, -1)

    def __call__(self, x: Tensor, t: Tensor, parts: Parts, *more: Any, **named: Any) -> Any:
        """parts: which of the contexts x stands for; more: what the network takes beside them."""
        self.rows = slice(parts.start * self.images, parts.stop * self.images)
        self.now = self.row[t[0].item()]
        return self.network(x, t, x, *more, **named)  # the context is not looked at


def large_weights(network: UNet | ControlNet) -> Iterator[Tensor]:
    """The weights that every step needs, in order of the modules."""
    once = ("attn2.to_k", "attn2.to_v", "emb_layers", "time_embed", "input_hint_block")
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(part in name for part in once):
            yield module.weight


def cost_of(patches: Mapping[str, Patch], itemsize: int) -> Adapting:
    """What a LoRA takes beside the weights that it is added to, where it is added to pieces of them."""
    deltas = [delta for patch in patches.values() if isinstance(patch, Adapted) for _, delta in patch.deltas]
    wide = max(itemsize, 4)  # it is computed in float32 at least
    return Adapting(
        wide * max((delta.temporaries + delta.of_base for delta in deltas), default=0),
        wide * max((delta.at_once for delta in deltas), default=0) + wide * sum(delta.kept for delta in deltas),
    )


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

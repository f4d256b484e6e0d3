"""How a picture is drawn in a given amount of memory: what is cut, what is stored, which weights are kept.

The peak of each stage is predicted from shapes, by counting the tensors that are alive at once in `unet.py`,
`bands.py` and `stream.py`, in the order in which they are made; nothing is tried out. docs/memory.md explains it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import NamedTuple

from ..files import printable
from ..unet import Part, UNetConfig, topology
from ..vae import VAEConfig, decoder_widths
from .bands import Choice

# Libraries' own on the CPU, beside importing torch, measured: 11 MB of modules, the rest are kernels that oneDNN
# compiles, what these need while they work, and their threads' heaps.
PROCESS = 86_000_000


class Adapting(NamedTuple):
    """What a LoRA takes where it is added to the pieces of a part's weights."""

    each: int = 0  # bytes for each element of a piece: tensors of its size, made on the way
    once: int = 0  # bytes of its factors for one weight, and of what is kept of all of them


@dataclass(frozen=True)
class Job:
    """What is to be drawn, as far as memory is concerned."""

    unet: UNetConfig
    vae: VAEConfig
    text_width: int
    height: int
    width: int
    batch: int  # images at once
    guidance: bool
    steps: int
    itemsize: int  # bytes of an element in which is computed
    process: int  # bytes that libraries take on top
    streamable: int  # bytes, in that dtype, of the UNet's weights that need a copy before they can be used
    tokens: int = 77  # of a prompt
    adapting: Sequence[Adapting] = (Adapting(), Adapting())  # of the UNet, of the text encoder
    tiny: bool = False  # the VAE is TAESD, which is not cut
    hints: tuple[tuple[int, ...], ...] = ()  # of each ControlNet, the widths through which its picture passes


@dataclass(frozen=True)
class MemoryPlan:
    """Choices, and the peak that they lead to."""

    job: Job
    piece: int  # elements of a weight that are copied at once
    halves: bool  # the guidance halves one after another
    band: int  # elements of a band of the VAE's tensors
    choices: tuple[Choice, ...]  # what each residual block of the decoder stores
    kept: int  # bytes of the UNet's weights that are copied only once

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of each stage, by name."""
        return {
            "text": self.job.process + text_peak(self),
            "UNet": self.job.process + unet_peak(self),
            "VAE": self.job.process + vae_peak(self),
        }

    def adding(self, part: int) -> int:
        """Bytes that a LoRA takes beside a piece of the UNet (0) or of the text encoder (1)."""
        each, once = self.job.adapting[part]
        return each * (TEXT_PIECE if part else self.piece) + once

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    def __str__(self) -> str:
        job, peaks = self.job, self.peaks
        share = self.kept / job.streamable if job.streamable else 1
        stored = sum(choice.hidden for choice in self.choices)
        nets = f", {len(job.hints)} ControlNet{'s' * (len(job.hints) > 1)}" if job.hints else ""
        lines = [
            f"{job.width} x {job.height}, {job.batch} at once, guidance {'on' if job.guidance else 'off'}{nets}",
            f"text   {mb(peaks['text'])}",
            f"UNet   {mb(peaks['UNet'])}  {share:.0%} of its weights kept, the rest in pieces of "
            f"{mb(self.piece * job.itemsize).strip()}"
            + (f", guidance halves {'one after the other' if self.halves else 'together'}" if job.guidance else ""),
            f"VAE    {mb(peaks['VAE'])}  "
            + ("TAESD, whole" if job.tiny else f"bands of {mb(self.band * job.itemsize).strip()}, {stored} of ")
            + ("" if job.tiny else f"{len(self.choices)} blocks keep their inner tensor"),
            *([f"LoRA   {mb(self.adding(0))}  of the UNet's, beside each piece"] if self.adding(0) else []),
            f"peak   {mb(self.peak)}",
        ]
        return "\n".join(lines)


def mb(size: float) -> str:
    return f"{size / 1e6:6.0f} MB"


UNITS = {"": 1, "B": 1, "K": 1e3, "KB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9, "T": 1e12, "TB": 1e12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def bytes_of(memory: str | int | float) -> int:
    """ "600MB", "1.5 GB", "0.6g", "1GiB" or a number of bytes -> bytes. Raises ValueError."""
    text = printable(memory, 60)
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or isinstance(memory, bool):
        raise ValueError(f'memory must be a size such as "600MB", "1.5GB" or a number of bytes, not {text!r}.')
    return int(float(match[1]) * UNITS[match[2].upper()])


# ---- choosing

TEXT_PIECE = 1 << 20  # elements of the text encoder's weights that are copied at once
PIECES = [1 << 22, 1 << 21, 1 << 20]
BANDS = [1 << 21, 1 << 20, 1 << 19]


def least(job: Job) -> MemoryPlan:
    """The plan of the smallest peak."""
    blocks = len(list(resnets(job)))
    return MemoryPlan(job, PIECES[-1], job.guidance, BANDS[-1], (Choice(False, False),) * blocks, 0)


def plan_memory(job: Job, memory: int) -> MemoryPlan:
    """The fastest plan within `memory` bytes. Raises ValueError naming the least that would do."""
    plan = least(job)
    if plan.peak > memory:
        raise ValueError(
            f"{mb(memory).strip()} of memory is too little for {job.width} x {job.height}: "
            f"the least is {mb(plan.peak).strip()}; give that, or draw a smaller picture."
        )
    # Each is a list from fast to lean; the stages do not share memory, so each is chosen alone.
    plan = next(
        p
        for halves, piece in product((False, True) if job.guidance else (False,), PIECES)
        if (p := replace(plan, halves=halves, piece=piece)).peaks["UNet"] <= memory
    )
    plan = choose_bands(plan, memory)
    return replace(plan, kept=max(0, min(job.streamable, memory - plan.peaks["UNet"])))


def choose_bands(plan: MemoryPlan, memory: int) -> MemoryPlan:
    """The same plan with the fastest way to decode within `memory` bytes, or as it is where none fits."""
    for band in BANDS:
        wider = replace(plan, band=band)
        if wider.peaks["VAE"] <= memory:
            plan = wider
            break
    choices = list(plan.choices)
    for i in range(len(choices)):  # what a block stores is gone before the next one's is there
        for choice in (Choice(True, True), Choice(False, True), Choice(True, False)):
            trial = replace(plan, choices=(*choices[:i], choice, *choices[i + 1 :]))
            if trial.peaks["VAE"] <= memory:
                choices[i] = choice
                break
    return replace(plan, choices=tuple(choices))


# ---- peaks


def text_peak(plan: MemoryPlan) -> int:
    """77 tokens are small: what counts is a layer's weights."""
    job, tokens = plan.job, plan.job.tokens * plan.job.batch * (1 + plan.job.guidance)
    plain = 2 * TEXT_PIECE + tokens * 10 * job.text_width  # two, and twice the wide inner ones
    return job.itemsize * plain + plan.adding(1)


def unet_peak(plan: MemoryPlan) -> int:
    """The largest of its layers', on top of the skips that wait, and of the text's keys, values and embeddings.

    ControlNets run before the UNet. Their layers are those on its way down; what they add waits beside them, and
    beside the UNet's. Their pictures pass before the first call of all.
    """
    job = plan.job
    batch = job.batch * (2 if job.guidance and not plan.halves else 1)
    area = latent_area(job)
    levels = list(enumerate(job.unet.model_channels * m for m in job.unet.channel_mult))
    inputs, (middle,), outputs = topology(job.unet)
    parts = [part for block in [*inputs, middle, *outputs] for part in block]
    parts += len(job.hints) * [part for block in [*inputs, middle] for part in block]
    texts = sum(2 * part.channels * job.unet.transformer_depth for part in parts if part.kind == "transformer")
    texts *= job.tokens * job.batch * (1 + job.guidance)
    times = (job.steps + 1) * sum(part.out_channels for part in parts if part.kind == "res")
    latents = 8 * job.batch * job.unet.in_channels * job.height * job.width // 64
    weights = 0 if plan.kept >= job.streamable else 2 * plan.piece  # the buffer, and what the kernel makes of it
    # All that ControlNets add, once; where there are several, what one more adds, and the sum of both.
    added = sum(skip_sizes(job)) + levels[-1][1] * area(levels[-1][0])
    controls = batch * added * min(3, len(job.hints) ** 2)
    hints = len(job.hints) * batch * job.unet.model_channels * area(0)
    largest = max(batch * alive for alive in unet_layers(job, plan.piece // batch)) + controls + hints
    largest = max([largest, *(hint_peak(job, widths) + hints for widths in job.hints)])
    return job.itemsize * (largest + texts + times + latents + weights) + plan.kept + plan.adding(0)


def hint_peak(job: Job, widths: tuple[int, ...]) -> int:
    """Of a picture at its own size: what goes into a convolution, what comes out, and its own copies of both."""
    return 4 * max(widths[0], 3) * job.height * job.width


def latent_area(job: Job) -> Callable[[int], int]:
    """From a level, which is 0 for the latent's own resolution, to its pixels."""
    f = job.vae.downsampling
    h, w = -(-job.height // f), -(-job.width // f)
    return lambda level: -(-h // 2**level) * -(-w // 2**level)


def skip_sizes(job: Job) -> list[int]:
    """Elements of the output of each input block, for a batch of one."""
    area = latent_area(job)
    return [parts[-1].out_channels * area(parts[-1].out_level) for parts in topology(job.unet)[0]]


def unet_layers(job: Job, piece: int) -> Iterator[int]:
    """Elements alive at once in each block of the UNet, for a batch of one."""
    c, area_of = job.unet, latent_area(job)
    areas = [area_of(level) for level in range(len(c.channel_mult))]

    def res(cin: int, cout: int, area: int) -> int:
        # The input, its norm and the result; the convolution's own copies of the latter two, by blocks.
        first = cin + 2 * (cin + cout)
        second = cin + cout + 2 * (cout + cout)
        return area * max(first, second)

    def transformer(channels: int, area: int) -> int:
        attend = 8 * channels * area  # the input, tokens, their norm, q, k, v, the result and its copy
        feed = 4 * channels * area + 2 * max(piece // 4, 64 * 4 * channels)
        return max(attend, feed)

    def alive(part: Part) -> int:
        area = areas[part.level]
        if part.kind == "res":
            return res(part.channels, part.out_channels, area)
        if part.kind == "transformer":
            return transformer(part.channels, area)
        return part.channels * (area + 4 * areas[part.out_level]) if part.kind == "up" else 0

    inputs, (middle,), outputs = topology(c)
    skips: list[int] = []  # those that wait for their output block
    for parts in inputs:
        yield from (sum(skips) + alive(part) for part in parts)
        skips.append(parts[-1].out_channels * areas[parts[-1].out_level])
    yield from (sum(skips) + alive(part) for part in middle)
    for parts in outputs:
        skips.pop()
        yield from (sum(skips) + alive(part) for part in parts)


@dataclass(frozen=True)
class Stage:
    """A residual block of the decoder, or of the encoder."""

    channels: int
    out_channels: int
    area: int
    upsampled: int  # elements of the tensor that its input is upsampled from, or 0


def resnets(job: Job) -> Iterator[Stage]:
    """Of the decoder, in order of use."""
    c, f = job.vae, job.vae.downsampling
    area = (job.height // f) * (job.width // f)
    levels = decoder_widths(c)
    ch = levels[-1][0]
    yield from 2 * [Stage(ch, ch, area, 0)]
    for i, widths in reversed(list(enumerate(levels))):
        for k, (channels, out) in enumerate(pairwise(widths)):
            first = k == 0 and i < len(levels) - 1
            yield Stage(channels, out, area, channels * area // 4 if first else 0)
        area *= 4


def vae_peak(plan: MemoryPlan) -> int:
    """The largest of the residual blocks', by what each stores, on top of its bands; TAESD's largest block whole."""
    job = plan.job
    image = 3 * job.height * job.width * (job.batch + 1)
    if job.tiny:  # of a block: the input, a convolution's result, its ReLU, and the next one's result
        return job.itemsize * (4 * job.vae.ch * job.height * job.width + image)
    peaks = []
    for stage, choice in zip(resnets(job), plan.choices, strict=True):
        x, out = stage.channels * stage.area, stage.out_channels * stage.area
        source = stage.upsampled if stage.upsampled and not choice.input else x
        hidden = out if choice.hidden else 0
        making = (stage.upsampled + x) if stage.upsampled and choice.input else 0
        band = max(plan.band, job.width * max(stage.channels, stage.out_channels))
        depth = 6 + (3 if not choice.hidden else 0) + (3 if source is not x else 0)
        weights = 9 * stage.out_channels * (stage.channels + stage.out_channels)
        weights += 16 * stage.channels**2 if stage.upsampled else 0
        peaks.append(max(making, source + hidden, hidden + out) + depth * band + weights)
    first = next(iter(resnets(job)))
    peaks.append(first.channels * first.area * 7 + 2 * first.channels**2)  # the attention in the middle
    return job.itemsize * (max(peaks) + image)

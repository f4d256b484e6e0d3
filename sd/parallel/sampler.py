"""`ParallelSampler`: one picture, or many, over the ranks of a torch.distributed world.

Three ways to split, which multiply: `image` deals the pictures out, `guidance` gives its two halves to two ranks, and
`rows` cuts one picture by rows (`rows.py`). Every rank makes the same call, steps through the same denoising loop and
has all results. docs/parallel.md has the pictures, the commands, and what moves when.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ..attention import SpatialTransformer, replaced
from ..model import StableDiffusion, refuse_fast
from ..sampler import Denoiser, Prompt, Request, SimpleSampler, Step, announced, finished, guide, guided, with_text
from ..unet import Downsample, UNet, Upsample
from .ranks import Ranks, Traffic, agree, connect, drawing, lost, waiting, watch, world
from .rows import rows_of_unet, rows_of_vae


class Split(NamedTuple):
    """How many ways each dimension is cut. Rank (i * guidance + g) * rows + r has the place (i, g, r)."""

    image: int = 1
    guidance: int = 1
    rows: int = 1

    @property
    def size(self) -> int:
        return self.image * self.guidance * self.rows

    def place(self, rank: int) -> Split | None:
        """(i, g, r) of a rank, or None where it has nothing to do."""
        if rank >= self.size:
            return None
        return Split(rank // (self.guidance * self.rows), rank // self.rows % self.guidance, rank % self.rows)

    def rank(self, image: int, guidance: int = 0, rows: int = 0) -> int:
        return (image * self.guidance + guidance) * self.rows + rows

    def __str__(self) -> str:
        return ", ".join(f"{name} {n}" for name, n in self._asdict().items() if n > 1) or "nothing"


class Rates(NamedTuple):
    """What a rank does in a second, roughly: only the choice of a split depends on it."""

    flops: float
    bytes: float  # between two ranks
    exchange: float  # seconds for one, however small


CPU, CUDA = Rates(1e11, 1e9, 2e-4), Rates(2e14, 5e10, 4e-5)


@dataclass(frozen=True)
class Plan:
    """A split, and why it was chosen."""

    split: Split
    ranks: int
    images: int
    given: bool
    seconds: dict[Split, float]  # predicted for one UNet call of all images, for every split that fits
    received: int  # bytes a rank receives from others in a UNet call, by the rows' keys, values and halos
    exchanges: int

    def __str__(self) -> str:
        split, alone = self.split, self.seconds[Split()]
        lines = [
            f"{self.images} image{'s' * (self.images > 1)} over {self.ranks} ranks: split {split}"
            f" ({'as asked' if self.given else 'the fastest of ' + str(len(self.seconds))})"
        ]
        if split.size > 1:
            lines.append(f"predicted: {alone / self.seconds[split]:.2f} times as fast as one rank")
        if split.rows > 1:
            lines.append(
                f"rows: {self.exchanges} exchanges and about {self.received / 1e6:.1f} MB received a UNet call"
            )
        if split.guidance > 1:
            lines.append("guidance: 1 exchange a step")
        if split.size < self.ranks:
            idle = f"{self.ranks - split.size} of {self.ranks} ranks have nothing to do"
            lines.append(idle if self.given else f"{idle}: with more of them it would not be faster")
        return "\n".join(lines)


class ParallelSampler(SimpleSampler):
    """Draws what `SimpleSampler` draws, up to rounding, on all ranks together; the call is the same on every rank.

    model    the same weights on every rank, each on its own device
    split    {"image": 2, "guidance": 2, "rows": 1}; chosen by `plan` if not given
    timeout  seconds after which a rank that is silent, or stuck in one layer, ends the job

    Uses the process group that there is, or else makes the one that torchrun describes; without either this is
    a world of one rank. Raises RankError (a ValueError) where ranks disagree or one is lost, ValueError for a split
    that does not fit.
    """

    def __init__(self, model: StableDiffusion, split: Mapping[str, int] | None = None, timeout: float = 20.0):
        refuse_fast(model, "ParallelSampler")
        self.model = model.ready()
        self.asked = None if split is None else split_of(split)
        self.timeout = timeout
        self.traffic = Traffic()  # of this rank, but for the pictures' and the steps' own
        self.current: Split | None = None
        connect(self.model.device)
        watch(timeout)

    # ---- the plan

    def plan(self, prompt: Prompt | None = None, *, ranks: int | None = None, **options: Any) -> Plan:
        """How this call would be split over the world, or so many `ranks`, and why; else the arguments of a call."""
        with torch.no_grad():
            return self.make_plan(self.request(prompt, **options), ranks)

    def make_plan(self, request: Request, ranks: int | None = None) -> Plan:
        f = self.model.vae.config.downsampling
        return make_plan(
            self.model.unet,
            ranks or world()[1],
            len(request.context),
            request.negative is not None,
            (request.height // f, request.width // f),
            self.model.dtype.itemsize,
            CUDA if self.model.device.type == "cuda" else CPU,
            self.asked,
        )

    # ---- the work

    def run(self, request: Request) -> Iterator[Step]:
        self.current = split = self.make_plan(request).split
        with waiting():  # some ranks read their weights faster than others
            agree({"the split": split, **self.fingerprints(request)})
        place = split.place(world()[0])
        shares = deal(len(request.context), split.image)
        steps = super().run(part(request, shares[place.image])) if place else iter(())
        with drawing():
            for i, timestep in enumerate(request.scheduler.timesteps):
                step = next(steps, None)
                own = torch.stack([step.latents, step.noise, step.denoised], dim=1) if step else None
                shape = (3, *self.latent_shape(request))
                x, noise, denoised = self.share(own, shares, shape, request.context).unbind(1)
                with waiting():  # what the caller does now is not ours to watch
                    yield Step(i, timestep, x, noise, denoised)

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        f = self.model.vae.config.downsampling
        return self.model.unet.config.in_channels, request.height // f, request.width // f

    def denoiser(self, request: Request) -> Denoiser:
        split = self.current
        assert split is not None
        place = split.place(world()[0])
        assert place is not None
        forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        if split.rows > 1:
            members = [split.rank(place.image, place.guidance, r) for r in range(split.rows)]
            forwards = rows_of_unet(self.model.unet, Ranks(members, self.traffic), *self.latent_shape(request)[1:])

        def unet(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            with replaced(forwards):
                return self.model.unet(x, t, context)

        if request.negative is None:
            return with_text(unet, request.context)
        if split.guidance == 1:
            return guided(unet, request.context, request.negative, request.guidance_scale)
        context, half = ((request.negative, "uncond"), (request.context, "cond"))[place.guidance]
        pair = Ranks([split.rank(place.image, g, place.rows) for g in (0, 1)], self.traffic)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            with announced(half=half):
                own = unet(x, t, context)
            away, towards = pair.gather(own, [own.shape] * 2)
            return guide(away, towards, request.guidance_scale)

        return denoiser

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> list[Image.Image] | Tensor:
        if output_type == "latent":
            return latents
        vae, (rank, count) = self.model.vae, world()
        split = self.current or Split(image=min(count, len(latents)))
        place, shares, f = split.place(rank), deal(len(latents), split.image), vae.config.downsampling
        own = None
        with drawing():
            if place and shares[place.image]:
                team = split.guidance * split.rows  # all who have this picture cut its decoding by rows
                members = [place.image * team + k for k in range(team)]
                size = latents.shape[2:]
                forwards = rows_of_vae(vae, Ranks(members, self.traffic), *size) if team > 1 else {}
                with replaced(forwards):
                    like = next(vae.parameters())
                    own = torch.cat([vae.decode(latents[i : i + 1].to(like)) for i in shares[place.image]])
            images = self.share(own, shares, (3, f * latents.shape[2], f * latents.shape[3]), next(vae.parameters()))
        return finished(images, output_type)

    def share(self, own: Tensor | None, shares: Sequence[range], shape: tuple[int, ...], kind: Tensor) -> Tensor:
        """The tensors (n, *shape) of all image groups, in order, on every rank; a group's first rank sends."""
        split, (rank, count) = self.current or Split(image=len(shares)), world()
        place = split.place(rank)
        if own is not None and split.image == 1 and split.size == count:
            return own
        team = split.guidance * split.rows
        # On the UNet's device, which is the one that the ranks talk through; in the dtype of `kind` on all of them.
        like = kind.new_empty(0) if own is None else own.to(kind.dtype)
        like = like.to(self.model.device)
        sends = place is not None and own is not None and rank == split.rank(place.image)
        empty = like.new_empty(0)
        outside = [not place or r // team != place.image or r >= split.size for r in range(count)]
        outgoing = [[like if sends and outside[r] else empty] for r in range(count)]
        owners = {split.rank(i): (len(share), *shape) for i, share in enumerate(shares)}
        incoming = [[owners[r] if r in owners and outside[r] else (0,)] for r in range(count)]
        parts = Ranks(range(count)).start(outgoing, incoming, [like])()
        pieces = [
            like if place and place.image == i else parts[split.rank(i)][0] for i, share in enumerate(shares) if share
        ]
        return torch.cat(pieces)

    def fingerprints(self, request: Request) -> dict[str, Any]:
        """What has to be the same on every rank, as hashes: weights (once) and arguments."""
        if not hasattr(self, "_weights"):
            parts = (self.model.unet, self.model.vae, self.model.text)
            state = [item for part in parts for item in part.state_dict().items()]
            self._weights = digest(*(part for name, tensor in state for part in (name, tensor)))
        scheduler, schedule = request.scheduler, request.scheduler.schedule
        return {
            "the weights": self._weights,
            "the prompts": digest(request.context, request.negative, request.guidance_scale),
            "the size": f"{request.width} x {request.height}",
            "the seeds": digest(request.seeds, request.latents),
            "the scheduler": f"{type(scheduler).__name__} of {digest(scheduler.timesteps, scheduler.eta, schedule)}",
            "the dtype": self.model.dtype,
        }


def load_together(read: Callable[[], StableDiffusion], device: torch.device) -> StableDiffusion:
    """`read()` on every rank: first on one of each machine, which downloads what is missing, then on the others."""
    connect(device)
    watch(20.0)
    rank, count = world()
    first = int(os.environ.get("LOCAL_RANK", rank)) == 0
    model = read() if first else None
    if count > 1:
        with lost():
            torch.distributed.barrier()
    if model is None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which load does
        model = read()
    return model


def split_of(split: Mapping[str, int]) -> Split:
    if not set(split) <= set(Split._fields) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in split.values()
    ):
        raise ValueError(f'A split is of the form {{"image": 2, "guidance": 2, "rows": 1}}, not {dict(split)}.')
    return Split(**split)


def deal(count: int, hands: int) -> list[range]:
    """Consecutive shares whose sizes differ by one at most."""
    return [range(i * count // hands, (i + 1) * count // hands) for i in range(hands)]


def part(request: Request, images: range) -> Request:
    """The same request, of some of its images."""
    cut = slice(images.start, images.stop)
    return replace(
        request,
        prompts=None if request.prompts is None else request.prompts[cut],
        context=request.context[cut],
        negative=None if request.negative is None else request.negative[cut],
        seeds=request.seeds[cut],
        latents=None if request.latents is None else request.latents[cut],
    )


def digest(*values: Any) -> str:
    """Of numbers and tensors. A tensor counts by sums of the bits of its rows, which is as fast as reading it."""
    result = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.dtype.itemsize]
            flat = value.detach().contiguous().view(bits).flatten()
            short = flat[: flat.numel() // 64 * 64].view(-1, 64) if flat.numel() > 1 << 16 else flat[:, None]
            sums = torch.cat([short.sum(1, dtype=torch.int64), flat[short.numel() :].long()])
            result.update(sums.cpu().numpy().tobytes())
            value = f"{tuple(value.shape)} {value.dtype}"
        result.update(f"{value};".encode())
    return result.hexdigest()[:10]


# ---- choosing


def make_plan(
    unet: UNet,
    ranks: int,
    images: int,
    guidance: bool,
    latent: tuple[int, int],
    itemsize: int,
    rates: Rates,
    asked: Split | None = None,
) -> Plan:
    """The fastest split that fits, or `asked`. Raises ValueError where that does not fit."""
    height, _ = latent
    halves = 2 if guidance else 1
    if asked:
        for name, most in (("image", images), ("guidance", halves), ("rows", height)):
            if getattr(asked, name) > most:
                raise ValueError(
                    f"The split has {name} {getattr(asked, name)}, but here are {most}: give {most} or less."
                )
        if asked.size > ranks:
            raise ValueError(
                f"The split ({asked}) is for {asked.size} ranks, but there are {ranks}: start {asked.size}."
            )
    work, elements, exchanges = work_of(unet, *latent)

    def seconds(split: Split) -> float:
        """Of a UNet call for all images: the largest share of work, and the messages."""
        samples = -(-images // split.image) * (halves // split.guidance)
        rows = -(-height // split.rows) / height
        result = samples * rows * work / rates.flops
        if split.rows > 1:
            result += exchanges * rates.exchange * (split.rows - 1) ** 0.5
            result += samples * elements * (1 - 1 / split.rows) * itemsize / rates.bytes
        return result + (rates.exchange if split.guidance > 1 else 0)

    fits = [
        Split(i, g, r)
        for i, g, r in product(range(1, images + 1), range(1, halves + 1), range(1, height + 1))
        if i * g * r <= ranks
    ]
    times = {split: seconds(split) for split in fits}
    if asked:
        times[asked] = seconds(asked)
    # Of equal times, the one with fewer rows, then less guidance split: those cost messages.
    best = asked or min(fits, key=lambda split: (round(times[split] / times[Split()], 3), split.rows, split.guidance))
    samples = -(-images // best.image) * (halves // best.guidance)
    received = int(samples * elements * (1 - 1 / best.rows) * itemsize)
    return Plan(best, ranks, images, asked is not None, times, received, exchanges)


def work_of(unet: UNet, height: int, width: int) -> tuple[float, float, int]:
    """Of a forward of one sample: operations, elements of keys and values, and the exchanges of a cut by rows."""
    work, elements, exchanges = 0.0, 0.0, 3
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    for layer in (layer for block in blocks for layer in block):
        if isinstance(layer, Downsample):
            height, width = -(-height // 2), -(-width // 2)
        if isinstance(layer, Upsample):
            height, width = 2 * height, 2 * width
        area, wide = height * width, layer.proj_in.out_channels if isinstance(layer, SpatialTransformer) else 0
        work += 2 * area * sum(p.numel() for name, p in layer.named_parameters() if p.ndim > 1 and of_pixels(name))
        work += 4 * area * area * wide  # scores and their products
        elements += 2 * area * wide
        exchanges += 1 if isinstance(layer, Downsample | Upsample) else 2 if not isinstance(layer, nn.Conv2d) else 0
    return work, elements, exchanges - 1


def of_pixels(name: str) -> bool:
    """Whether a weight is used at every pixel, and not for the time or the text alone."""
    return not any(part in name for part in ("emb_layers", "attn2.to_k", "attn2.to_v"))

"""`ParallelSampler`: one picture, or many, over the ranks of a torch.distributed world.

Three ways to split, which multiply: `image` deals the pictures out, `guidance` gives its two halves to two ranks, and
`rows` cuts one picture by rows (`rows.py`). Every rank makes the same call, steps through the same denoising loop and
has all results. docs/parallel.md has the pictures, the commands, and what moves when.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from ..adapt.taesd import TinyVAE
from ..model import StableDiffusion
from ..pictures import Control
from ..sampler import Denoiser, Prompt, Request, SimpleSampler, Step, announced, finished, guide, guided, with_text
from ..speed.malloc import keep
from ..unet import UNetConfig, topology
from ..weights.unread import computes_in, read_weights
from .pulse import drawing, waiting, watch
from .ranks import Ranks, Traffic, agree, connect, lost, world
from .rows import RowsOfControlNet, rows_of_unet, rows_of_vae


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
class SplitPlan:
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
    a world of one rank. Of several ranks on a CPU each keeps the memory that a call has freed for the next one
    (`sd/speed/malloc.py`).

    Raises RankError (a ValueError) where ranks disagree or one is lost, ValueError for a split that does not fit.
    """

    def __init__(self, model: StableDiffusion, split: Mapping[str, int] | None = None, timeout: float = 20.0):
        super().__init__(model)
        read_weights(model.unet)
        read_weights(model.vae)
        self.asked = None if split is None else split_of(split)
        self.timeout = timeout
        self.traffic = Traffic()  # of this rank, but for the pictures' and the steps' own
        self._nets: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # ControlNet -> digest of its weights
        connect(self.model.device)
        watch(timeout)
        if world()[1] > 1 and model.device.type == "cpu":
            keep()

    # ---- the plan

    def plan(self, prompt: Prompt | None = None, *, ranks: int | None = None, **options: Any) -> SplitPlan:
        """How this call would be split over the world, or so many `ranks`, and why; else the arguments of a call."""
        with torch.no_grad():
            return self.make_plan(self.request(prompt, **options), ranks)

    def make_plan(self, request: Request, ranks: int | None = None) -> SplitPlan:
        f = self.model.vae.config.downsampling
        return plan_split(
            self.model.unet.config,
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
        split = self.make_plan(request).split
        with waiting():  # some ranks read their weights faster than others
            agree({"the split": split, **self.fingerprints(request)})
        place = split.place(world()[0])
        shares = deal(len(request.context), split.image)
        steps = super().run(part(request, shares[place.image], split)) if place else iter(())
        with drawing():
            for i, timestep in enumerate(request.timesteps):
                step = next(steps, None)
                own = torch.stack([step.latents, step.noise, step.denoised], dim=1) if step else None
                shape = (3, *self.latent_shape(request))
                x, noise, denoised = self.share(own, split, shares, shape, request.context.dtype).unbind(1)
                with waiting():  # what the caller does now is not ours to watch
                    yield Step(i, timestep, x, noise, denoised)

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        f = self.model.vae.config.downsampling
        return self.model.vae.config.z_channels, request.height // f, request.width // f

    @contextmanager
    def denoiser(self, request: Request) -> Iterator[Denoiser]:
        """Of this rank's part of a request: its pictures, its half of guidance, its rows."""
        if not isinstance(request, Portion):
            raise ValueError("Ranks only draw together: for anything else, such as sd.invert, take sd.SimpleSampler.")
        split, place = request.split, request.split.place(world()[0])
        assert place is not None
        unet: Callable[..., Tensor] = self.model.unet
        if split.rows > 1:
            members = [split.rank(place.image, place.guidance, r) for r in range(split.rows)]
            cut = Ranks(members, self.traffic), *self.latent_shape(request)[1:]
            unet = rows_of_unet(self.model.unet, *cut)
            controls = (replace(control, net=RowsOfControlNet(control.net, *cut)) for control in request.controls)
            request = replace(request, controls=tuple(controls))
        unet = self.around(unet, request)
        if request.negative is None:
            yield with_text(unet, request.context)
        elif split.guidance == 1:
            yield guided(unet, request.context, request.negative, *request.guidance)
        else:
            context, half = ((request.negative, "uncond"), (request.context, "cond"))[place.guidance]
            pair = Ranks([split.rank(place.image, g, place.rows) for g in (0, 1)], self.traffic)

            def denoiser(x: Tensor, t: Tensor) -> Tensor:
                with announced(half=half):
                    own = unet(x, t, context)
                away, towards = pair.gather(own, [own.shape] * 2)
                return guide(away, towards, *request.guidance)

            yield denoiser

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> list[Image.Image] | Tensor:
        """As `SimpleSampler.decode`; pictures are dealt out, and all ranks that have one cut its decoding by rows."""
        if output_type == "latent":
            return latents
        vae, (rank, count), size = self.model.vae, world(), latents.shape[2:]
        images = min(self.asked.image if self.asked else count, len(latents))
        team = min((self.asked.size if self.asked else count) // images, size[0])
        if isinstance(vae, TinyVAE):  # nor is it cut by rows: that would take longer than decoding
            team = 1
        split = Split(image=images, rows=team)
        place, shares, f = split.place(rank), deal(len(latents), split.image), vae.config.downsampling
        (device, dtype), own = computes_in(vae), None
        with drawing():
            if place and shares[place.image]:
                members = [split.rank(place.image, 0, k) for k in range(team)]
                decode = rows_of_vae(vae, Ranks(members, self.traffic), *size) if team > 1 else vae.decode
                own = torch.cat([decode(latents[i : i + 1].to(device, dtype)) for i in shares[place.image]])
            return finished(self.share(own, split, shares, (3, f * size[0], f * size[1]), dtype), output_type)

    def share(
        self, own: Tensor | None, split: Split, shares: Sequence[range], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """The tensors (n, *shape) of all image groups, in order, on every rank; a group's first rank sends."""
        rank, count = world()
        place = split.place(rank)
        if own is not None and split.image == 1 and split.size == count:
            return own
        team = split.guidance * split.rows
        # On the UNet's device, which is the one that the ranks talk through.
        like = (torch.empty(0) if own is None else own).to(self.model.device, dtype)
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
        scheduler = request.scheduler
        return {
            "the weights": self._weights,
            "the prompts": digest(request.context, request.negative, request.guidance),
            "the size": f"{request.width} x {request.height}",
            "the seeds": digest(request.seeds, request.rng, request.latents),
            "the pictures": digest(*vars(request.pictures).values()) if request.pictures else "",
            "the ControlNets": digest(*(part for control in request.controls for part in self.told(control))),
            "the scheduler": f"{type(scheduler).__name__} of {digest(scheduler)}",
            "the dtype": self.model.dtype,
        }

    def told(self, control: Control) -> tuple[Any, ...]:
        """What is to be the same of a ControlNet on every rank: its weights (once) and its arguments."""
        if control.net not in self._nets:
            read_weights(control.net)
            self._nets[control.net] = digest(*control.net.state_dict().values())
        return (self._nets[control.net], *(value for name, value in vars(control).items() if name != "net"))


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


@dataclass(frozen=True, kw_only=True)
class Portion(Request):
    """What one rank draws of a request."""

    split: Split


def part(request: Request, images: range, split: Split) -> Portion:
    """The same request, of some of its images."""
    cut = slice(images.start, images.stop)
    own = {
        "prompts": None if request.prompts is None else request.prompts[cut],
        "context": request.context[cut],
        "negative": None if request.negative is None else request.negative[cut],
        "seeds": request.seeds[cut],
        "latents": None if request.latents is None else request.latents[cut],
        "pictures": None if request.pictures is None else request.pictures.part(cut),
        "controls": tuple(control.part(cut) for control in request.controls),
    }
    return Portion(**vars(request) | own, split=split)


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


def plan_split(
    unet: UNetConfig,
    ranks: int,
    images: int,
    guidance: bool,
    latent: tuple[int, int],
    itemsize: int,
    rates: Rates,
    asked: Split | None = None,
) -> SplitPlan:
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
    return SplitPlan(best, ranks, images, asked is not None, times, received, exchanges)


def work_of(c: UNetConfig, height: int, width: int) -> tuple[float, float, int]:
    """Of a forward of one sample: operations, elements of keys and values, and the exchanges of a cut by rows."""
    areas = [-(-height // 2**i) * -(-width // 2**i) for i in range(len(c.channel_mult))]
    # Weights that are used at every pixel, and not for the time or the text alone, for `a` channels in and `b` out;
    # of a transformer: two projections, and in each block self-attention (4), cross-attention (2), feed-forward (12).
    weights: dict[str, Callable[[int, int], int]] = {
        "res": lambda a, b: 9 * b * (a + b) + (a * b if a != b else 0),
        "transformer": lambda a, b: (2 + 18 * c.transformer_depth) * a * b,
    }
    work, elements, exchanges = 0.0, 0.0, 2  # the last norm, and the result
    for part in (part for blocks in topology(c) for block in blocks for part in block):
        area = areas[part.out_level]
        work += 2 * area * weights.get(part.kind, lambda a, b: 9 * a * b)(part.channels, part.out_channels)
        if part.kind == "transformer":
            work += 4 * area * area * part.channels * c.transformer_depth  # scores and their products
            elements += 2 * area * part.channels * c.transformer_depth
        exchanges += {"conv": 0, "down": 1, "up": 1, "res": 2, "transformer": 1 + c.transformer_depth}[part.kind]
    return work, elements, exchanges

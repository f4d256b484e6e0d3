"""Where, and by how much, a model differs from diffusers, or one source of weights from another: `artist compare`.

Blocks are compared on the same inputs: our model runs, and each of its blocks hands what it was given to its
counterpart too. So a fault shows in the block that has it, and not in all that follow; what it adds up to, and
what is wrong between blocks, shows in the rows of the whole UNet, encoder and decoder.

Everything is returned as plain data: see `Report`, `Row` and `Change`.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.other_vae import load_with_vae, with_vae
from ..adapt.taesd import TinyVAE
from ..loader import build, check_dtype
from ..model import StableDiffusion
from ..scheduler import make_scheduler
from ..vae import VAE
from ..weights.configs import LoadError
from ..weights.names import PARTS
from ..weights.source import Source, find, refuse_other_kinds
from ..weights.tokenizer import tokenizer_texts
from ..weights.told import apply_config, check_device
from ..weights.unread import read_weights
from . import reference
from .controlled import compare_controlnet
from .drawings import GUIDANCE, compare_drawings
from .measure import Row, compare_blocks, pair, relative, weights_on_use
from .reference import CompareError
from .report import Change, Report

PROMPT = "a red star above a blue ring on a white background"
WHAT = ("text", "unet", "controlnet", "vae", "schedulers", "drawings")
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
# The least bounds, if none is given. diffusers integrates LMS numerically, where ours is exact; and it computes the
# steps of Euler and of DPM++ 2M in float32 whatever the latents are.
LEAST = {"lms": 1e-7} | dict.fromkeys(["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde"], 1e-5)
DRAWN = {"dpmpp_2m_sde": torch.float32}  # the dtype of fresh noise in diffusers, where it is not the latents'
STEPS = 50  # of every scheduler


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the inputs, the same for every comparison


@dataclass(frozen=True)
class Inputs:
    latents: Tensor  # (2, 4, h, w): of two halves, as with guidance
    timesteps: Tensor  # (2,), one of them fractional, as LMS has
    image: Tensor  # (1, 3, H, W) in [-1, 1]


def make_inputs(model: StableDiffusion, size: int | None, dtype: torch.dtype | None = None) -> Inputs:
    f = model.vae.config.downsampling
    size = model.size if size is None else size
    if type(size) is not int or size % f or not f <= size <= 4096:
        raise CompareError(f"The size must be a multiple of {f} from {f} to 4096 pixels, not {size!r}.")
    generator = torch.Generator().manual_seed(0)
    on: dict[str, Any] = {"device": model.device, "dtype": dtype or model.dtype}
    latents = torch.randn(2, model.unet.config.in_channels, size // f, size // f, generator=generator)
    image = torch.rand(1, model.vae.config.in_channels, size, size, generator=generator) * 2 - 1
    return Inputs(latents.to(**on), torch.tensor([981.0, 17.25], device=model.device), image.to(**on))


def vae_blocks(vae: VAE) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Name -> module, of the blocks of the encoder and of the decoder."""
    if isinstance(vae, TinyVAE):
        return reference.tiny_blocks(vae)
    encoder: dict[str, nn.Module] = {"quant_conv": vae.quant_conv}
    decoder: dict[str, nn.Module] = {"post_quant_conv": vae.post_quant_conv}
    for side, half, table in (("encoder", vae.encoder, encoder), ("decoder", vae.decoder, decoder)):
        for key in ("conv_in", "mid", "norm_out", "conv_out"):
            table[f"{side}.{key}"] = getattr(half, key)
    encoder |= {f"encoder.down.{i}": level for i, level in enumerate(vae.encoder.down)}
    decoder |= {f"decoder.up.{i}": level for i, level in enumerate(vae.decoder.up)}
    return encoder, decoder


def unet_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of the blocks of a UNet."""
    inner = ((f"{name}.{i}", block) for name in ("input_blocks", "output_blocks")
             for i, block in enumerate(getattr(unet, name)))  # fmt: skip
    return dict(inner) | {name: getattr(unet, name) for name in ("time_embed", "middle_block", "out")}


# ---- against diffusers


@torch.no_grad()
def compare_with_diffusers(
    model: StableDiffusion,
    *,
    size: int | None = None,
    what: Sequence[str] = WHAT,
    bound: float | None = None,
    repeats: int = 1,
    prompt: str = PROMPT,
    controlnet: str | os.PathLike[str] | None = None,
) -> Report:
    """A row for the text encoder, each block of the UNet and the VAE, each whole, each scheduler, and whole drawings.

    model    in the dtype and on the device to compare in; float64 shows the smallest faults
    size     of the picture, in pixels along an edge; the model's own if not given
    what     which of "text", "unet", "controlnet", "vae", "schedulers", "drawings"
    bound    largest difference that passes; if not given, 1e-10 in float64 (more for the solvers in `LEAST`), 1e-5 in
             float32, 1e-2 in half precision
    repeats  how often each block is timed
    controlnet   file of the ControlNet that is compared; one with random weights if not given

    diffusers' models get the very same weights, in the same memory. Raises CompareError, a ValueError, for
    arguments that do not fit and where diffusers is not installed.
    """
    if unknown := [w for w in what if w not in WHAT]:
        raise CompareError(f"There is no part {unknown[0]!r} to compare: choose among {', '.join(WHAT)}.")
    if type(repeats) is not int or repeats < 0:
        raise CompareError(f"repeats must be a whole number of at least 0, not {repeats!r}.")
    usual = BOUNDS.get(model.dtype, 1e-2)
    least = LEAST if bound is None else {}
    bound = usual if bound is None else bound
    version = reference.diffusers().__version__
    read_weights(model.unet)
    read_weights(model.vae)
    inputs = make_inputs(model, size)
    side = inputs.image.shape[-1]
    report = Report(
        f"{model.name} against diffusers {version}: {name_of(model.dtype)}, {side} x {side}, {model.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}",
        ("ours", "diffusers"),
    )
    texts = ["", prompt]
    if "text" in what:
        report.rows.append(compare_text(model, texts, bound, repeats))
    if "unet" in what:
        report.rows += compare_unet(model, inputs, model.encode_prompt(texts), bound, repeats)
    if "controlnet" in what:
        given = inputs.latents, inputs.timesteps, inputs.image
        report.rows += compare_controlnet(model, given, model.encode_prompt(texts), bound, repeats, controlnet)
    if "vae" in what:
        report.rows += compare_vae(model, inputs, bound, repeats)
    if "schedulers" in what:
        latents = inputs.latents[:, : model.vae.config.z_channels]
        for name in reference.COMPARED:
            report.rows.append(compare_scheduler(name, latents, max(bound, least.get(name, 0.0))))
    if "drawings" in what:
        report.rows += compare_drawings(model, side, texts, bound)
    return report


def compare_text(model: StableDiffusion, texts: list[str], bound: float, repeats: int) -> Row:
    """Ours against transformers' CLIPTextModel as diffusers' encode_prompt calls it."""
    tokenizer, other = reference.transformers_tokenizer(model.text), reference.transformers_text(model.text)
    how = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}

    def theirs() -> Tensor:
        tokens = tokenizer(texts, return_tensors="pt", **how)
        return other(tokens.input_ids.to(other.device), attention_mask=None)[0].to(model.device)

    return pair("text", lambda: model.encode_prompt(texts), theirs, bound, repeats)[0]


def compare_unet(model: StableDiffusion, inputs: Inputs, context: Tensor, bound: float, repeats: int) -> list[Row]:
    unet, theirs = model.unet, reference.diffusers_unet(model)
    arguments = inputs.latents, inputs.timesteps, context
    counterparts = reference.unet_counterparts(unet, theirs)
    told = reference.told_guidance(unet.config, GUIDANCE, inputs.latents)
    # Theirs starts from the timesteps: the sines and cosines are part of it.
    counterparts["time_embed"] = lambda x, _: theirs.time_embedding(theirs.time_proj(inputs.timesteps).to(x), told)
    counterparts["out"] = lambda x: theirs.conv_out(theirs.conv_act(theirs.conv_norm_out(x)))
    ours = partial(unet, *arguments, guidance=GUIDANCE)
    rows = compare_blocks("unet", unet_blocks(unet), counterparts, ours, bound, repeats)
    whole, _ = pair(
        "unet (whole)",
        ours,
        lambda: theirs(*arguments, timestep_cond=told, return_dict=False)[0],
        bound,
        repeats,
    )
    return [*rows, whole]


def compare_vae(model: StableDiffusion, inputs: Inputs, bound: float, repeats: int) -> list[Row]:
    vae, theirs = model.vae, reference.diffusers_vae(model)
    latent, scale = inputs.latents[:1, : vae.config.z_channels], vae.config.scale_factor
    calls: tuple[tuple[Callable[[], Tensor], Callable[[], Tensor]], ...] = (
        (partial(_mean, vae, inputs.image), lambda: _mean_of(theirs.encode(inputs.image))),
        (partial(vae.decode, latent), lambda: theirs.decode(latent / scale, return_dict=False)[0]),
    )
    counterparts = reference.vae_counterparts(vae, theirs)
    rows = []
    for side, modules, (ours, other) in zip(("encoder", "decoder"), vae_blocks(vae), calls, strict=True):
        rows += compare_blocks("vae", modules, counterparts, ours, bound, repeats)
        rows.append(pair(f"vae.{side} (whole)", ours, other, bound, repeats)[0])
    return rows


def compare_scheduler(name: str, start: Tensor, bound: float) -> Row:
    """Every step of a scheduler; both get our latents and the noise that a stand-in for the UNet sees in them.

    Both draw the same fresh noise, where they draw some.
    """
    ours, theirs = make_scheduler(name, STEPS), reference.diffusers_scheduler(name)
    theirs.set_timesteps(STEPS)
    if hasattr(theirs, "set_begin_index"):  # else it looks for the timestep, and takes the wrong one of two alike
        theirs.set_begin_index(0)
    x, state = start * ours.init_noise_sigma, ours.init_state()
    worst, at, seconds = 0.0, 0, [0.0, 0.0]
    here, there = (torch.Generator().manual_seed(0) for _ in range(2))
    drawing = {"generator": there} if "generator" in inspect.signature(theirs.step).parameters else {}
    wanted = theirs.timesteps.tolist()
    if len(ours.timesteps) != len(wanted) or any(
        abs(a - b) > 0.01 for a, b in zip(ours.timesteps, wanted, strict=True)
    ):
        return Row(name, math.inf, bound, note="other timesteps")
    for i, t in enumerate(theirs.timesteps):
        seen, expected_seen = ours.scale_input(i, x), theirs.scale_model_input(x, t)
        noise = torch.sin(0.9 * seen + float(t) / 300)
        fresh = None
        if ours.draws(i):
            fresh = torch.randn(x.shape, generator=here, dtype=DRAWN.get(name, x.dtype)).to(x.device)
        begin = time.perf_counter()
        after, state = ours.step(i, noise, x, state, variance_noise=fresh)
        middle = time.perf_counter()
        expected = theirs.step(noise, t, x, return_dict=False, **drawing)[0]
        seconds = [seconds[0] + middle - begin, seconds[1] + time.perf_counter() - middle]
        difference = max(relative(after, expected), relative(seen, expected_seen))
        if difference > worst:
            worst, at = difference, i
        x = after
    note = f"{STEPS} steps" + (f", worst at step {at + 1}" if worst else "")
    return Row(name, worst, bound, (seconds[0], seconds[1]), None, note)


# ---- two sources


@torch.no_grad()
def compare_sources(
    a: Any,
    b: Any,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
    bound: float = 0.0,
    prompt: str = PROMPT,
    revision: str | None = None,
    token: str | bool | None = None,
    tokenizer: Any = None,
    config: Any = None,
    variant: str | None = None,
) -> Report:
    """Which tensors of two sources differ, and what that does: B's blocks on the inputs that A's blocks get.

    a, b     what `sd.load` takes; both stay in their files, tensor by tensor and block by block
    bound    largest relative difference of a tensor or a block's output that counts as none
    dtype    in which blocks are computed; tensors are compared as they are
    Other arguments are those of `sd.load`; they are of both sources, and stand before what these say themselves.

    Tokenizers, configurations and picture sizes that differ are named too, and the two are not the same then;
    a source that tells none, as a .ckpt, takes the other's tokenizer and size. Where tensors are missing or of
    other shapes, blocks are not compared, and a note says so. Raises LoadError and its kin for sources that
    cannot be read.
    """
    check_dtype(dtype)
    first, second = (find(s, revision=revision, token=token, variant=variant) for s in (a, b))
    settings = apply_config(first, config)
    apply_config(second, config)
    refuse_other_kinds(first)
    refuse_other_kinds(second)
    report = Report(f"A: {first.name} ({first.kind})\nB: {second.name} ({second.kind})", ("A", "B"))
    report.changes = list(compare_tensors(first, second, bound))
    report.tensors = sum(len(first.parts[part].keys() | second.parts[part].keys()) for part in PARTS)
    if tokenizer is None and other_tokenizers(first, second):
        report.differences.append("The tokenizers differ; both text encoders are given A's tokens.")
    if first.size and second.size and first.size != second.size:
        report.differences.append(f"The sizes of a picture differ: {first.size} and {second.size} pixels.")
    if any(change.kind != "value" for change in report.changes):
        report.notes.append("The blocks are not compared, for the two do not have the same tensors.")
        return report
    own = first.tokenizer or second.tokenizer if tokenizer is None else None
    try:
        texts = own or tokenizer_texts(first, tokenizer, token)
    except LoadError as error:
        if tokenizer is not None:
            raise
        report.notes.append(f"The blocks are not compared: {error}")
        return report
    models = []
    try:
        for found in (first, second):
            models.append(build(found, settings, texts))
    except LoadError as error:
        # Where A is a model, or their files say other things, it is a difference that B is none.
        apart = models or first.configs != second.configs
        (report.differences if apart else report.notes).append(f"The blocks are not compared: {error}")
        return report
    report.differences += other_configs(*models)
    size = first.size or second.size if size is None else size  # a .ckpt does not tell
    report.rows = compare_outputs(models[0], models[1], size, prompt, bound, dtype)
    return report


def other_tokenizers(a: Source, b: Source) -> bool:
    """Whether both bring a tokenizer, and not the same: by what the files say, not by how they are written."""

    def meaning(texts: dict[str, str]) -> Any:
        merges = [line.strip() for line in texts["merges.txt"].split("\n")[1:] if line.strip()]  # the head: a version
        try:
            return json.loads(texts["vocab.json"]), merges, json.loads(texts.get("added_tokens.json", "[]"))
        except (ValueError, RecursionError):
            return texts

    if a.tokenizer is None or b.tokenizer is None:
        return False
    return a.tokenizer != b.tokenizer and meaning(a.tokenizer) != meaning(b.tokenizer)


def other_configs(a: StableDiffusion, b: StableDiffusion) -> list[str]:
    """A sentence for each part whose configuration differs, in what the shapes of tensors do not tell."""

    def values(config: Any) -> dict[str, Any]:
        return {name: sorted(v) if name == "attention_resolutions" else v for name, v in asdict(config).items()}

    sentences = []
    for part, name in PARTS.items():
        ours, theirs = (values(getattr(model, part).config) for model in (a, b))
        if apart := [f"{key} = {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
            sentences.append(f"The configurations of the {name} differ: {', '.join(apart)}.")
    return sentences


def compare_tensors(a: Source, b: Source, bound: float) -> Iterator[Change]:
    """The tensors that differ, read one at a time."""
    for part in PARTS:
        ours, theirs = a.parts[part], b.parts[part]
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            x, y = ours.get(name), theirs.get(name)
            shapes = None if x is None else tuple(x.shape), None if y is None else tuple(y.shape)
            if x is None or y is None:
                yield Change(part, name, f"missing in {'A' if x is None else 'B'}", shapes)
            elif x.shape != y.shape:
                yield Change(part, name, "shape", shapes)
            elif (difference := relative_by_pieces(y, x)) > bound:
                yield Change(part, name, "value", shapes, difference)


def relative_by_pieces(got: Tensor, expected: Tensor, piece: int = 1 << 22) -> float:
    """`relative`, a few million values at a time; a value that is NaN in both is no difference."""
    most = top = 0.0
    for x, y in zip(got.flatten().split(piece), expected.flatten().split(piece), strict=True):
        x, y = x.double(), y.double()
        gap = (x - y).abs().masked_fill_((x == y) | (x.isnan() & y.isnan()), 0)
        most = max(most, gap.nan_to_num_(math.inf).max().item())
        top = max(top, y.abs().nan_to_num_(0, 0).max().item())
    return most / max(top, 1e-300) if most else 0.0


def compare_outputs(
    a: StableDiffusion, b: StableDiffusion, size: int | None, prompt: str, bound: float, dtype: torch.dtype
) -> list[Row]:
    """Rows of B's text encoder, blocks and wholes against A's; the weights of both are as in their files."""
    inputs = make_inputs(a, size, dtype)

    def encode(model: StableDiffusion) -> Tensor:
        tensors = {name: t.to(dtype) for name, t in model.text.state_dict().items()}
        return a.text.with_tensors(tensors).encode(["", prompt])

    def blocks(name: str, modules: Sequence[Mapping[str, nn.Module]], runs: Sequence[Callable[[], Tensor]]) -> None:
        with weights_on_use(modules[0], dtype), weights_on_use(modules[1], dtype):
            rows.extend(compare_blocks(name.split(".")[0], modules[0], modules[1], runs[0], bound, 0))
            rows.append(pair(f"{name} (whole)", runs[1], runs[0], bound, 0)[0])

    text, context = pair("text", lambda: encode(b), lambda: encode(a), bound, 0)
    rows = [text]
    arguments = inputs.latents, inputs.timesteps, context
    unets = [model.unet for model in (a, b)]
    runs = [partial(u, *arguments, guidance=GUIDANCE) for u in unets]
    blocks("unet", [unet_blocks(u) for u in unets], runs)
    vaes = [model.vae for model in (a, b)]
    encoders, decoders = zip(*(vae_blocks(vae) for vae in vaes), strict=True)
    blocks("vae.encoder", encoders, [partial(_mean, v, inputs.image) for v in vaes])
    blocks("vae.decoder", decoders, [partial(v.decode, inputs.latents[:1, : v.config.z_channels]) for v in vaes])
    return rows


def _mean(vae: VAE, image: Tensor) -> Tensor:
    return vae.moments(image)[0]


def _mean_of(encoded: Any) -> Tensor:
    """Of what diffusers' VAE gives, or its AutoencoderTiny, whose latents are certain."""
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean


# ---- the command


def compare_command(
    source: Any = None,
    other: Any = None,
    *,
    random: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    size: int | None = None,
    only: Sequence[str] = WHAT,
    bound: float | None = None,
    repeats: int = 1,
    ema: bool = False,
    loras: Sequence[Any] = (),
    vae: str | None = None,
    controlnet: str | None = None,
    **files: Any,
) -> Report:
    """What `artist compare` does: two sources, or one source or `random` weights ("full", "small") with diffusers.

    loras    files and scales: the source without and with these is compared
    dtype    the name of one; float64 if not given, but float32 for two sources
    vae      another VAE or TAESD in place of the model's own, as for `sd.with_vae`; not for two sources
    controlnet   a file of a ControlNet, to be compared with diffusers'; one with random weights if not given
    files    tokenizer, config, revision and variant, as of `sd.load`
    """
    check_device(device)
    computes_in = getattr(torch, dtype or ("float32" if other or loras else "float64"))
    if other:
        return compare_sources(source, other, size=size, dtype=computes_in, bound=bound or 0.0, **files)
    if not loras:
        reference.diffusers()  # before gigabytes are read
    if random:
        model = reference.random_model_of(random, computes_in).to(device)
        model = with_vae(model, vae) if vae else model
    else:
        model = load_with_vae(source or "shapes", vae, device=device, dtype=computes_in, ema=ema, **files)
    if loras:
        from .adapted import compare_lora  # which takes its inputs from here

        return compare_lora(model, loras, size=size)
    return compare_with_diffusers(model, size=size, what=only, bound=bound, repeats=repeats, controlnet=controlnet)

"""Instruments: see, and change, what happens inside a model while it draws.

    trace             every step's tensors, kept in one file
    attention_maps    which word acts where
    edit              read or replace what any module returns, by its name

They are put on from outside, as context managers, and leave nothing behind; a model that is not studied knows
nothing of them and pays nothing. For `SimpleSampler` and `LeanSampler`; of `ParallelSampler`, only where whole
pictures are dealt out, because a rank sees no more than its own share.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import __version__
from ..image import to_pil
from ..model import StableDiffusion
from ..vae import VAE
from ..weights.checkpoint import read, write_safetensors
from .calls import Calls, model_of
from .maps import Change, around_attention

# ---- edit


@dataclass(frozen=True)
class Here:
    """Where an edit stands: what a function given to `edit` is told.

    Of what is computed outside a call of the UNet (the text encoder and the VAE, and the keys and values that
    `LeanSampler` computes beforehand): step -1, timestep nan, cond all rows, uncond none, whatever the rows are told.
    """

    name: str  # of the module
    module: nn.Module
    inputs: tuple[Any, ...]  # what the module was called with
    step: int  # of the sampling, from 0; -1 outside
    timestep: float  # what the UNet was told
    cond: slice  # the rows of the output that are told what to draw
    uncond: slice  # the rows that are told the negative prompt


Edit = Callable[[Any, Here], Any]


def names(model: Any, pattern: str = "*", *, vae: bool = True, text: bool = True) -> dict[str, nn.Module]:
    """Every module that `edit` can reach, by name: those of the UNet as they are, "vae." and "text." before others.

    The parts themselves are "unet", "vae" and "text". `pattern`, as of `edit`: only those that it is on; with
    ".attend" at its end, the attentions whose probabilities it is on.
    """
    model = model_of(model)
    parts = {"unet": model.unet} | {name: m for name, m in model.unet.named_modules() if name}
    for part, root in (("vae", lambda: model.vae), ("text", lambda: model.text.model)):
        if vae if part == "vae" else text:  # the text encoder is not imported before it is wanted
            parts |= {
                f"{part}.{name.removeprefix('text_model.')}".rstrip("."): m for name, m in root().named_modules()
            }
    return _matching(parts, pattern)


def _matching(known: Mapping[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    stem, inside = pattern.removesuffix(".attend"), pattern.endswith(".attend")
    return {n: m for n, m in known.items() if fnmatchcase(n, stem) and (not inside or hasattr(m, "attend"))}


@contextmanager
def edit(model: Any, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Within the block, functions see what modules return, and may return something else in its place.

        with edit(model, {"middle_block": lambda out, at: 1.5 * out}):
            sampler("a red star")

    model   from `sd.load`, or a sampler
    edits   name -> function(out, at) -> the new output, or None to leave it as it is. `out` is a copy, which may be
            written into; `at` (`Here`) says which module, step and rows. Names are those of checkpoints, and may
            have the wildcards * ? [ ], as "input_blocks.4.1.*.attn2"; `names` lists them. With ".attend" after the
            name of an attention, the function gets its probabilities (B, heads, queries, keys) before they are
            multiplied with the values. Several functions on one module run in the order given.

    No hook is left behind, also after an exception. Raises ValueError for a name that there is not, a result of
    another shape, an output written into but not returned (not seen under torch.inference_mode), and where rows are
    computed once for both halves of guidance, so that neither could be changed alone (`sd.fast`, up to the first
    cross-attention). Warns (UserWarning) of a function that never ran, as one on a module that is done without.
    """
    model = model_of(model)
    known = names(model, text=any(p.split(".")[0] == "text" for p in edits))
    calls, ran = Calls(model), dict.fromkeys(edits, False)

    def apply(pattern: str, name: str, module: nn.Module, inputs: tuple[Any, ...], out: Any) -> Any:
        ran[pattern] = True
        at = Here(name, module, inputs, -1, float("nan"), slice(None), slice(0, 0))
        if calls.inside or module is model.unet:  # whose own hooks come after it has been left
            rows = len(out) if isinstance(out, Tensor) else 0
            if isinstance(out, Tensor) and calls.shared(rows):
                raise ValueError(
                    f"{name} computes once what both halves of guidance have in common, as sd.fast has it, so the "
                    f"edit {pattern!r} cannot tell them apart: use the textbook model, or guidance_scale=1."
                )
            at = Here(name, module, inputs, calls.step, calls.timestep, calls.cond(rows), calls.uncond(rows))
        given = out.clone() if isinstance(out, Tensor) else out
        result = edits[pattern](given, at)
        if result is None:
            # Tensors of inference mode keep no count of what was written.
            if isinstance(given, Tensor) and not given.is_inference() and given._version:
                raise ValueError(f"The edit {pattern!r} wrote into its output but returned nothing: return it.")
            return out
        if isinstance(out, Tensor) and (not isinstance(result, Tensor) or result.shape != out.shape):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"The edit {pattern!r} must return {tuple(out.shape)}, as {name} does, not {got}.")
        # Not the caller's own tensor: some forwards go on in place, and would write into it.
        return result.to(out, copy=result is not given) if isinstance(out, Tensor) else result

    attends: dict[str, list[Change]] = {}
    with calls.watch(), ExitStack() as stack:
        for pattern in edits:
            stem, inside = pattern.removesuffix(".attend"), pattern.endswith(".attend")
            found = _matching(known, pattern)
            if not found:
                near = difflib.get_close_matches(stem, known, 3, 0.5)
                hint = f"there are {', '.join(near)}" if near else "sd.study.names(model) lists them"
                raise ValueError(f"No {'attention' if inside else 'module'} is called {stem!r}: {hint}.")
            for name, module in found.items():
                if inside:
                    attends.setdefault(name, []).append(_change(apply, pattern, name, module))
                else:
                    hook = _output(apply, pattern, name)
                    stack.callback(module.register_forward_hook(hook).remove)
        for name, changes in attends.items():
            stack.enter_context(around_attention(known[name], changes=changes))
        yield
    for pattern, did in ran.items():
        if not did:
            warnings.warn(f"The edit {pattern!r} never ran: nothing that it is on was called.", stacklevel=3)


def _output(apply: Callable[..., Any], pattern: str, name: str) -> Callable[..., Any]:
    return lambda module, inputs, out: apply(pattern, name, module, inputs, out)


def _change(apply: Callable[..., Any], pattern: str, name: str, module: nn.Module) -> Change:
    return lambda probs, inputs: apply(pattern, name, module, inputs, probs)


# ---- trace


TENSORS = ("timesteps", "x", "noise_without", "noise_with", "noise", "x0", "latents", "rgb")


@dataclass(frozen=True)
class Trace:
    """A sampling, step by step: S steps (calls of the UNet) of B pictures. Tensors are on the CPU.

    `x0`, the clean latents that a step's noise points to, is what one watches: it begins as a blur.
    """

    timesteps: Tensor  # (S,) float32: what the UNet was told
    x: Tensor  # (S, B, 4, h, w): x_t, what the UNet was given
    noise_without: Tensor | None  # (S, B, 4, h, w): predicted for the negative prompt; None without guidance
    noise_with: Tensor  # (S, B, 4, h, w): predicted for the prompt
    noise: Tensor  # (S, B, 4, h, w): guided
    x0: Tensor  # (S, B, 4, h, w)
    latents: Tensor  # (B, 4, h, w): the result
    rgb: Tensor  # (5, 3): latents to rough colours, see `latent_rgb`
    settings: dict[str, Any]  # prompt, seeds, guidance_scale, scheduler, model, ...

    @property
    def norms(self) -> dict[str, Tensor]:
        """The root mean square of each kind of tensor, (S, B) float64: 1 for unit noise."""
        kinds = ("x", "noise_without", "noise_with", "noise", "x0")
        found = {kind: getattr(self, kind) for kind in kinds}
        return {k: t.double().flatten(2).square().mean(2).sqrt() for k, t in found.items() if t is not None}

    @property
    def angle(self) -> Tensor | None:
        """Between the two predictions, in degrees: (S, B) float64; None without guidance."""
        if self.noise_without is None:
            return None
        a, b = (
            t.double().flatten(2) / t.double().flatten(2).norm(dim=2, keepdim=True)
            for t in (self.noise_without, self.noise_with)
        )
        # Half the angle by the sides of its triangle: acos of the product loses small angles to rounding.
        return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=2), (a + b).norm(dim=2)))

    def picture(self, step: int = -1, image: int = 0, kind: str = "x0", vae: VAE | None = None) -> Image.Image:
        """One of x, noise, ..., x0 as a picture: by a VAE if given, else roughly, by the matrix `rgb`."""
        if kind not in TENSORS[1:6] or getattr(self, kind) is None:
            raise ValueError(f"There is no {kind!r} to show: choose from {', '.join(TENSORS[1:6])}.")
        latents = getattr(self, kind)[step, image][None]
        if vae is None:
            return to_pil(to_rgb(latents, self.rgb).repeat_interleave(8, 2).repeat_interleave(8, 3))[0]
        weight = next(vae.parameters())
        with torch.no_grad():
            return to_pil((vae.decode(latents.to(weight)) / 2 + 0.5).clamp(0, 1))[0]

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write one .safetensors file, whole or not at all. Raises ValueError where it exists, unless `force`."""
        if Path(path).exists() and not force:
            raise ValueError(f"{path} exists: choose another name, or write over it with force=True.")
        tensors = {name: t for name in TENSORS if (t := getattr(self, name)) is not None}
        write_safetensors(path, tensors, {"format": "pt", "trace": json.dumps(self.settings)}, force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """What `save` wrote; tensors are read when they are used. Raises ValueError for another file."""
        file = read(path)
        missing = [n for n in TENSORS if n not in file.tensors and n != "noise_without"]
        if missing or "trace" not in file.metadata:
            raise ValueError(f"{path} is no trace: sd.study.trace(...).save(path) writes one.")
        tensors = {name: file.tensors.get(name) for name in TENSORS}
        return cls(**tensors, settings=json.loads(file.metadata["trace"]))  # type: ignore[arg-type]


@torch.no_grad()
def trace(sampler: Any, prompt: Any = None, *, progress: Callable[..., Any] | None = None, **call: Any) -> Trace:
    """Draw, and keep what every step knew. Arguments are those of the sampler, but for `output_type`.

    progress: `tqdm`, or what is called like it, progress(steps, total=...), and gives the steps one by one.

    The tensors are the sampler's own, to the last bit; `sampler.decode(trace.latents)` is its picture. Memory: five
    latents a step and picture, 0.3 MB at 512 x 512. Raises ValueError as the sampler does.
    """
    model = model_of(sampler)
    request = sampler.request(prompt, **call)
    images = len(request.context)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    kinds: dict[str, list[Tensor]] = {kind: [] for kind in TENSORS[1:6]}

    def note(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        inputs.append((args[0] if args else kwargs["x"])[:images].cpu().clone())
        outputs.append(out.cpu().clone())

    handle = model.unet.register_forward_hook(note, with_kwargs=True)
    try:
        steps = sampler.run(request)
        for step in progress(steps, total=len(request.scheduler.timesteps)) if progress else steps:
            out = torch.cat(outputs)  # both halves of guidance, from one call or from two, the negative one first
            if len(out) != (images if request.negative is None else 2 * images):
                raise ValueError("This sampler's UNet sees only a part of the pictures: trace a SimpleSampler.")
            now = {"x": inputs[0], "noise": step.noise.cpu(), "x0": step.denoised.cpu(), "noise_with": out[-images:]}
            if request.negative is not None:
                now["noise_without"] = out[:images]
            for kind, tensor in now.items():
                kinds[kind].append(tensor.clone())
            inputs.clear()
            outputs.clear()
            latents = step.latents.cpu().clone()
    finally:
        handle.remove()
    scheduler = request.scheduler
    negative = call.get("negative_prompt", "")
    settings = {
        "prompt": prompt if isinstance(prompt, str | list) else None,  # else embeddings
        "negative_prompt": negative if isinstance(negative, str | list) else None,
        "guidance_scale": request.guidance_scale,
        "num_inference_steps": scheduler.num_inference_steps,
        "scheduler": type(scheduler).__name__.lower(),
        "eta": scheduler.eta,
        "seeds": request.seeds,
        "num_images_per_prompt": call.get("num_images_per_prompt", 1),
        "height": request.height,
        "width": request.width,
        "model": model.name,
        "model_hash": model.hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "version": __version__,
    }
    return Trace(
        timesteps=torch.tensor(scheduler.timesteps, dtype=torch.float32),
        latents=latents,
        rgb=latent_rgb(model),
        settings=settings,
        **{kind: torch.stack(parts) if parts else None for kind, parts in kinds.items()},  # type: ignore[arg-type]
    )


# ---- latents to rough colours

V1_SCALE = 0.18215
V1_RGB = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))


def latent_rgb(model: StableDiffusion) -> Tensor:
    """(5, 3): a row for each channel of the latent and one to add, to the image in [0, 1], an eighth the size.

    For Stable Diffusion v1 the matrix that is in use for previews; for another VAE the least squares fit to its
    encodings of coloured fields.
    """
    c = model.vae.config
    if c.scale_factor == V1_SCALE and c.z_channels == 4:
        return torch.cat([torch.tensor(V1_RGB) / 2, torch.full((1, 3), 0.5)])
    vae = model.vae
    if next(vae.parameters()).dtype not in (torch.float32, torch.float64):
        vae = deepcopy(vae).float()  # loaded lazily, or half precision on the CPU
    weight = next(vae.parameters())
    generator = torch.Generator().manual_seed(0)
    side = 4 * c.downsampling
    colours = torch.rand(4, 3, 4, 4, generator=generator)
    fields = colours.repeat_interleave(side, 2).repeat_interleave(side, 3)  # (4, 3, 16 f, 16 f)
    with torch.no_grad():
        latents = vae.encode((2 * fields - 1).to(weight)).cpu().double()
    known = torch.cat([latents, torch.ones_like(latents[:, :1])], 1).transpose(0, 1).flatten(1).T  # (n, 5)
    wanted = colours.repeat_interleave(4, 2).repeat_interleave(4, 3).transpose(0, 1).flatten(1).T.double()
    return torch.linalg.lstsq(known, wanted, driver="gelsd").solution.float()


def to_rgb(latents: Tensor, rgb: Tensor) -> Tensor:
    """(B, 4, h, w) -> (B, 3, h, w) in [0, 1], by a matrix of `latent_rgb`."""
    colours = torch.einsum("bchw,cr->brhw", latents.float(), rgb[:-1]) + rgb[-1][:, None, None]
    return colours.clamp(0, 1)

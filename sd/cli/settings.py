"""What a drawing is asked to be, and the model and the sampler that it needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..files import printable, read_json
from ..parallel import launch
from . import controls, given_parts, given_pictures, loras
from .again import HASHES, RECORDED, recorded
from .options import LAST_SEED, RANDOM, CommandError
from .recipes import with_recipe

if TYPE_CHECKING:
    from ..model import StableDiffusion
    from ..sampler import SimpleSampler
    from ..scheduler import Scheduler

# What looks like a weight in a prompt -> the styles in which it is one.
WEIGHTS = {
    r"\([^()]*:\s*[\d.]+\s*\)|\(\([^()]+\)\)|\bBREAK\b": "a1111 or comfy",
    r"(?:\w(?:\+\+|--)|\)(?:\++|-+|\d*\.\d+))(?=[\s.,)]|$)": "compel",
}
HIRES_STRENGTH = 0.75  # as in sd/pictures/hires.py, which is not imported where it is not needed
NAMED = ("num_inference_steps", "schedule", "eta", "sigma_spacing")  # of a solver, and told apart from its options
GAIN = 1.5  # of bfloat16 from which on the command mentions it
LARGE = 100_000_000  # parameters of a UNet from which on sd.fast pays; with fewer it is no faster


@dataclass(frozen=True)
class Drawing:
    """Every setting of a drawing. None: nothing was asked for, and the model, the sampler or the machine decides."""

    # What is drawn. The names are those of a sampler's arguments.
    prompt: str
    negative_prompt: str = ""
    prompt_style: str | None = None
    clip_skip: int | None = None
    rng: str | None = None
    seed: int = 0  # of the first picture
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | Scheduler | None = None
    solver_options: Mapping[str, Any] | None = None  # what else the solver of a picture to be drawn again had
    eta: float = 0.0
    recipe: str | None = None  # whose settings these are, as far as nothing else was given
    # From which picture.
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    paste: bool = True
    extend: Mapping[str, int] | None = None
    hires: float | None = None
    controlnet: Sequence[Any] | None = None  # `controls.Followed`
    guess_mode: bool = False
    image_digest: str | None = None  # of what the picture to be drawn again was drawn from
    mask_digest: str | None = None
    given: Mapping[str, Any] | None = None  # what was read of the files: arguments of a sampler
    told: Mapping[str, Any] | None = None  # and what the drawn picture says of them
    # With which model.
    model: str = "shapes"
    revision: str | None = None
    hub_variant: str | None = None
    ema: bool = False
    tokenizer: str | None = None
    config: Mapping[str, Any] | None = None
    lora: Sequence[Any] | None = None  # `loras.Chosen`, in the order in which they are added
    lora_dir: Sequence[str] | None = None  # folders in which those are looked for that a prompt or a picture names
    lora_hashes: Mapping[str, str] | None = None  # of those that the prompt of a picture names
    vae: str | None = None
    embedding: Sequence[str] | None = None
    embedding_dir: Sequence[str] | None = None  # where those of a picture to be drawn again are looked for
    embedding_digest: Sequence[str | None] | None = None  # of what that picture was drawn with
    again: str | None = None  # the picture that the settings come from
    model_hash: str | None = None  # of what drew that picture
    vae_hash: str | None = None
    text_hash: str | None = None
    config_hash: str | None = None
    tokenizer_hash: str | None = None
    # How.
    variant: str = "simple"
    exact: bool = False
    memory: str | None = None
    threads: int | None = None  # on the CPU; another number rounds otherwise
    ranks: int | None = None
    split: Mapping[str, int] | None = None
    device: str | None = None
    dtype: str | None = None
    plan: bool = False
    preview: int | None = None
    preview_vae: str | None = None
    # How many, and where they go.
    count: int = 1
    output: str | None = None
    force: bool = False
    quiet: bool = False

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of a sampler, but for the prompt, the seed, and what is left to the model."""
        names = ["negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "height", "width"]
        names += ["scheduler", "eta", "prompt_style", "clip_skip", "rng"]
        return {n: value for n in names if (value := getattr(self, n)) is not None} | dict(self.given or {})

    @property
    def fast(self) -> bool:
        """Whether a large model is drawn with by `sd.fast`: on a CPU or CUDA, unless something else is asked for."""
        return self.variant == "simple" and not self.exact and place(self.device).partition(":")[0] in ("cpu", "cuda")

    @property
    def simple_on_cpu(self) -> bool:
        return self.variant == "simple" and place(self.device).partition(":")[0] == "cpu"


def drawing_of(given: Mapping[str, Any]) -> Drawing:
    """What is given on the command line; what is not, from the picture that is to be drawn again, if there is one."""
    settings = with_recipe(recorded(given["again"], given) if "again" in given else {}, given)
    if "prompt" not in settings:
        raise CommandError('There is nothing to draw: give a prompt, for example artist "a red star".')
    settings = controls.settled(loras.settled(settings, given), given)
    if isinstance(settings.get("config"), str):  # its content, so that the picture can tell it
        settings["config"] = config_in(settings["config"])
    if settings.get("seed") == RANDOM:
        settings["seed"] = random_seed()
    drawing = Drawing(**settings)
    if drawing.embedding_dir and not drawing.again:
        raise CommandError("--embedding-dir is about a picture that is drawn again: give one with --again.")
    if drawing.preview_vae and not drawing.preview:
        raise CommandError("--preview-vae is about previews, and there are none: ask for them with --preview N.")
    hint_at_styles(drawing)
    last = drawing.seed + drawing.count - 1
    if drawing.count > 1 and drawing.seed <= LAST_SEED < last:
        raise CommandError(f"--seed {drawing.seed} leaves no seeds for --count {drawing.count}: give a smaller one.")
    # Read now, and once: they may be written over by what is drawn.
    given_here = given_pictures.arguments(drawing) | controls.pictures(drawing)
    told = given_pictures.told(drawing) | given_parts.told(drawing)
    return replace(drawing, given=given_here or None, told=told) if told or given_here else drawing


def hint_at_styles(drawing: Drawing) -> None:
    """Warn where a prompt looks as if it had weights, and is read as plain text."""
    if drawing.prompt_style is not None:
        return
    for pattern, styles in WEIGHTS.items():
        looks = re.search(pattern, drawing.prompt) or re.search(pattern, drawing.negative_prompt)
        if looks:
            warnings.warn(
                f"{printable(looks.group(), 40)!r} in the prompt is read as plain text. If it is meant as a weight, "
                f"add --prompt-style {styles}; if not, --prompt-style plain silences this."
            )
            return


def config_in(path: str) -> Mapping[str, Any]:
    config = read_json(path, "The config")
    if not isinstance(config, dict):
        raise CommandError(f'The config {path} cannot be used: give {{"unet": {{...}}, "vae": {{...}}}} in a file.')
    return config


def random_seed() -> int:
    """Any seed, as long as other tools take it too; one for all ranks."""
    if launch.is_rank() and not os.environ.get(launch.SEED):
        raise CommandError("Ranks need one seed, and each would choose its own: give a number to --seed.")
    return int(os.environ.get(launch.SEED) or secrets.randbelow(2**32))


def settings_used(drawing: Drawing, model: StableDiffusion, request: Any) -> dict[str, Any]:
    """What goes into the PNG, but for the seed: enough to draw it again, whatever the model's defaults become."""
    from .. import __version__
    from ..scheduler import scheduler_name

    scheduler = request.scheduler
    asked = {name: getattr(drawing, name) for name in RECORDED if name not in HASHES} | dict(drawing.told or {})
    asked["lora"], asked["controlnet"] = loras.told(drawing), controls.told(drawing)
    if request.pictures is not None:
        asked["strength"] = request.pictures.strength
    if drawing.hires:
        asked["hires_strength"] = HIRES_STRENGTH
    return asked | {
        "num_inference_steps": scheduler.num_inference_steps,
        "guidance_scale": request.guidance[0],
        "scheduler": scheduler_name(scheduler),
        "solver_options": {
            f.name: value
            for f in fields(scheduler)
            if f.name not in NAMED and (value := getattr(scheduler, f.name)) != f.default
        },
        "height": request.height,
        "width": request.width,
        "dtype": str(model.dtype).removeprefix("torch."),
        "version": __version__,
    }


def with_solver(drawing: Drawing, model: StableDiffusion) -> Drawing:
    """With the very solver of the picture that is drawn again, where that says more than its name."""
    from ..scheduler import make_scheduler

    if drawing.solver_options is None or not isinstance(drawing.scheduler, str):
        return drawing
    steps = drawing.num_inference_steps or model.defaults.num_inference_steps
    schedule = model.defaults.schedule
    try:
        solver = make_scheduler(drawing.scheduler, steps, drawing.eta, schedule=schedule, **drawing.solver_options)
    except TypeError as error:
        raise CommandError(
            f"{printable(drawing.again)} cannot be drawn again: its setting solver_options is damaged ({error})."
        ) from None
    return replace(drawing, scheduler=solver)


def hashes_of(model: StableDiffusion) -> dict[str, str | None]:
    """Short digests of what a model draws with: the weights of its parts, config and tokenizer. Files are read.

    None where that cannot be had: a file may be gone by then, and a picture is worth more than its hashes.
    """
    hashes: dict[str, str | None] = dict.fromkeys(HASHES)
    for name, part in (("model_hash", "unet"), ("vae_hash", "vae"), ("text_hash", "text")):
        with contextlib.suppress(OSError):
            digest = model.files.digest(part)
            hashes[name] = digest and digest[:10]
    configs = model.unet.config, model.vae.config, model.text.config, model.defaults.schedule
    # What is as usual is left out, so that a setting that a later version adds changes nothing.
    special = [{f.name: x for f in fields(c) if (x := getattr(c, f.name)) != f.default} for c in configs]
    texts = "\0".join(text for _, text in sorted(model.text.texts.items()))
    for name, text in (("config_hash", json.dumps(special, sort_keys=True)), ("tokenizer_hash", texts)):
        hashes[name] = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:10]
    return hashes


def differences(drawing: Drawing, hashes: Mapping[str, str | None]) -> list[str]:
    """In what the model differs from that of the picture that is drawn again: a sentence, or none."""
    of_parts = drawing.vae_hash or drawing.text_hash  # else all are in one file, or the picture does not say
    whats = {
        "model_hash": ("another UNet" if of_parts else "other weights", "--model"),
        "vae_hash": ("another VAE", "--vae" if drawing.vae else "--model"),
        "text_hash": ("another text encoder", "--model"),
        "config_hash": ("other sizes, or another noise schedule", "--model"),
        "tokenizer_hash": ("another tokenizer", "--tokenizer"),
    }
    found = {name: (was, hashes[name]) for name in whats if (was := getattr(drawing, name)) and was != hashes[name]}
    if not found:
        return []
    what = ", ".join(
        f"{whats[name][0]} (the hash was {was}, and now it is {now})" for name, (was, now) in found.items()
    )
    options = dict.fromkeys(whats[name][1] for name in found)
    return [f"{drawing.again} was drawn with {what}, so this picture may differ; choose by {' and '.join(options)}."]


# ---- the model and the sampler


def place(device: str | None) -> str:
    """The device to compute on: of several ranks on one machine, each takes its own GPU."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"[a-z]{1,20}(:[0-9]{1,3})?", device) or device.partition(":")[0] == "meta":
        raise CommandError(
            f"There is no device {printable(device, 60)!r}: try --device cpu, or cuda for an NVIDIA GPU."
        )
    device = "cpu" if device.startswith("cpu:") else device  # there is but one
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launch.is_rank() else device


def load_model(drawing: Drawing) -> StableDiffusion:
    import torch

    from ..adapt.adapters import lora
    from ..adapt.other_vae import load_with_vae
    from ..adapt.own_words import textual_inversion, with_words_of_lora
    from ..speed.malloc import keep, large_pages
    from ..weights.told import check_device

    if drawing.simple_on_cpu:  # the textbook, too, is faster for it
        large_pages()
        keep()
    device = place(drawing.device)
    check_device(device)

    def read() -> StableDiffusion:
        model = load_with_vae(
            drawing.model,
            drawing.vae,
            device=device,
            dtype=getattr(torch, drawing.dtype) if drawing.dtype else None,
            revision=drawing.revision,
            variant=drawing.hub_variant,
            tokenizer=drawing.tokenizer,
            config=drawing.config,
            ema=drawing.ema,
        )
        for chosen in drawing.lora or ():
            model = with_words_of_lora(lora(model, chosen.file, chosen.scale))
        for file in drawing.embedding or ():
            model = textual_inversion(model, file)
        return model

    if drawing.variant == "parallel":
        from ..parallel.sampler import load_together

        return load_together(read, torch.device(device))
    return read()


def make_sampler(model: StableDiffusion, drawing: Drawing) -> SimpleSampler:
    if drawing.variant == "lean":
        from ..lean.sampler import LeanSampler

        return LeanSampler(model, drawing.memory)
    if drawing.variant == "parallel":
        from ..parallel.sampler import ParallelSampler

        return ParallelSampler(model, drawing.split)
    from ..sampler import SimpleSampler
    from ..speed.fast_model import fast

    faster = drawn_fast(model, drawing)
    if faster and drawing.simple_on_cpu and drawing.dtype is None:
        hint_at_bfloat16()
    return SimpleSampler(fast(model) if faster else model)


def drawn_fast(model: StableDiffusion, drawing: Drawing) -> bool:
    """Whether a model, and its ControlNets, are drawn with by `sd.fast`."""
    return drawing.fast and sum(p.numel() for p in model.unet.parameters()) >= LARGE


def with_controls(drawing: Drawing, model: StableDiffusion) -> Drawing:
    """The drawing, with its ControlNets among the arguments of the sampler."""
    from ..speed.fast_model import fast

    return controls.loaded(drawing, model, fast if drawn_fast(model, drawing) else lambda net: net)


def hint_at_bfloat16() -> None:
    """Warn where this processor would draw several times faster in bfloat16."""
    from ..speed.packed import bfloat16_gain

    if (gain := bfloat16_gain()) >= GAIN:
        warnings.warn(
            f"This processor multiplies {gain:.1f} times as fast in bfloat16 as in float32: --dtype bfloat16 draws "
            "faster, with more rounding; --dtype float32 silences this."
        )

"""What AUTOMATIC1111 and Forge write into a picture (`parameters`), as settings of ours, as far as these go.

The form is that of create_infotext and parse_generation_parameters (modules/processing.py, infotext_utils.py): the
prompt, a line that begins with "Negative prompt:", and a last line of fields.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..files import printable
from .given_parts import by_stem
from .options import CommandError

FIELD = re.compile(r'\s{0,9}(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SPACINGS = {"automatic": "", "uniform": "", "karras": "karras", "exponential": "exponential", "beta": "beta"}
WITHOUT_SCHEDULE = ("ddim", "pndm", "unipc", "lcm")  # there, these do not look at the schedule type
OTHER_NOISE = ("dpmpp_sde", "dpmpp_2m_sde")  # there, theirs is of a Brownian tree
# What is not followed here, and does not matter if it has one of these values; where there is none, it never does.
HARMLESS: dict[str, tuple[str, ...] | None] = {
    "Version": None,
    "VAE hash": None,
    "Hashes": None,
    "Model hash": None,
    "User": None,
    "Batch size": None,
    "Batch pos": None,
    "Variation seed strength": ("0", "0.0"),
    "Seed resize from": ("-1x-1",),
    "ENSD": ("0",),
    "Tiling": ("False",),
    "Token merging ratio": ("0", "0.0"),
    "Emphasis": ("Original",),
    "Hires upscaler": ("Lanczos",),
}
LONGEST_LINE = 20_000  # letters of the fields


def fields_of(text: str) -> tuple[str, str, dict[str, str]]:
    """The prompt, the negative prompt and the fields of a `parameters` text. Raises ValueError where it is none."""
    *lines, last = text.strip().split("\n")
    if len(last) > LONGEST_LINE:
        raise ValueError("its last line is too long")
    fields = {name.strip(): unquoted(value) for name, value in FIELD.findall(last)}
    if "Steps" not in fields:
        raise ValueError("its last line has no Steps")
    start = next((i for i, line in enumerate(lines) if line.strip().startswith("Negative prompt:")), len(lines))
    negative = "\n".join(line.strip() for line in lines[start:]).removeprefix("Negative prompt:")
    return "\n".join(line.strip() for line in lines[:start]), negative.strip(), fields


def unquoted(value: str) -> str:
    value = value.strip()
    if value.startswith('"') and value.endswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value


def foreign_settings(text: str, given: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Settings under our names, and what is not followed. Raises ValueError, the rest of a sentence.

    given: names of settings that are given in place of those, so theirs need not be understood.
    """
    prompt, negative, fields = fields_of(text)
    found: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, "prompt_style": "a1111"}

    def take(field: str, name: str, read: Callable[[str], Any]) -> None:
        if field in fields:
            try:
                found[name] = read(fields.pop(field))
            except (ValueError, IndexError):
                raise ValueError(f"its field {field} is damaged") from None

    take("Steps", "num_inference_steps", int)
    take("CFG scale", "guidance_scale", float)
    take("Seed", "seed", int)
    if "Size" in fields:
        sides = re.fullmatch(r"(\d{1,6})x(\d{1,6})", fields.pop("Size").lower())
        if sides is None:
            raise ValueError("its field Size is damaged")
        found["width"], found["height"] = map(int, sides.groups())
    take("Clip skip", "clip_skip", lambda count: int(count) - 1)
    take("Hires upscale", "hires", float)
    if len(fields.get("Model hash", "")) == 10:  # shorter ones are of another kind
        take("Model hash", "model_hash", str.lower)
    take("Model", "model", str)
    take("Lora hashes", "lora_hashes", hashes_in)
    found["rng"] = "cpu" if fields.pop("RNG", "") == "CPU" else "cuda"
    missed = []
    if words := fields.pop("TI hashes", ""):
        pairs = [word.rpartition(":") for word in words.split(",") if word.strip()]
        found["embedding"] = [name.strip() or number.strip() for name, _, number in pairs]
        found["embedding_digest"] = [number.strip().lower() if name else None for name, _, number in pairs]
    if "VAE" in fields:
        if len(number := fields.pop("VAE hash", "").lower()) == 10:
            found["vae_hash"] = number
        take("VAE", "vae", str)
    sampler, schedule = fields.pop("Sampler", ""), fields.pop("Schedule type", "")
    if sampler and "scheduler" not in given:
        found["scheduler"] = solver_named(sampler, schedule)
        if found["scheduler"].startswith(OTHER_NOISE):
            missed.append(f"Sampler: {printable(sampler, 40)} (its noise is drawn in another way)")
    if found.get("scheduler") == "ddim":
        take("Eta DDIM", "eta", float)
    fresh = str(found.get("scheduler", "")).startswith(("euler_a", "dpm2_a", "dpmpp_sde", "dpmpp_2m_sde"))
    if fields.get("Eta") in ("1", "1.0") or not fresh:
        fields.pop("Eta", None)
    if "hires" in found:
        strength = fields.pop("Denoising strength", "")
        missed.append(
            f"Hires upscale: {found['hires']:g} (the second pass is ours, at 0.75 in place of {strength or '?'})"
        )
    unnamed = [f"{name}: {digest}" for name, digest in found.get("lora_hashes", {}).items() if name not in prompt]
    if unnamed and "lora" not in given:
        missed.append(f"Lora hashes: {printable(', '.join(unnamed), 80)} (the prompt does not name it)")
    for name, value in fields.items():
        harmless = HARMLESS.get(name, ())
        if harmless is not None and value not in harmless:
            missed.append(f"{name}: {printable(value, 40)}")
    return found, missed


def hashes_in(text: str) -> dict[str, str]:
    """ "style: 0123456789ab, other: ..." """
    pairs = [pair.rpartition(":") for pair in text.split(",") if pair.strip()]
    return {name.strip(): digest.strip().lower() for name, _, digest in pairs}


def solver_named(sampler: str, schedule: str) -> str:
    """Our name for a sampler and a schedule type of AUTOMATIC1111's. Raises ValueError for others."""
    from ..scheduler import find_name

    solver, spacing = find_name(sampler)
    if solver in WITHOUT_SCHEDULE:
        return solver
    chosen = SPACINGS.get(schedule.lower()) if schedule else spacing
    if chosen is None:
        raise ValueError(f"its schedule type {printable(schedule, 40)!r} is not here")
    named = chosen or spacing
    return "_".join(filter(None, find_name(f"{solver}_{named}" if named else solver)))


def read_foreign(picture: str, text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture of another program; what is not followed is warned of. Raises CommandError."""
    try:
        found, missed = foreign_settings(text, given)
    except ValueError as error:
        raise CommandError(
            f"{printable(picture)} cannot be drawn again: {error}; if it is the sampler, --scheduler chooses."
        ) from None
    model = found.pop("model", None)
    if "model" not in given:
        name = printable(model, 80) if model else "that it does not name"
        number = f" (hash {printable(found['model_hash'], 20)})" if "model_hash" in found else ""
        raise CommandError(
            f"{printable(picture)} was drawn by another program with the model {name}{number}: "
            "say where that is with --model FILE."
        )
    if "vae" not in given and (vae := found.pop("vae", None)):
        found.pop("vae_hash", None)
        missed.append(f"VAE: {printable(vae, 40)} (--vae gives it)")
    missed += missing_words(found, given)
    found.pop("vae", None)
    if missed:
        warnings.warn(
            f"{printable(picture)} was drawn with settings that are not followed here, so this picture will differ: "
            f"{'; '.join(missed)}."
        )
    return found


def missing_words(found: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Put the files of embeddings in place of their names; what is in no folder of `--embedding-dir` is named."""
    names, digests = found.pop("embedding", []), found.pop("embedding_digest", [])
    if "embedding" in given:
        return []
    files = [
        by_stem(name, digest, given.get("embedding_dir", ())) for name, digest in zip(names, digests, strict=True)
    ]
    if any(files):
        there = [(file, digest) for file, digest in zip(files, digests, strict=True) if file]
        found["embedding"], found["embedding_digest"] = [file for file, _ in there], [digest for _, digest in there]
    return [
        f"embedding: {printable(name, 40)} (--embedding gives it, or --embedding-dir a folder with it)"
        for name, file in zip(names, files, strict=True)
        if file is None
    ]

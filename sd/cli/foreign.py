"""What AUTOMATIC1111 and Forge write into a picture (`parameters`), as settings of ours, as far as these go.

The form is that of create_infotext and parse_generation_parameters (modules/processing.py, infotext_utils.py): the
prompt, a line that begins with "Negative prompt:", and a last line of fields.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..files import printable
from .options import CommandError

FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SPACINGS = {"automatic": "", "uniform": "", "karras": "karras", "exponential": "exponential", "beta": "beta"}
# What changes a picture there and is not followed here, unless it has one of these values.
UNFOLLOWED: dict[str, tuple[str, ...]] = {
    "Variation seed": (),
    "Variation seed strength": ("0", "0.0"),
    "Seed resize from": ("-1x-1",),
    "Face restoration": (),
    "ENSD": ("0",),
    "Eta": ("0", "0.0", "1", "1.0"),
    "Denoising strength": (),
    "Hires upscaler": ("Lanczos",),
    "Hires steps": ("0",),
    "Mask blur": (),
    "Tiling": (),
    "Lora hashes": (),
    "TI hashes": (),
    "Hypernet": (),
    "Refiner": (),
    "VAE": (),
    "Schedule rho": (),
    "Skip Early CFG": (),
    "NGMS": (),
    "Token merging ratio": ("0", "0.0"),
}


def fields_of(text: str) -> tuple[str, str, dict[str, str]]:
    """The prompt, the negative prompt and the fields of a `parameters` text. Raises ValueError where it is none."""
    *lines, last = text.strip().split("\n")
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


def foreign_settings(text: str) -> tuple[dict[str, Any], list[str]]:
    """Settings under our names, and what is not followed. Raises ValueError, the rest of a sentence."""
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
    take("Model hash", "model_hash", lambda value: value.lower()[:10])
    take("Model", "model", str)
    found["rng"] = "cpu" if fields.pop("RNG", "") == "CPU" else "cuda"
    if "Sampler" in fields:
        found["scheduler"] = solver_named(fields.pop("Sampler"), fields.pop("Schedule type", ""))
    if "hires" in found and fields.get("Denoising strength") in ("0.75", "0.7"):
        fields.pop("Denoising strength")
    missed = [
        f"{name}: {printable(fields[name], 40)}"
        for name, harmless in UNFOLLOWED.items()
        if name in fields and fields[name] not in harmless
    ]
    missed += [f"{name}: {printable(value, 40)}" for name, value in fields.items() if name.startswith("ControlNet")]
    return found, missed


def solver_named(sampler: str, schedule: str) -> str:
    """Our name for a sampler and a schedule type of AUTOMATIC1111's. Raises ValueError for others."""
    from ..scheduler import find_name

    solver, spacing = find_name(sampler)
    chosen = SPACINGS.get(schedule.lower()) if schedule else spacing
    if chosen is None:
        raise ValueError(f"its schedule type {printable(schedule, 40)!r} is not here")
    named = chosen or spacing
    return "_".join(filter(None, find_name(f"{solver}_{named}" if named else solver)))


def read_foreign(picture: str, text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture of another program; what is not followed is warned of. Raises CommandError."""
    try:
        found, missed = foreign_settings(text)
    except ValueError as error:
        raise CommandError(f"{printable(picture)} cannot be drawn again: {error}.") from None
    model = found.pop("model", None)
    if "model" not in given:
        name = printable(model, 80) if model else "that it does not name"
        number = f" (hash {printable(found['model_hash'], 20)})" if "model_hash" in found else ""
        raise CommandError(
            f"{printable(picture)} was drawn by another program with the model {name}{number}: "
            "say where that is with --model FILE."
        )
    if missed:
        warnings.warn(
            f"{printable(picture)} was drawn with settings that are not followed here, so this picture will differ: "
            f"{'; '.join(missed)}."
        )
    return found

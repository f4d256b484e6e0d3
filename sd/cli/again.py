"""What a picture says of how it was drawn. It may come from anywhere, so every word of it is checked."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from ..files import from_root, printable
from . import controls, given_parts, given_pictures, loras
from .foreign import read_foreign
from .options import DTYPES, LAST_SEED, STYLES, CommandError

LONGEST = 100_000  # characters of a prompt
# What belongs to the model that was drawn with: with another one it means nothing.
HASHES = ("model_hash", "vae_hash", "text_hash", "config_hash", "tokenizer_hash")
OF_THE_MODEL = ("revision", "hub_variant", "ema", "config", *HASHES)


def text(value: Any) -> bool:
    """Any prompt: valid Unicode."""
    return isinstance(value, str) and len(value) <= LONGEST and encodes(value)


def encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def name(value: Any) -> bool:
    """Of a file, a branch and the like."""
    return isinstance(value, str) and 0 < len(value) <= 1000 and "\0" not in value


def hexadecimal(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 64 and set(value) <= set("0123456789abcdef")


def whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def real(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and least <= value <= most  # NaN is not


def one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in choices


def solver(value: Any) -> bool:
    from ..scheduler import find_name

    try:
        return value == "_".join(filter(None, find_name(value)))
    except ValueError:
        return False


def plain_options(value: Any) -> bool:
    """Of a solver: few, and plain. What its class makes of them is seen when it is made."""
    return (
        isinstance(value, dict)
        and len(value) <= 20
        and all(type(option) in (str, bool, int, float) and len(str(option)) <= 60 for option in value.values())
    )


def several(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= 100 and all(map(sound, value))


RECORDED: dict[str, Callable[[Any], bool]] = {  # what a PNG of `artist` says of how it was drawn
    "prompt": text,
    "negative_prompt": text,
    "prompt_style": one_of(*STYLES),
    "clip_skip": whole(0, 127),
    "rng": one_of("cpu", "cuda"),
    "scheduler": solver,
    "solver_options": plain_options,
    "dtype": one_of(*DTYPES),
    "threads": whole(1, 4096),
    "model": name,
    "revision": name,
    "hub_variant": name,
    "seed": whole(0, LAST_SEED),
    "num_inference_steps": whole(1, 100_000),
    "height": whole(8, 8192),
    "width": whole(8, 8192),
    "guidance_scale": real(0, 100),
    "guidance_rescale": real(0, 1),
    "eta": real(0, 1),
    "ema": lambda value: isinstance(value, bool),
    "image": name,
    "mask": name,
    "strength": real(0, 1),
    "paste": lambda value: isinstance(value, bool),
    "extend": lambda value: (
        isinstance(value, dict)
        and value.keys() <= {"left", "right", "top", "bottom"}
        and all(whole(0, 8192)(pixels) for pixels in value.values())
    ),
    "hires": real(1, 8),
    "image_digest": hexadecimal,
    "mask_digest": hexadecimal,
    "embedding": several(name),
    "embedding_digest": several(lambda value: value is None or hexadecimal(value)),
    "vae": name,
    "config": lambda value: isinstance(value, dict) and all(isinstance(part, dict) for part in value.values()),
    "model_hash": hexadecimal,  # of the file, or that of the UNet
    "vae_hash": hexadecimal,  # of its file in a folder
    "text_hash": hexadecimal,  # of the text encoder's
    "config_hash": hexadecimal,  # of the sizes of all parts, and of the noise that the model was trained with
    "tokenizer_hash": hexadecimal,
    "controlnet": controls.sound(name, hexadecimal),
    "guess_mode": lambda value: isinstance(value, bool),
    "lora": loras.sound(name, hexadecimal),
    "lora_hashes": lambda value: isinstance(value, dict) and all(map(hexadecimal, value.values())),
}


def recorded(picture: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a PNG that `artist` wrote, as far as they still count beside what is given.

    Raises CommandError where they are damaged, and where they name a model that is not here: nothing is fetched on a
    picture's word.
    """
    from ..image import JSON_CHUNK, read_settings, read_text

    if read_text(picture, JSON_CHUNK) is None and (text := read_text(picture, "parameters")) is not None:
        return checked(picture, read_foreign(picture, text.decode(errors="replace"), given))
    found = {key: value for key, value in read_settings(picture).items() if key in RECORDED and value is not None}
    checked(picture, found)
    given_pictures.asked_for(picture, found, given)
    found = given_parts.found_again(picture, given_pictures.displaced(found, given), given)
    if "model" not in given:
        refuse_strangers(picture, found)
    elif given_parts.last_part(str(given["model"])) == given_parts.last_part(found.get("model", "shapes")):
        found.pop("revision", None)
        found.pop("hub_variant", None)
    else:
        for key in OF_THE_MODEL:
            found.pop(key, None)
    if "config" in given:
        found.pop("config", None)
    if "scheduler" in given:
        found.pop("solver_options", None)
    return found


def checked(picture: str, found: dict[str, Any]) -> dict[str, Any]:
    """The settings of a picture. Raises CommandError for a value that cannot be."""
    for key, value in found.items():
        if not RECORDED[key](value):
            raise CommandError(
                f"{printable(picture)} cannot be drawn again: its setting {key} is damaged "
                f"({printable(repr(value), 60)})."
            )
    return found


def refuse_strangers(picture: str, found: Mapping[str, Any]) -> None:
    """Raise CommandError unless the model is the built-in one, or a file or a folder below this one."""
    model = found.get("model", "shapes")
    try:
        here = not from_root(model) and os.path.exists(model)
    except (OSError, ValueError):
        here = False
    if model == "shapes" or here:
        return
    options = {"--model": model, "--revision": found.get("revision"), "--hub-variant": found.get("hub_variant")}
    words = " ".join(f"{option} {shlex.quote(printable(value, 80))}" for option, value in options.items() if value)
    raise CommandError(
        f"{printable(picture)} was drawn with the model {printable(model, 80)}, which is no file here, and nothing "
        f"is downloaded because a picture names it: if you want that model, add {words}."
    )

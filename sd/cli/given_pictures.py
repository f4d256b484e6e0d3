"""The pictures that a drawing starts from: read before anything is loaded, and told in what is drawn."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import printable
from .options import CommandError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .settings import Drawing

ALPHA = "alpha"  # in place of a mask: what is transparent in the picture
LARGE = 2_000_000  # pixels: photographs are seldom meant to be drawn at their own size
NEED = ("mask", "strength", "extend", "paste")  # options that need a picture


def arguments(drawing: Drawing) -> dict[str, Any]:
    """What a sampler is given for `--image`, `--mask` and the like. Raises ValueError."""
    if drawing.hires is not None and not 1 < drawing.hires <= 8:
        raise CommandError(f"--hires must be a number above 1, to 8, not {drawing.hires:g}.")
    if drawing.image is None:
        for name in NEED:
            if (value := getattr(drawing, name)) is not None and value is not True:
                option = "--no-paste" if name == "paste" else f"--{name}"
                raise CommandError(f"{option} is about a picture, and there is none: give one with --image.")
        return {}
    from ..pictures import alpha_mask, extend, read_picture

    if drawing.mask and drawing.extend:
        raise CommandError("--extend makes its own mask: leave --mask out.")
    if drawing.hires and (drawing.mask or drawing.extend):
        raise CommandError("--hires draws all of the picture once more: leave --mask and --extend out.")
    picture = read_picture(drawing.image)
    result: dict[str, Any] = {"paste": drawing.paste}
    strength = drawing.strength
    if drawing.extend:
        picture, result["mask_image"] = extend(picture, **drawing.extend)
        strength = 1.0 if strength is None else strength  # there is nothing to keep in the border
    elif drawing.mask == ALPHA:
        result["mask_image"] = alpha_mask(picture)
        strength = 1.0 if strength is None else strength  # nor in a hole
    elif drawing.mask:
        result["mask_image"] = read_picture(drawing.mask, "mask_image")
    if strength is not None:
        result["strength"] = strength
    warn_of_size(drawing, drawing.image, picture)
    return result | {"image": picture}


def warn_of_size(drawing: Drawing, file: str, picture: Image) -> None:
    """Warn of a picture that says the size, and is large."""
    if drawing.height is None and drawing.width is None and picture.width * picture.height > LARGE:
        warnings.warn(
            f"{printable(file)} has {picture.width} x {picture.height} pixels, and is drawn at that size, "
            "which takes long: --width and --height choose another."
        )


def told(drawing: Drawing) -> dict[str, Any]:
    """What the drawn picture says of them: names, without folders, and digests of the files."""
    result: dict[str, Any] = {}
    for name in ("image", "mask"):
        file = getattr(drawing, name)
        if file is not None:
            result[name] = file if file == ALPHA else Path(file).name
            result[f"{name}_digest"] = None if file == ALPHA else digest_of(file)
    return result


def digest_of(file: str | os.PathLike[str]) -> str | None:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:10]
    except OSError:  # it is gone by now, and the picture that was drawn from it is worth more
        return None


def asked_for(picture: str, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise CommandError where a picture that is to be drawn again was drawn from others, and they are not given."""
    missing = [
        f"--{name} {printable(found[name], 80)}"
        for name in ("image", "mask")
        if found.get(name) and name not in given and found[name] != ALPHA
    ]
    if missing:
        raise CommandError(
            f"{printable(picture)} was drawn from another picture, which it does not hold: add {' '.join(missing)}, "
            "with the folder that it is in."
        )


def displaced(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture, without those that what is given takes the place of."""
    gone: set[str] = set()
    if "extend" in given:
        gone |= {"mask", "mask_digest", "strength"}
    if "mask" in given:
        gone |= {"extend"}
    other = "image" in given and digest_of(given["image"]) != found.get("image_digest")
    if other or "extend" in given or ("mask" in given and found.get("extend")):
        gone |= {"height", "width"}  # the size is that of what is drawn from
    return {key: value for key, value in found.items() if key not in gone}


def others(drawing: Drawing) -> list[str]:
    """Sentences, where the pictures are not those that the picture to be drawn again was drawn from."""
    found = []
    for name in ("image", "mask"):
        was, file = getattr(drawing, f"{name}_digest"), getattr(drawing, name)
        if was and file and file != ALPHA and (drawing.told or {}).get(f"{name}_digest") != was:
            found.append(
                f"{drawing.again} was drawn from another {name} than {file}, so this picture will differ: its digest "
                f"was {was}."
            )
    return found

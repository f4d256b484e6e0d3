"""ControlNets of a drawing, and the pictures that they follow: named on the command line, or by a picture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import from_root, printable
from .given_pictures import digest_of, warn_of_size
from .options import Chosen, CommandError

if TYPE_CHECKING:
    from ..model import StableDiffusion
    from .settings import Drawing

NEED = ("control_image", "control_start", "control_end", "guess_mode", "canny")  # options that need a ControlNet
MOST = 16  # ControlNets of a picture that is drawn again


@dataclass(frozen=True)
class Followed:
    """A ControlNet, and the picture that it follows."""

    file: str
    image: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    canny: bool = False  # the edges of that picture are followed
    digest: str | None = None  # of the file, and of the picture, that a picture to be drawn again was drawn with
    image_digest: str | None = None


def settled(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a drawing with each ControlNet beside its picture, as `Followed`.

    Those of a picture that is drawn again count where none are given. Raises CommandError.
    """
    result = {key: value for key, value in settings.items() if key not in ("controlnet", *NEED)}
    images: Sequence[str] = given.get("control_image", ())
    if "controlnet" in given:
        nets = [Followed(chosen.file, "", one_scale(chosen)) for chosen in given["controlnet"]]
    else:
        nets = [as_before(str(given.get("again")), entry) for entry in settings.get("controlnet") or ()]
        if nets and not images:
            wanted = " ".join(f"--control-image {printable(net.image, 80)}" for net in nets)
            raise CommandError(
                f"{printable(str(given['again']))} was drawn with a ControlNet, and does not hold the picture that "
                f"it follows: add {wanted}, with the folder that it is in."
            )
    if not nets:
        for name in (name for name in NEED if name in given):
            option = f"--{name.replace('_', '-')}"
            raise CommandError(f"{option} is for a ControlNet, and there is none: give one with --controlnet.")
        return result
    if len(images) != len(nets):
        raise CommandError(
            f"{counted(len(nets), 'ControlNet')} and {counted(len(images), 'control image')}: give --control-image "
            "once for each."
        )
    more = {name: given[f"control_{name}"] for name in ("start", "end") if f"control_{name}" in given}
    more |= {"canny": True} if "canny" in given else {}
    for net in (replace(net, **more) for net in nets):
        if not 0 <= net.start < net.end <= 1:
            raise CommandError(
                "--control-start and --control-end are shares of the steps, from 0 to 1, the start below the end, "
                f"not {net.start:g} and {net.end:g}."
            )
    result["controlnet"] = tuple(replace(net, image=image, **more) for net, image in zip(nets, images, strict=True))
    before = False if "controlnet" in given else settings.get("guess_mode", False)
    return result | {"guess_mode": given.get("guess_mode", before)}


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def one_scale(chosen: Chosen) -> float:
    assert isinstance(chosen.scale, float)  # as it is on the command line
    return chosen.scale


def as_before(picture: str, entry: Mapping[str, Any]) -> Followed:
    """A ControlNet that a picture was drawn with. Raises CommandError where it is not here: nothing is fetched."""
    known = {name: entry[name] for name in Followed.__dataclass_fields__ if name in entry}
    file = entry["file"]
    if from_root(file) or not os.path.exists(file):
        raise CommandError(
            f"{printable(picture)} was drawn with the ControlNet {printable(file, 80)}, which is no file here, and "
            "nothing is downloaded because a picture names it: add --controlnet with its file."
        )
    return Followed(**known)


# ---- what the sampler is given


def pictures(drawing: Drawing) -> dict[str, Any]:
    """The pictures that are followed, as arguments of a sampler: read before anything is loaded."""
    if not drawing.controlnet:
        return {}
    from ..pictures import read_picture
    from ..pictures.canny import canny_edges

    images = [
        canny_edges(picture) if net.canny else picture
        for net in drawing.controlnet
        for picture in [read_picture(net.image, "control_image")]
    ]
    if drawing.image is None:
        warn_of_size(drawing, drawing.controlnet[0].image, images[0])
    return {
        "control_image": images,
        "controlnet_conditioning_scale": [net.scale for net in drawing.controlnet],
        "control_guidance_start": [net.start for net in drawing.controlnet],
        "control_guidance_end": [net.end for net in drawing.controlnet],
        "guess_mode": drawing.guess_mode,
    }


def loaded(drawing: Drawing, model: StableDiffusion, prepare: Callable[[Any], Any]) -> Drawing:
    """The drawing, with its ControlNets for this model among the arguments; `prepare` makes them fast, perhaps.

    Warns where they are others than those of the picture that is drawn again.
    """
    if not drawing.controlnet:
        return drawing
    from ..adapt.control_files import load_controlnet

    nets = [prepare(load_controlnet(net.file, model=model)) for net in drawing.controlnet]
    for net, followed in zip(nets, drawing.controlnet, strict=True):
        for what, was, now in (
            ("ControlNet", followed.digest, net.hash if followed.digest else None),
            ("control image", followed.image_digest, digest_of(followed.image)),
        ):
            if was and was != now:
                warnings.warn(
                    f"{drawing.again} was drawn with another {what} than "
                    f"{followed.file if what == 'ControlNet' else followed.image}, so this picture will differ: its "
                    f"digest was {was}."
                )
    return replace(drawing, given={**(drawing.given or {}), "controlnet": nets})


# ---- what a picture says of them


def told(drawing: Drawing) -> list[dict[str, Any]] | None:
    """Names without folders from a disk's root, digests, and numbers."""
    from ..image import model_name

    nets = (drawing.given or {}).get("controlnet", ())
    return [
        {
            "file": model_name(followed.file),
            "digest": net.hash,
            "image": Path(followed.image).name,
            "image_digest": digest_of(followed.image),
            "scale": followed.scale,
            "start": followed.start,
            "end": followed.end,
            "canny": followed.canny,
        }
        for net, followed in zip(nets, drawing.controlnet or (), strict=True)
    ] or None


def sound(text: Callable[[Any], bool], digest: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a setting is what `told` says; `text` and `digest` say that of its parts."""

    def number(least: float, most: float) -> Callable[[Any], bool]:
        return lambda value: type(value) in (int, float) and least <= value <= most

    def known(value: Any) -> bool:
        return value is None or digest(value)

    parts: dict[str, Callable[[Any], bool]] = {
        "file": text,
        "digest": known,
        "image": text,
        "image_digest": known,
        "scale": number(-1e6, 1e6),
        "start": number(0, 1),
        "end": number(0, 1),
        "canny": lambda value: isinstance(value, bool),
    }

    def entry(value: Any) -> bool:
        if not isinstance(value, dict) or not {"file", "image"} <= value.keys() <= parts.keys():
            return False
        return all(parts[name](part) for name, part in value.items())

    return lambda value: isinstance(value, list) and len(value) <= MOST and all(map(entry, value))

"""What a person gives as a picture or as a mask, turned upright, onto white, and to the size that is drawn."""

from __future__ import annotations

import os
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..image import MAX_SIDE, from_pil

Given = Image.Image | str | os.PathLike[str] | np.ndarray | Tensor
NEARLY = 5.01 / 255  # of black or white: what JPEG makes of a mask is meant to be black or white
MAX_PIXELS = 1 << 28  # of a file that is opened: 16384 x 16384


@dataclass(frozen=True)
class Pictures:
    """What a call draws from, checked.

    images    (n, 3, H, W) float32 in [-1, 1]
    mask      (n or 1, 1, H, W) float32: 1 is drawn anew, 0 stays, between is drawn anew in the last of the steps;
              None: everything is drawn anew
    which     for each image of the call, the picture it is drawn from
    strength  above 0, to 1: the share of the steps that are taken
    paste     whether the pixels where the mask is 0 are to be the picture's own
    """

    images: Tensor
    mask: Tensor | None
    which: tuple[int, ...]
    strength: float
    paste: bool

    def part(self, images: slice) -> Pictures:
        """For some images of the call."""
        return replace(self, which=self.which[images])

    def masks(self) -> Tensor:
        """(B, 1, H, W): the mask of each image of the call. Raises ValueError where there is none."""
        if self.mask is None:
            raise ValueError("there is no mask")
        return self.mask.expand(len(self.images), -1, -1, -1)[list(self.which)]


# ---- files and modes


def read_picture(given: Given, name: str = "image") -> Image.Image:
    """A picture, from a file if it is a path, turned as its EXIF orientation says. Raises ValueError."""
    if isinstance(given, (str, os.PathLike)):
        path = os.fspath(given)
        try:
            with Image.open(path) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise ValueError(f"{file.width} x {file.height} pixels are too many")
                given = file.copy()
        except Image.UnidentifiedImageError:
            raise ValueError(f"{name} {path} is no picture: give a PNG, a JPEG, or the like.") from None
        except Image.DecompressionBombError:
            raise ValueError(f"{name} {path} has too many pixels: give a smaller picture.") from None
        except (OSError, ValueError, SyntaxError) as error:
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise ValueError(f"{name} {path} cannot be read: {reason}.") from None
    if isinstance(given, np.ndarray):
        given = from_array(given, name)
    if not isinstance(given, Image.Image):
        raise ValueError(f"{name} must be a picture, or a path of one, not {reprlib.repr(given)}.")
    if not given.width or not given.height:
        raise ValueError(f"{name} has no pixels: it is {given.width} x {given.height}.")
    try:
        return ImageOps.exif_transpose(given)
    except OSError as error:  # of a file that is only read now
        raise ValueError(f"{name} cannot be read: {error}.") from None
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return given  # what its EXIF says of the orientation cannot be read


def from_array(pixels: np.ndarray, name: str) -> Image.Image:
    """NumPy's pixels, (H, W, 3), (H, W, 4) or (H, W), as a picture: bytes, or numbers from 0 to 1."""
    if (
        pixels.ndim not in (2, 3)
        or pixels.dtype.kind not in "uf"
        or (pixels.dtype.kind == "u" and pixels.itemsize > 1)
    ):
        raise ValueError(
            f"{name} as an array must be (H, W, 3) or (H, W) of uint8, not {pixels.dtype} {pixels.shape}."
        )
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
            raise ValueError(f"{name} as an array of floating-point numbers must have values from 0 to 1.")
        pixels = (pixels * 255).round().astype(np.uint8)
    try:
        return Image.fromarray(pixels)
    except (TypeError, ValueError):
        raise ValueError(f"{name} as an array must be (H, W, 3) or (H, W), not {pixels.shape}.") from None


def to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits as grey of 8; everything else as it is."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if image.mode == "I" and grey.max() <= 255:  # 8 bits, in numbers of 32
            return Image.fromarray(grey.clip(0).astype(np.uint8))
        return Image.fromarray((grey.clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point pixels, whose range nobody knows: convert it to 8 bits.")
    return image


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def on_white(image: Image.Image, name: str = "image") -> Image.Image:
    """Any mode as RGB of 8 bits; what is transparent, on white."""
    image = to_eight_bits(image, name)
    if has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def alpha_mask(image: Given, name: str = "image") -> Image.Image:
    """The mask of a picture's transparent pixels: they are to be drawn anew. Raises ValueError where it has none."""
    picture = read_picture(image, name)
    if not has_alpha(picture):
        raise ValueError(f"{name} has no transparency ({picture.mode}): give a mask of its own.")
    return ImageOps.invert(picture.convert("RGBA").getchannel("A"))


# ---- sizes


def fitted(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    """Enlarged or reduced, in its proportions, until it covers width x height, and what is over is cut on both sides.

    A picture that is larger by less than 8 pixels is only cut.
    """
    if not (0 <= image.width - width < 8 and 0 <= image.height - height < 8):
        scale = max(width / image.width, height / image.height)
        image = image.resize(
            (max(round(image.width * scale), width), max(round(image.height * scale), height)), resample
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def size_of(given: Any, factor: int) -> tuple[int, int]:
    """(width, height) that a picture is drawn at if no size is asked for: its own, cut to multiples of `factor`."""
    sizes = {size_of_one(one) for one in (given if isinstance(given, (list, tuple)) else [given])}
    if not sizes:
        raise ValueError("image is an empty list: give a picture, or leave it out.")
    if len(sizes) > 1:
        several = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)[:2])
        raise ValueError(
            f"The pictures have several sizes ({several}): give height and width, to which they are cut."
        )
    width, height = sizes.pop()
    return width // factor * factor, height // factor * factor


# ---- a call's arguments


def pictures_in(
    image: Given | Sequence[Given],
    mask_image: Given | Sequence[Given] | None,
    size: tuple[int, int],
    strength: float,
    paste: bool,
    counts: tuple[int, int],
    factor: int = 8,
) -> Pictures:
    """Check what a call is given.

    size: (width, height); counts: of images, and of those that share a prompt; factor: pixels along a latent's edge.
    """
    (width, height), (images, per_prompt) = size, counts
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise ValueError(f"strength must be a number above 0, to 1, not {strength!r}.")
    if strength == 0:
        raise ValueError("strength 0 leaves the picture as it is, so there is nothing to draw: give more, to 1.")
    tensors = as_tensors(image, "image", width, height)
    which = spread(len(tensors), images, per_prompt, "image")
    mask = None
    if mask_image is not None:
        mask = as_tensors(mask_image, "mask_image", width, height, like=image)
        if len(mask) not in (1, len(tensors)):
            raise ValueError(f"There are {len(mask)} masks for {len(tensors)} pictures: give one, or one for each.")
        mask = torch.where(mask >= 1 - NEARLY, 1.0, torch.where(mask <= NEARLY, 0.0, mask))
        if not (mask > 0).flatten(1).any(1).all():
            raise ValueError("mask_image is all black, so nothing would be drawn: what is white is drawn anew.")
        if not (mask[..., ::factor, ::factor] > 0).flatten(1).any(1).all():
            raise ValueError(
                f"The white of mask_image lies between the cells of {factor} x {factor} pixels that are drawn, so "
                "nothing would be: make it larger."
            )
    return Pictures(tensors, mask, which, float(strength), bool(paste))


def spread(given: int, images: int, per_prompt: int, name: str) -> tuple[int, ...]:
    """Which of the given pictures each image is drawn from."""
    if given == 1:
        return (0,) * images
    if given == images:
        return tuple(range(images))
    if given * per_prompt == images:
        return tuple(i // per_prompt for i in range(images))
    raise ValueError(f"{name} has {given} pictures for {images // per_prompt} prompts: give one, or one for each.")


def as_tensors(given: Any, name: str, width: int, height: int, like: Any = None) -> Tensor:
    """(n, 3, H, W) in [-1, 1] of pictures; (n, 1, H, W) in [0, 1] of masks, `like` being their pictures."""
    channels = 3 if like is None else 1
    if isinstance(given, Tensor):
        return checked_tensors(given, name, channels, width, height)
    if isinstance(given, (list, tuple)):
        if any(isinstance(one, (list, tuple)) for one in given):
            raise ValueError(f"{name} is a list of lists: give a list of pictures.")
        if not given:
            raise ValueError(f"{name} is an empty list: give a picture, or leave it out.")
        pictures = list(given)
        likes = list(like) if isinstance(like, (list, tuple)) else [like]
        parts = [as_tensors(p, name, width, height, likes[min(k, len(likes) - 1)]) for k, p in enumerate(pictures)]
        return torch.cat(parts)
    picture = read_picture(given, name)
    if like is None:
        return from_pil(fitted(on_white(picture, name), width, height, Image.Resampling.LANCZOS))
    own = size_of_one(like[0] if isinstance(like, (list, tuple)) else like)
    if picture.size != own:
        raise ValueError(
            f"mask_image is {picture.width} x {picture.height} and image {own[0]} x {own[1]} pixels: give a mask of "
            "the picture's size."
        )
    grey = fitted(on_white(picture, name).convert("L"), width, height, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(grey, dtype=np.float32) / 255)[None, None]


def size_of_one(picture: Given) -> tuple[int, int]:
    if isinstance(picture, Tensor):
        return (picture.shape[-1], picture.shape[-2]) if picture.ndim >= 2 else (0, 0)
    return read_picture(picture).size


def checked_tensors(given: Tensor, name: str, channels: int, width: int, height: int) -> Tensor:
    """Of an image or a mask: (n, C, H, W) in [0, 1], the image then in [-1, 1] as the VAE takes it."""
    given = float_tensors(given, name, channels, width, height)
    if not given.isfinite().all() or given.min() < 0 or given.max() > 1:
        raise ValueError(f"{name} as a tensor must have values from 0 to 1.")
    return 2 * given - 1 if channels == 3 else given


def float_tensors(given: Tensor, name: str, channels: int, width: int, height: int) -> Tensor:
    """Tensors are taken as they are: (n, C, H, W), of the size that is drawn; in float32 on the CPU."""
    usable = given.ndim == 4 and given.is_floating_point() and len(given)
    if not usable or given.shape[1:] != (channels, height, width):
        raise ValueError(
            f"{name} as a tensor must be floating-point, of shape (images, {channels}, {height}, {width}), not "
            f"{given.dtype} of {tuple(given.shape)}."
        )
    return given.detach().to("cpu", torch.float32)


def extend(
    image: Given, *, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """The picture on a larger canvas, and the mask of what is new: `sampler(prompt, image=canvas, mask_image=mask)`.

    In pixels. The picture's edge is drawn out into the border, which matters only where strength is below 1. The
    mask reaches 8 pixels into the picture, so that the seam can be drawn over. Raises ValueError.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    sides = {side: int(n) if isinstance(n, np.integer) else n for side, n in sides.items()}
    for side, pixels in sides.items():
        if isinstance(pixels, bool) or not isinstance(pixels, int) or not 0 <= pixels <= MAX_SIDE:
            raise ValueError(f"{side} must be a whole number of pixels from 0 to {MAX_SIDE}, not {pixels!r}.")
    if not any(sides.values()):
        raise ValueError("There is nothing to extend: give left, right, top or bottom.")
    picture = np.asarray(on_white(read_picture(image)))
    canvas = np.pad(picture, ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.full(canvas.shape[:2], 255, dtype=np.uint8)
    overlap = {side: min(8, pixels) for side, pixels in sides.items()}
    left, right, top, bottom = sides.values()
    height, width = picture.shape[:2]
    mask[
        top + overlap["top"] : top + height - overlap["bottom"],
        left + overlap["left"] : left + width - overlap["right"],
    ] = 0
    return Image.fromarray(canvas), Image.fromarray(mask)

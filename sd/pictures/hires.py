"""Drawn small, where a model draws well, then enlarged, and drawn once more from that: no second head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..image import MAX_SIDE

STRENGTH = 0.75  # of the second drawing, as is usual


def enlarged_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Width and height of the second drawing.

    Raises ValueError unless the scale is above 1, to 8, and where the picture would be too large.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1 < scale <= 8:
        raise ValueError(f"hires must be a number above 1, to 8, not {scale!r}.")
    result = int(width * scale) // 8 * 8, int(height * scale) // 8 * 8
    if max(result) > MAX_SIDE:
        raise ValueError(
            f"hires {scale:g} makes a picture of {result[0]} x {result[1]} pixels, and {MAX_SIDE} are the most along "
            "an edge: take a smaller number."
        )
    return result


def from_enlarged(images: Sequence[Image.Image], scale: float) -> dict[str, Any]:
    """The arguments of the second call, in place of those of the first: pictures of `scale` times the size.

    images: the first call's, one for each that is to be drawn. Raises ValueError as `enlarged_size` does.
    """
    width, height = enlarged_size(*images[0].size, scale)
    enlarged = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    return {"image": enlarged, "width": width, "height": height, "strength": STRENGTH, "mask_image": None}

"""Drawn small, where a model draws well, then enlarged, and drawn once more from that: no second head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

STRENGTH = 0.75  # of the second drawing, as is usual


def from_enlarged(images: Sequence[Image.Image], scale: float) -> dict[str, Any]:
    """The arguments of the second call, in place of those of the first: pictures of `scale` times the size.

    images: the first call's, one for each that is to be drawn. Raises ValueError for another scale than
    above 1, to 8.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1 < scale <= 8:
        raise ValueError(f"hires must be a number above 1, to 8, not {scale!r}.")
    width, height = (int(side * scale) // 8 * 8 for side in images[0].size)
    enlarged = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    return {"image": enlarged, "width": width, "height": height, "strength": STRENGTH, "mask_image": None}

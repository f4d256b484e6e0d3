"""The edges of a picture, for ControlNets that follow them: by OpenCV, which is installed only for this."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

from .given import Given, on_white, read_picture


def canny_edges(image: Given, low: float = 100, high: float = 200) -> Image.Image:
    """White edges on black, of the picture's size (Canny 1986).

    Edges begin where the brightness changes by more than `high`, and go on while it does by more than `low`; 100 and
    200 are what ControlNets were trained with. Raises ValueError where OpenCV is not installed.
    """
    if not 0 <= low <= high:
        raise ValueError(
            f"low and high must be numbers of at least 0, the first not above the second: {low}, {high}."
        )
    cv2: Any
    try:
        cv2 = import_module("cv2")
    except ImportError:
        raise ValueError(
            "Edges are found by OpenCV, which is not installed: pip install 'artificial-artist[canny]'."
        ) from None
    return Image.fromarray(cv2.Canny(np.asarray(on_white(read_picture(image))), low, high)).convert("RGB")

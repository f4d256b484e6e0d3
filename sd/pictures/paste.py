"""The picture itself where its mask is black: what passes through the VAE is never quite what it was."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .given import Pictures

SEAM = 4  # pixels inside the mask over which the one becomes the other


def pasted(images: Tensor, pictures: Pictures) -> Tensor:
    """images: (B, 3, H, W) in [0, 1], as they were drawn. The result has the picture's pixels where the mask is 0."""
    inside = (pictures.masks() > 0).float()
    share = inside.clone()
    for _ in range(SEAM - 1):
        inside = -F.max_pool2d(-inside, 3, 1, 1)  # without its outermost pixels
        share += inside
    share = (share / SEAM).to(images)
    originals = (pictures.images[list(pictures.which)] / 2 + 0.5).to(images)
    return torch.where(share > 0, torch.lerp(originals, images, share), originals)

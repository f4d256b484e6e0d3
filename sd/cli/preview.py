"""`--preview`: a rough picture of what is being drawn, beside the output.

Every so many steps it is written over, whole, so that a viewer which reads it again shows the drawing grow. When the
picture itself is written it is removed; where the drawing is stopped, or fails, it stays.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import StableDiffusion
    from .settings import Drawing


def preview_of(path: Path) -> Path:
    """The preview of a picture that is to be written there."""
    return path.with_name(f"{path.stem}-preview.png")


def check_previews(drawing: Drawing, paths: Sequence[Path]) -> None:
    """Raise ValueError where one cannot be written, or somebody's file has its name."""
    for path in paths if drawing.preview else ():
        check_output(preview_of(path), force=drawing.force)


SMALL = (
    10_000_000  # parameters of a VAE that is as quick as a step of its UNet; Stable Diffusion's own has 84 million
)


class Previews:
    """Those of a drawing. `paths`: where its pictures will be, in order.

    Latents become colours by the VAE that `--preview-vae` names, TAESD for example; else by the model's own, where
    that is small; else by a matrix, in no time. (For the built-in model no matrix will do: the best one is off by
    50 to 80 of 255. With lean it is a matrix all the same, which takes no memory.)
    """

    def __init__(self, drawing: Drawing, model: StableDiffusion, paths: Sequence[Path]):
        from ..adapt.other_vae import latent_of, with_vae
        from ..study.colours import latent_rgb

        self.every = drawing.preview or 0 if paths else 0  # of several ranks, one has paths
        self.paths = [preview_of(path) for path in paths]
        self.written: set[Path] = set()
        self.vae = None
        if self.every and drawing.preview_vae:
            self.vae = with_vae(model, drawing.preview_vae).vae
        elif self.every and drawing.variant != "lean" and sum(p.numel() for p in model.vae.parameters()) < SMALL:
            self.vae = model.vae
        self.rgb = latent_rgb(model) if self.every and self.vae is None else None
        self.scale = latent_of(model.vae).downsampling

    def show(self, step: Any, steps: int, first: int) -> None:
        """After a step of a drawing of so many; first: the number of the first of its pictures."""
        if not self.every or (step.index + 1) % self.every or step.index + 1 == steps:
            return
        from ..image import save_png, to_pil

        for path, image in zip(self.paths[first:], to_pil(self.colours(step.denoised)), strict=False):
            try:
                save_png(image, path, force=True)  # nobody had that name before the work began, or --force
                self.written.add(path)
            except OSError as error:
                warnings.warn(f"There will be no more previews: {error}")  # the picture is worth more
                self.every = 0

    def colours(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, H, W) in [0, 1]."""
        import torch

        from ..study.colours import to_rgb
        from ..weights.unread import computes_in

        if self.vae is None:
            assert self.rgb is not None
            small = to_rgb(latents.cpu(), self.rgb)
            return small.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)
        with torch.no_grad():
            decoded = [self.vae.decode(z.to(*computes_in(self.vae))) for z in latents.split(1)]
            return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)

    def remove(self, number: int) -> None:
        """When the picture itself is there."""
        path = self.paths[number] if number < len(self.paths) else None
        if path in self.written:
            assert path is not None
            with contextlib.suppress(OSError):
                path.unlink()

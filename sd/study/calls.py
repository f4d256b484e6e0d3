"""Which call of the UNet is under way, seen from outside: its step, its timestep, and what its rows stand for.

The instruments of `study.py` and `maps.py` need to know it, and samplers differ in it: guidance is a batch of two
halves (the negative one first, as in ldm), or two calls in turn (`LeanSampler` in little memory), or is not there.
`Calls` tells which by what goes in: in a guidance batch both halves have the same x; of two calls in turn, both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model import StableDiffusion

Encoded = list[tuple[list[str], Tensor]]  # texts, and their embeddings (texts, 77, C)
KEPT = 16  # of these: somebody may encode texts all day long within one watch


def same(row: Tensor, other: Tensor) -> bool:
    """Whether an embedding is that of a context, which may have gone to another device or dtype."""
    return row.shape == other.shape and torch.equal(row.to(other), other)


def model_of(model: Any) -> StableDiffusion:
    """The model itself, or that of a sampler."""
    model = getattr(model, "model", model)
    if not isinstance(model, StableDiffusion):
        raise ValueError(f"An instrument looks at a model or a sampler, as sd.load gives it, not at {model!r}.")
    return model


class Calls:
    """What is known about the UNet's calls while `watch` is on.

    run         how many samplings have begun; instruments begin anew when it changes
    inside      whether the UNet is being called now; what follows is of this call, or else of the last
    step        of this run, from 0; timestep: what the UNet was told
    images      how many pictures are being drawn
    half        what the rows of this call are: "both" halves of guidance, "cond" (the prompt's) or "uncond"
    prompts     one text a picture; None where embeddings were passed. May be set
    size        height and width of the latents
    """

    def __init__(self, model: StableDiffusion):
        self.model = model
        self.run, self.step, self.images, self.half = 0, -1, 0, "cond"
        self.timestep = float("nan")
        self.inside = False
        self.prompts: list[str] | None = None
        self.size = (0, 0)
        self._encoded: Encoded = []  # texts and embeddings that no sampling has begun with
        self._mode = ""  # of this run: "batch", "turns", "plain"
        self._x: Tensor | None = None

    @contextmanager
    def watch(self) -> Iterator[Calls]:
        text, encode = self.model.text, self.model.text.encode

        def encode_and_note(prompts: Any) -> Tensor:
            result = encode(prompts)
            self._encoded.append(([prompts] if isinstance(prompts, str) else list(prompts), result))
            del self._encoded[:-KEPT]
            return result

        before = text.__dict__.get("encode")  # another instrument's
        text.__dict__["encode"] = encode_and_note
        handles = [
            self.model.unet.register_forward_pre_hook(self._note, with_kwargs=True),
            self.model.unet.register_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield self
        finally:
            self.inside = False
            for handle in handles:
                handle.remove()
            text.__dict__.pop("encode")
            if before is not None:
                text.__dict__["encode"] = before

    def cond(self, rows: int) -> slice:
        """Of a batch of `rows` in this call, those that are told what to draw."""
        return slice(0, 0) if self.half == "uncond" else slice(max(rows - self.images, 0), rows)

    def uncond(self, rows: int) -> slice:
        """Those that are told the negative prompt: all that are not `cond`."""
        return slice(0, rows if self.half == "uncond" else max(rows - self.images, 0))

    def shared(self, rows: int) -> bool:
        """Whether so few rows stand for both halves of guidance: `sd.fast` computes once what they have in common."""
        return self.half == "both" and rows < 2 * self.images

    def _leave(self, unet: nn.Module, args: Any, out: Any) -> None:
        self.inside = False

    def _note(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("x", "t", "context"), args, strict=False)) | kwargs
        x, t, context = given["x"], float(given["t"].flatten()[0]), given["context"]
        self.inside = True
        again = self._x is not None and t == self.timestep and torch.equal(x, self._x)
        told = self._told(context)
        known = self._x is not None and x.shape == self._x.shape and t <= self.timestep and not told
        if not known:
            self.run, self.step = self.run + 1, -1
            self._mode = self._guess(x, context, told)
        elif self.step == 0 and self._mode == "plain" and again and self.half == "cond":
            # What looked like a call without guidance was the first of two in turn: begin again with the second.
            self.run, self._mode, self.half = self.run + 1, "turns", "uncond"
        elif self._mode == "turns" and self.half == "uncond" and not again:
            self.run, self.step, self._mode = self.run + 1, -1, "plain"  # and the other way round
        if self._mode == "turns" and known and self.half == "uncond":
            self.half = "cond"
        else:
            self.step += 1
            self.half = {"batch": "both", "turns": "uncond", "plain": "cond"}[self._mode]
        rows = max(len(x), len(context)) if context.ndim == 3 else len(x)
        self.images = rows // 2 if self._mode == "batch" else rows
        self._x, self.timestep, self.size = x.clone(), t, (x.shape[-2], x.shape[-1])
        if not known:
            self.prompts = self._texts(context, told)
            self._encoded = []

    def _told(self, context: Tensor) -> Encoded:
        """What has been encoded and is used in this call: a text encoded for something else begins no sampling."""
        if context.ndim != 3:  # `LeanSampler` has used the embeddings already
            return list(self._encoded)
        return [(texts, rows) for texts, rows in self._encoded if any(same(row, r) for row in rows for r in context)]

    def _guess(self, x: Tensor, context: Tensor, told: Encoded) -> str:
        if context.ndim == 3 and len(context) == 2 * len(x):
            return "batch"
        if len(x) % 2 == 0 and torch.equal(*x.chunk(2)):
            # The same noise for several prompts, without guidance, looks like that too.
            alone = len(told) == 1 and self._texts(context, told, len(x)) is not None
            return "plain" if alone else "batch"
        return "turns" if len(told) > 1 else "plain"

    def _texts(self, context: Tensor, told: Encoded, images: int | None = None) -> list[str] | None:
        """The prompts of the last `images` rows, known by their embeddings, or else by the order of encoding."""
        if not told:
            return None
        images = self.images if images is None else images
        if context.ndim != 3:  # `LeanSampler` has used the embeddings already: the prompts' came first
            texts = told[0][0]
            return [texts[i * len(texts) // images] for i in range(images)] if images % len(texts) == 0 else None
        pairs = [(text, row) for texts, rows in told for text, row in zip(texts, rows, strict=True)]
        found = [next((text for text, row in pairs if same(row, r)), None) for r in context[-images:]]
        return [text for text in found if text is not None] if None not in found else None

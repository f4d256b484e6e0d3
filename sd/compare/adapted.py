"""What a LoRA changes in a model, block by block: `artist compare MODEL --lora FILE`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..adapt.adapters import Scale, lora
from ..model import StableDiffusion
from ..weights.unread import read_weights
from .comparison import PROMPT, make_inputs, unet_blocks
from .measure import Row, compare_blocks, pair
from .report import Report


@torch.no_grad()
def compare_lora(
    model: StableDiffusion,
    loras: Sequence[tuple[str | os.PathLike[str], Scale]],
    *,
    size: int | None = None,
    prompt: str = PROMPT,
) -> Report:
    """A model without (A) and with (B) LoRAs: rows for the text encoder, each block of the UNet, and the whole UNet.

    loras   files, and how much is added of each; all of them together are B

    A row says how far B's output is from A's on the same inputs, and in its note how many tensors of the block
    differ, and by how much: the norm of what is added to them all, relative to their own. Raises as `sd.lora` does.
    """
    adapted = model
    for path, scale in loras:
        adapted = lora(adapted, path, scale)
    parts = {"text": (model.text.model, adapted.text.model), "unet": (model.unet, adapted.unet)}
    for part in (part for both in parts.values() for part in both):
        read_weights(part)
    names = " and ".join(f"{adapter.name} at {adapter.scale}" for adapter in adapted.adapters)
    report = Report(f"{model.name}, without (A) and with (B) {names}", ("A", "B"))
    report.notes = [line for adapter in adapted.adapters for line in str(adapter).split("\n")]
    texts, inputs = ["", prompt], make_inputs(model, size)

    def row_of(name: str, b: Callable[[], Tensor], a: Callable[[], Tensor], part: str) -> Row:
        return with_weights(pair(name, b, a, math.inf, 0)[0], *parts[part])

    encode = partial(adapted.encode_prompt, texts), partial(model.encode_prompt, texts)
    report.rows.append(row_of("text", *encode, "text"))
    arguments = inputs.latents, inputs.timesteps, model.encode_prompt(texts)
    blocks, theirs = unet_blocks(model.unet), unet_blocks(adapted.unet)
    for row in compare_blocks("unet", blocks, theirs, partial(model.unet, *arguments), math.inf, 0):
        name = row.name.removeprefix("unet.")
        report.rows.append(with_weights(row, blocks[name], theirs[name]))
    whole = partial(adapted.unet, *arguments), partial(model.unet, *arguments)
    report.rows.append(row_of("unet (whole)", *whole, "unet"))
    return report


def with_weights(row: Row, before: nn.Module, after: nn.Module) -> Row:
    """A row whose note says by how much the weights of a block differ."""
    changed, added, whole = 0, 0.0, 0.0
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    for a, b in pairs:
        whole += float(a.double().norm()) ** 2
        if a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
            changed += 1
            added += float((b.double() - a.double()).norm()) ** 2
    share = math.sqrt(added / whole) if whole else 0.0
    note = f"{changed} of {len(pairs)} tensors, by {share:.1e}" if changed else "no weights changed"
    return replace(row, note=note)

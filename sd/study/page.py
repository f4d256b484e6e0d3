"""`artist study`: one drawing as one self-contained page, for a browser without network or server.

What the page shows is collected here, in one sampling, and put as JSON into `page.html`, which draws it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..files import check_output, write_text
from ..image import to_pil
from ..scheduler import Scheduler
from .calls import Now, listen, model_of, rows_of
from .colours import to_rgb
from .description import describe
from .maps import AttentionMaps, attention_maps
from .traces import Trace, trace

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 32  # maps and activations are averaged to at most this many cells along an edge
BUDGET = 15_000_000  # bytes of a page: where every step would take more, every second is shown, or fewer
MARGIN = 500_000  # of these, for what does not grow with the steps that are shown, but for the picture
CHANNELS = 4  # of each block's activation: those that differ most from place to place
CHEAP = 50e9  # FLOPs of a VAE that may decode every step


def study_page(
    sampler: Any, prompt: str, *, progress: Callable[..., Any] | None = None, **call: Any
) -> tuple[str, Trace]:
    """Draw one picture, and return the page about it, HTML, and the trace.

    The page takes at most 15 MB, whatever the number of steps, as long as one step and the picture fit: where not
    every step does, it shows every second, third, ... to the last; its charts have all of them.

    Arguments are the sampler's; progress as for `trace`. Raises ValueError as the sampler does, and where more than
    one picture is asked for.
    """
    if not isinstance(prompt, str) or call.get("num_images_per_prompt", 1) != 1:
        raise ValueError("A page shows one picture of one prompt: give a text, and num_images_per_prompt=1.")
    model = model_of(sampler)
    with attention_maps(model, heads=False, steps=True, cells=SIDE) as maps, _activations(model) as seen:
        record = trace(sampler, prompt, progress=progress, **call)
    latents = record.latents.to(model.device)
    if call.get("mask_image") is None:
        (picture,) = sampler.decode(latents)
    else:  # pixels outside of the mask are put back
        (picture,) = sampler.finish(latents, sampler.request(prompt, **call))
    height, width = record.settings["height"], record.settings["width"]
    parts = describe(model, height=height, width=width)
    uri = _uri(picture)
    steps = _steps(
        sampler,
        record,
        exact=parts.whole("VAE decoder").flops < CHEAP,
        others=_map_bytes(maps, model) + sum(map(_frame_bytes, seen.values())),
        budget=BUDGET - MARGIN - len(uri),
    )
    shown = [step["index"] for step in steps]
    variant = type(sampler).__name__.removesuffix("Sampler").lower()
    data = {
        "prompt": prompt,
        "settings": record.settings | {"variant": variant},
        "size": [height, width],
        "picture": uri,
        "times": record.timesteps.tolist(),
        "steps": steps,
        "norms": {kind: [round(x, 5) for x in v[:, 0].tolist()] for kind, v in record.norms.items()},
        "angle": None if record.angle is None else [round(x, 4) for x in record.angle[:, 0].tolist()],
        "schedule": _schedule(sampler, call),
        "maps": _maps(maps, model, shown),
        "blocks": [
            {
                "name": b.name,
                "kind": b.kind,
                "shape": b.shape[1:] if b.shape else [],
                "parameters": b.parameters,
                "flops": b.flops,
            }
            | _activation(seen.get(b.name, {}), shown)
            for b in parts.table("UNet")
        ],
    }
    text = (
        json.dumps(_nulls(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        .replace("</", "<\\/")
        .replace("<!--", "<\\u0021--")
    )
    head, rest = TEMPLATE.read_text(encoding="utf-8").split("{{title}}")  # apart first: a prompt may have such marks
    middle, foot = rest.split("{{data}}")
    return head + html.escape(prompt or "study") + middle + text + foot, record


def _nulls(data: Any) -> Any:
    """The same, with null for numbers that JSON has not: infinity and NaN."""
    if isinstance(data, dict):
        return {key: _nulls(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_nulls(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_page(page: str, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a page, whole or not at all. Raises ValueError where the file exists, unless `force`, and OSError."""
    check_output(path, force=force)
    write_text(path, page, force=force)


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _packed(values: Tensor) -> str:
    """Numbers from 0 to 1 as bytes, in base64."""
    array = (values.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous().numpy()
    return base64.b64encode(array.tobytes()).decode()


def _steps(sampler: Any, record: Trace, exact: bool, others: float, budget: float) -> list[dict[str, Any]]:
    """The pictures of the steps that are shown: x0 by the VAE where that is cheap; the others by the matrix.

    As many steps as fit into `budget` bytes, evenly to the last; `others` is what a step takes beside its pictures.
    """

    def rough(latents: Tensor, scaled: bool) -> str:
        rgb = record.rgb.clone()
        if scaled:  # noise is stronger, in what the matrix is made for, than a picture
            rgb[:-1] *= 0.2 / torch.einsum("chw,cr->rhw", latents.float(), rgb[:-1]).std().clamp(min=1e-9)
            rgb[-1] = 0.5
        return _uri(to_pil(to_rgb(latents[None], rgb))[0])

    def clean(x0: Tensor) -> str:
        try:
            return _uri(sampler.decode(x0[None].to(sampler.model.device))[0]) if exact else rough(x0, False)
        except ValueError:  # a preview that the VAE cannot take
            return rough(x0, False)

    known: dict[int, dict[str, Any]] = {}

    def taken(step: int) -> float:
        if step not in known:
            known[step] = {
                "index": step,
                "t": record.timesteps[step].item(),
                "x": rough(record.x[step, 0], True),
                "noise": rough(record.noise[step, 0], True),
                "x0": clean(record.x0[step, 0]),
            }
        return others + sum(len(known[step][kind]) for kind in ("x", "noise", "x0"))

    count = len(record.timesteps)
    largest = max(map(taken, {0, count // 2, count - 1}))  # first by three of them; pictures differ in size
    stride = max(1, math.ceil(largest * count / max(budget, 1)))
    while stride < count and sum(map(taken, _shown(count, stride))) > budget:
        stride += 1
    shown = _shown(count, stride)
    for step in shown:
        taken(step)
    return [known[step] for step in shown]


def _shown(count: int, stride: int) -> list[int]:
    return list(range(count - 1, -1, -stride))[::-1]


def _schedule(sampler: Any, call: dict[str, Any]) -> dict[str, list[float]]:
    """How much of x_t is signal, and how much noise, at 101 of the 1000 timesteps."""
    scheduler = call.get("scheduler")
    abar = (
        scheduler.schedule if isinstance(scheduler, Scheduler) else model_of(sampler).defaults.schedule
    ).alphas_cumprod.double()
    t = torch.linspace(0, len(abar) - 1, 101).round().long()
    signal, noise = abar[t].sqrt().tolist(), (1 - abar[t]).sqrt().tolist()
    return {"t": t.tolist(), "signal": [round(x, 4) for x in signal], "noise": [round(x, 4) for x in noise]}


# ---- which word acts where


def _words(maps: AttentionMaps, model: Any) -> list[dict[str, Any]]:
    """The words of the prompt, and what stands around it, with the positions of their tokens."""
    assert maps.prompts is not None
    words: list[dict[str, Any]] = [{"text": text, "tokens": tokens} for text, tokens in maps.words()]
    length = model.text.config.max_position_embeddings
    keys = maps.probabilities(maps.layers[0]).shape[-1]
    starts = list(range(0, keys, length))
    taken = {*starts, *(place for word in words for place in word["tokens"])}
    ends = [place for place in range(keys) if place not in taken]
    return [*words, {"text": "start", "tokens": starts}, {"text": "end", "tokens": ends}]


def _map_bytes(maps: AttentionMaps, model: Any) -> float:
    """What the maps of one step take in the page: a byte a value, in base64."""
    return 4 / 3 * len(_words(maps, model)) * sum(math.prod(maps.grid(layer)) for layer in maps.layers)


def _maps(maps: AttentionMaps, model: Any, steps: list[int]) -> dict[str, Any]:
    """Each layer's map of each word at these steps, as bytes, with the largest value of each word in each layer."""
    words = _words(maps, model)
    layers = []
    for layer in maps.layers:
        frames = []
        for step in steps:
            rows = maps.probabilities(layer, step=step)[0].float()  # (places, tokens)
            each = torch.stack([rows[:, w["tokens"]].sum(-1) for w in words])
            frames.append(each.view(len(words), *maps.grid(layer)))
        every = torch.stack(frames)  # (steps, words, h, w)
        top = every.amax((0, 2, 3)).clamp(min=1e-12)
        layers.append(
            {
                "name": layer.removesuffix(".attn2"),
                "grid": maps.grid(layer),
                "max": [float(f"{x:.4g}") for x in top.tolist()],
                "data": _packed(every / top[:, None, None]),
            }
        )
    return {"words": words, "steps": steps, "layers": layers}


def _fit(h: int, w: int) -> tuple[int, int]:
    """A grid averaged to at most SIDE cells along an edge."""
    f = -(-max(h, w) // SIDE)
    return -(-h // f), -(-w // f)


# ---- what each block returns


@contextmanager
def _activations(model: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """Within the block, note what each block of the UNet returns for the prompt, and how long it takes."""
    found: dict[str, dict[str, Any]] = {}
    frames: dict[str, list[Tensor]] = {}
    chosen: dict[str, Tensor] = {}
    began: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    blocks = {"middle_block": model.unet.middle_block, "time_embed": model.unet.time_embed, "out": model.unet.out}
    for side in ("input_blocks", "output_blocks"):
        blocks |= {f"{side}.{i}": block for i, block in enumerate(getattr(model.unet, side))}

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter()

    def note(heard: Now, name: str, out: Tensor) -> None:
        seconds.setdefault(name, []).append(now() - began.pop(name))
        call = heard()
        rows = out[rows_of(call, len(out))[0]] if call else out
        if out.ndim != 4 or not len(rows):
            return
        values = rows[0].float()  # (C, h, w)
        if name not in chosen:
            chosen[name] = values.flatten(1).std(1).topk(min(CHANNELS, len(values))).indices
        shown = torch.cat([values.square().mean(0, keepdim=True).sqrt(), values[chosen[name]]])
        frames.setdefault(name, []).append(F.adaptive_avg_pool2d(shown, _fit(*shown.shape[1:])).cpu())

    with listen(model) as heard, ExitStack() as stack:
        for name, block in blocks.items():
            before = block.register_forward_pre_hook(lambda m, a, name=name: began.update({name: now()}))
            after = block.register_forward_hook(lambda m, a, out, name=name: note(heard, name, out))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield found
    for name, times in seconds.items():
        found[name] = {"ms": round(1000 * sorted(times)[len(times) // 2], 3)}
    for name, kept in frames.items():
        found[name] |= {"channels": chosen[name].tolist(), "frames": kept}


def _frame_bytes(found: dict[str, Any]) -> float:
    """What one step of a block's activation takes in the page: a byte a value, in base64, and low and high."""
    return 4 / 3 * found["frames"][0].numel() + 40 * (1 + CHANNELS) if "frames" in found else 0


def _activation(found: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """A block's part of the page: the time it takes, and what it returns at these steps, as bytes."""
    if "frames" not in found:
        return found
    every = torch.stack([found["frames"][step] for step in steps])  # (steps, 1 + channels, h, w)
    low, high = every.amin((2, 3), keepdim=True), every.amax((2, 3), keepdim=True)
    return {
        "ms": found["ms"],
        "channels": found["channels"],
        "grid": list(every.shape[2:]),
        "low": [[float(f"{x:.4g}") for x in row] for row in low.flatten(1).tolist()],
        "high": [[float(f"{x:.4g}") for x in row] for row in high.flatten(1).tolist()],
        "data": _packed((every - low) / (high - low).clamp(min=1e-12)),
    }

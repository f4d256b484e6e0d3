"""`artist study`: one drawing as one self-contained page, for a browser without network or server.

What the page shows is collected here, in one sampling, and put as JSON into `page.html`, which draws it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import __version__
from .calls import Calls, model_of, token_ids
from .describe import describe
from .image import to_pil
from .maps import AttentionMaps, attention_maps
from .study import Trace, to_rgb, trace

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 32  # maps and activations are averaged to at most this many cells along an edge
BUDGET = 5_000_000  # bytes of attention maps: with more steps or words, every second step is kept, or fewer
CHANNELS = 4  # of each block's activation: those that differ most from place to place
CHEAP = 50e9  # FLOPs of a VAE that may decode every step


def study_page(sampler: Any, prompt: str, **call: Any) -> tuple[str, Trace]:
    """Draw one picture, and return the page about it, HTML of 1 to 12 MB, and the trace.

    Arguments are the sampler's. Raises ValueError as it does, and where more than one picture is asked for.
    """
    if not isinstance(prompt, str) or call.get("num_images_per_prompt", 1) != 1:
        raise ValueError("A page shows one picture of one prompt: give a text, and num_images_per_prompt=1.")
    model = model_of(sampler)
    with attention_maps(model, heads=False, steps=True) as maps, _activations(model) as seen:
        record = trace(sampler, prompt, **call)
    (picture,) = sampler.decode(record.latents.to(model.device))
    height, width = record.settings["height"], record.settings["width"]
    parts = describe(model, height=height, width=width)
    data = {
        "prompt": prompt,
        "settings": record.settings | {"version": __version__, "dtype": str(model.dtype).removeprefix("torch.")},
        "size": [height, width],
        "picture": _uri(picture),
        "steps": _steps(sampler, record, exact=parts.whole("VAE decoder").flops < CHEAP),
        "norms": {kind: [round(x, 5) for x in v[:, 0].tolist()] for kind, v in record.norms.items()},
        "angle": None if record.angle is None else [round(x, 4) for x in record.angle[:, 0].tolist()],
        "schedule": _schedule(sampler, call),
        "maps": _maps(maps, model),
        "blocks": [
            {
                "name": b.name,
                "kind": b.kind,
                "shape": b.shape[1:] if b.shape else [],
                "parameters": b.parameters,
                "flops": b.flops,
            }
            | seen.get(b.name, {})
            for b in parts.table("UNet")
        ],
    }
    text = (
        json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        .replace("</", "<\\/")
        .replace("<!--", "<\\u0021--")
    )
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(prompt or "study")).replace("{{data}}", text), record


def refuse_existing(paths: Iterable[Path], force: bool) -> None:
    """Raise ValueError for a file that is there already, unless `force`, and for a folder that is not."""
    for path in paths:
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it first.")
        if path.is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder; name a file.")
        if path.exists() and not force:
            raise ValueError(f"{path} exists: choose another name, or write over it with --force.")


def write_page(page: str, path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Write a page, whole or not at all. Raises ValueError where the file exists, unless `force`, and OSError."""
    path = Path(path)
    refuse_existing([path], force)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _packed(values: Tensor) -> str:
    """Numbers from 0 to 1 as bytes, in base64."""
    array = (values.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous().numpy()
    return base64.b64encode(array.tobytes()).decode()


def _steps(sampler: Any, record: Trace, exact: bool) -> list[dict[str, Any]]:
    """The pictures of each step: x0 by the VAE where that is cheap, else by the matrix, and x and noise by that."""

    def rough(latents: Tensor, scaled: bool) -> str:
        rgb = record.rgb.clone()
        if scaled:  # noise is stronger, in what the matrix is made for, than a picture
            rgb[:-1] *= 0.2 / torch.einsum("chw,cr->rhw", latents.float(), rgb[:-1]).std().clamp(min=1e-9)
            rgb[-1] = 0.5
        return _uri(to_pil(to_rgb(latents[None], rgb))[0])

    clean = []
    for x0 in record.x0[:, 0]:
        try:
            clean.append(_uri(sampler.decode(x0[None].to(sampler.model.device))[0]) if exact else rough(x0, False))
        except ValueError:  # a preview that the VAE cannot take
            clean.append(rough(x0, False))
    return [
        {"t": t, "x": rough(x, True), "noise": rough(noise, True), "x0": x0}
        for t, x, noise, x0 in zip(record.timesteps.tolist(), record.x[:, 0], record.noise[:, 0], clean, strict=True)
    ]


def _schedule(sampler: Any, call: dict[str, Any]) -> dict[str, list[float]]:
    """How much of x_t is signal, and how much noise, at 101 of the 1000 timesteps."""
    from .scheduler import V1, Scheduler

    scheduler = call.get("scheduler")
    abar = (scheduler.schedule if isinstance(scheduler, Scheduler) else V1).alphas_cumprod.double()
    t = torch.linspace(0, len(abar) - 1, 101).round().long()
    signal, noise = abar[t].sqrt().tolist(), (1 - abar[t]).sqrt().tolist()
    return {"t": t.tolist(), "signal": [round(x, 4) for x in signal], "noise": [round(x, 4) for x in noise]}


# ---- which word acts where


def _maps(maps: AttentionMaps, model: Any) -> dict[str, Any]:
    """Each layer's map of each word at each step, as bytes, with the largest value of each word in each layer."""
    assert maps.prompts is not None
    ids = token_ids(model.text, maps.prompts[0])
    end = len(ids) - 1
    words: list[dict[str, Any]] = [{"text": text, "tokens": tokens} for text, tokens in maps.words()]
    words += [{"text": "start", "tokens": [0]}, {"text": "end", "tokens": list(range(end, 77))}]
    sizes = {layer: _fit(*maps.grid(layer)) for layer in maps.layers}
    cells = len(words) * sum(h * w for h, w in sizes.values())
    count = len(maps._sums[maps.layers[0]])
    stride = max(1, -(-cells * count // BUDGET))
    steps = list(range(count - 1, -1, -stride))[::-1]
    layers = []
    for layer, size in sizes.items():
        frames = []
        for step in steps:
            rows = maps.probabilities(layer, step=step)[0].float()  # (queries, 77)
            each = torch.stack([rows[:, w["tokens"]].sum(-1) for w in words]).view(len(words), 1, *maps.grid(layer))
            frames.append(F.adaptive_avg_pool2d(each, size)[:, 0])
        every = torch.stack(frames)  # (steps, words, h, w)
        top = every.amax((0, 2, 3)).clamp(min=1e-12)
        layers.append(
            {
                "name": layer.removesuffix(".attn2"),
                "grid": size,
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
    calls = Calls(model)
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

    def note(name: str, out: Tensor) -> None:
        seconds.setdefault(name, []).append(now() - began.pop(name))
        rows = out[calls.cond(len(out))]
        if out.ndim != 4 or not len(rows):
            return
        values = rows[0].float()  # (C, h, w)
        if name not in chosen:
            chosen[name] = values.flatten(1).std(1).topk(min(CHANNELS, len(values))).indices
        shown = torch.cat([values.square().mean(0, keepdim=True).sqrt(), values[chosen[name]]])
        frames.setdefault(name, []).append(F.adaptive_avg_pool2d(shown, _fit(*shown.shape[1:])).cpu())

    handles = []
    for name, block in blocks.items():
        handles.append(block.register_forward_pre_hook(lambda m, a, name=name: began.update({name: now()})))
        handles.append(block.register_forward_hook(lambda m, a, out, name=name: note(name, out)))
    try:
        with calls.watch():
            yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, times in seconds.items():
        found[name] = {"ms": round(1000 * sorted(times)[len(times) // 2], 3)}
    for name, kept in frames.items():
        every = torch.stack(kept)  # (steps, 1 + channels, h, w)
        low, high = every.amin((2, 3), keepdim=True), every.amax((2, 3), keepdim=True)
        found[name] |= {
            "grid": list(every.shape[2:]),
            "channels": chosen[name].tolist(),
            "low": [[float(f"{x:.4g}") for x in row] for row in low.flatten(1).tolist()],
            "high": [[float(f"{x:.4g}") for x in row] for row in high.flatten(1).tolist()],
            "data": _packed((every - low) / (high - low).clamp(min=1e-12)),
        }

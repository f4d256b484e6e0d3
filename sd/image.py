"""Tensors to pictures and back; what is written into a PNG: how it was drawn, enough to draw it again."""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from pathlib import Path, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files import from_root, parse_json, reason_of, writing

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SIDE = 8192  # pixels along an edge; far beyond what the v1 models draw well
JSON_CHUNK = "sd"  # the PNG text chunk that `artist --again` reads
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT, CHUNKS = 1 << 20, 1 << 16  # bytes of a text, and chunks of a file, that are read at most


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> B pictures of 8 bits, rounded as diffusers does (CompVis truncates)."""
    array = images.detach().cpu().permute(0, 2, 3, 1).float().numpy()  # (B, H, W, 3)
    return [Image.fromarray(a) for a in (array * 255).round().astype(np.uint8)]


def from_pil(image: Image.Image) -> Tensor:
    """A picture -> (1, 3, H, W) in [-1, 1], what `VAE.encode` takes; to the last bit as diffusers computes it.

    Channels lie last in memory, as in diffusers: convolutions round otherwise in another layout.
    """
    array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(2 * array - 1)[None].permute(0, 3, 1, 2)


def model_name(model: str) -> str:
    """A model's name as it may be published: of a path from the root of a disk, the last part alone."""
    return PureWindowsPath(model).name if from_root(model) else model


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The text chunk `parameters` in the form of AUTOMATIC1111, which most tools and sites read.

    Names, order and values of the fields are those of create_infotext in its modules/processing.py (version 1.10).

    settings: prompt, negative_prompt, num_inference_steps, scheduler, guidance_scale, seed, width, height,
    model, model_hash.
    """
    model = model_name(str(settings["model"]))
    sampler, schedule = sampler_name(settings["scheduler"])
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings["model_hash"],
        "Model": Path(model).stem if model.endswith(("ckpt", "safetensors")) else model,
        "VAE hash": settings.get("vae_hash") if settings.get("vae") else None,
        "VAE": PureWindowsPath(settings["vae"]).name if settings.get("vae") else None,
        "Denoising strength": settings.get("hires_strength") or settings.get("strength"),
        "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,  # as they count
        "RNG": "NV" if settings.get("rng") == "cuda" else "CPU",  # without it they would take a GPU's
        "Hires upscale": settings.get("hires"),
        "Hires upscaler": "Lanczos" if settings.get("hires") else None,
        "Eta DDIM": settings.get("eta") or None,
        "TI hashes": ", ".join(words_used(settings)) or None,
    }
    loras = [(Path(entry["file"]).stem, entry) for entry in settings.get("lora") or ()]
    if loras:  # as their prompts name them
        known = [(re.sub("[:,]", "", name), entry["hash"]) for name, entry in loras if entry.get("hash")]
        fields["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in known)
    tags = [f"<lora:{name}:{lora_scale(entry['scale'])}>" for name, entry in loras]
    lines = [" ".join([settings["prompt"], *tags])]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{k}: {quoted(v)}" for k, v in fields.items() if v is not None)]).strip()


def lora_scale(scale: float | Mapping[str, float]) -> str:
    """As AUTOMATIC1111 writes it: of both parts, or of the text encoder and of the UNet."""
    return f"{scale['text']:g}:{scale['unet']:g}" if isinstance(scale, dict) else f"{scale:g}"


def words_used(settings: Mapping[str, Any]) -> list[str]:
    """Of each embedding the name of its file, which is a word in AUTOMATIC1111, and its digest."""
    pairs = zip(settings.get("embedding") or (), settings.get("embedding_digest") or (), strict=False)
    return [f"{PureWindowsPath(file).stem}: {digest}" for file, digest in pairs if digest]


SAMPLERS = {  # AUTOMATIC1111's names
    "pndm": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2_a": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
}
WITHOUT_SIGMAS = ("ddim", "ddpm", "lcm", "pndm", "unipc")  # there, no schedule type is chosen for these


def sampler_name(scheduler: str) -> tuple[str, str]:
    """A scheduler by AUTOMATIC1111's name, and its schedule type: "DPM++ 2M", "Karras" for dpmpp_2m_karras.

    "Automatic" would be Karras' sigmas for some of them.
    """
    solver, _, spacing = scheduler.rpartition("_")
    if spacing not in ("karras", "exponential", "beta"):
        solver, spacing = scheduler, "automatic" if scheduler in WITHOUT_SIGMAS else "uniform"
    return SAMPLERS.get(solver, solver.upper()), spacing.capitalize()


def quoted(value: Any) -> str:
    """A value of `parameters`: in quotation marks where else it could not be told from the next field."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # 7, not 7.0, as in their fields
    text = str(value)  # the rule is that of `quote` in AUTOMATIC1111's modules/infotext_utils.py, and of `unquote`
    ends = text.startswith('"') and text.endswith('"')
    return json.dumps(text, ensure_ascii=False) if ends or any(c in text for c in ",:\n") else text


def save_png(
    image: Image.Image,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """Write a PNG with `settings` in its text chunks, whole or not at all.

    Raises FileExistsError where `path` exists, unless `force`; OSError where it cannot be written.
    """
    info = PngInfo()
    if settings is not None:
        settings = {**settings, "model": model_name(str(settings["model"]))}
        text = parameters_text(settings).encode(errors="replace").decode().replace("\0", "")
        info.add_text("parameters", text)  # tEXt where Latin-1 has all its letters, which everybody reads, else iTXt
        info.add_itxt(JSON_CHUNK, json.dumps(settings))
    with writing(path, force=force) as file:
        image.save(file, "PNG", pnginfo=info)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that `save_png` wrote, from a file that may come from anywhere. Raises ValueError.

    Only the text chunk is read, within bounds, and never the picture: a small file can hold a huge one.
    """
    text = read_text(path, JSON_CHUNK)
    if text is None:
        raise ValueError(
            f"{path} does not say how it was drawn: it has no text chunk {JSON_CHUNK!r}; `artist` writes one."
        )
    try:
        settings = parse_json(text)
        if not isinstance(settings, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} cannot be drawn again: the text that says how is damaged ({error}).") from None
    return settings


def read_text(path: str | os.PathLike[str], keyword: str) -> bytes | None:
    """A text chunk of a PNG in UTF-8, or None. Raises ValueError where the file cannot be read as a PNG."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            return text_chunk(file, keyword.encode())
    except (OSError, ValueError) as error:  # ValueError: of ours, or a NUL in the path
        reason = reason_of(error) if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path} cannot be read as a picture: {reason}.") from None


def text_chunk(file: IO[bytes], keyword: bytes) -> bytes | None:
    """The first text of this keyword in a PNG (W3C PNG, 11.3.3). Raises ValueError, the rest of a sentence."""
    if file.read(8) != SIGNATURE:
        raise ValueError("it is no PNG")
    for number in range(CHUNKS):
        head = file.read(8)
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or (number == 0 and kind != b"IHDR"):
            raise ValueError("it is damaged, or a part of it is missing")
        if kind == b"IEND":
            return None
        start = file.tell()
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            data = file.read(min(size, TEXT))
            if data.startswith(keyword + b"\0"):
                if len(data) < size or zlib.crc32(kind + data) != int.from_bytes(file.read(4), "big"):
                    raise ValueError("its text is damaged, or too long")
                return inflated(kind, data[len(keyword) + 1 :])
        file.seek(start + size + 4)
    raise ValueError("it has too many parts")


def inflated(kind: bytes, data: bytes) -> bytes:
    """What stands after the keyword of a text chunk, as text in UTF-8. Raises ValueError, the rest of a sentence."""
    packed = kind == b"zTXt" or (kind == b"iTXt" and data[:1] == b"\1")
    data = data[1:] if kind == b"zTXt" else data
    if kind == b"iTXt":  # two flags, a language, the keyword in that language
        data = data[2:].split(b"\0", 2)[-1]
    if packed:
        unpacker = zlib.decompressobj()
        try:
            data = unpacker.decompress(data, TEXT)
        except zlib.error:
            raise ValueError("its text is damaged") from None
        if not unpacker.eof:
            raise ValueError("its text is damaged, or too long")
    return data if kind == b"iTXt" else data.decode("latin-1").encode()

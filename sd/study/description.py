"""A model as a table and as a tree: every block with its output's shape, its parameters, FLOPs and bytes.

The model is built on the meta device and called there, so it needs no weights, no memory and two seconds. FLOPs are
torch's own count, of convolutions and matrix products: two for each multiplication with its addition.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..adapt.taesd import TinyVAE
from ..model import StableDiffusion
from ..text import TextConfig
from ..unet import Block as UNetBlock
from ..unet import UNet, UNetConfig
from ..vae import VAE, VAEConfig
from ..weights.configs import LoadError
from ..weights.source import find, refuse_other_kinds, sizes
from ..weights.told import apply_config, read_config

ROWS = {  # the modules that are the lines of a table; between them they hold every parameter
    "text encoder": r"embeddings|encoder\.layers\.\d+|final_layer_norm",
    "UNet": r"time_embed|(input|output)_blocks\.\d+|middle_block|out",
    "VAE encoder": r"encoder\.(layers\.\d+|conv_in|down\.\d+|mid|norm_out|conv_out)|quant_conv",
    "VAE decoder": r"post_quant_conv|decoder\.(layers\.\d+|conv_in|up\.\d+|mid|norm_out|conv_out)",
}


@dataclass(frozen=True)
class BlockFacts:
    """One module, for one picture (a batch of 1)."""

    name: str  # as in checkpoints; "" is the whole
    kind: str  # the class, or what is in it
    shape: tuple[int, ...] | None  # of the output; None where it is not called itself
    parameters: int
    flops: int
    bytes: int  # of the weights
    order: int  # when it is first called; those that are not called come with what they are in


@dataclass(frozen=True)
class Description:
    """What `describe` found out: for each part of a model its blocks, as they are called."""

    name: str
    height: int
    width: int
    dtype: str
    parts: dict[str, list[BlockFacts]]

    def whole(self, part: str) -> BlockFacts:
        return self.parts[part][0]

    def table(self, part: str) -> list[BlockFacts]:
        """The blocks of a part that hold each parameter once, in the order in which they are called."""
        rows = [b for b in self.parts[part] if re.fullmatch(ROWS[part], b.name)]
        return sorted(rows, key=lambda b: b.order)

    def __str__(self) -> str:
        lines = [f"{self.name}, one picture of {self.width} x {self.height}, weights in {self.dtype}"]
        for part in self.parts:
            whole = self.whole(part)
            lines += ["", _line(part, "", whole.shape, whole)]
            lines += [_line("  " + b.name, b.kind, b.shape, b) for b in self.table(part)]
        return "\n".join(lines)

    def json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=1)

    def tree(self, depth: int | None = None) -> str:
        """Every module, down to `depth` dots in its name."""
        lines = []
        for part, blocks in self.parts.items():
            lines += ["", _line(part, "", blocks[0].shape, blocks[0])]
            for block in blocks[1:]:
                level = block.name.count(".") + 1
                if depth is None or level <= depth:
                    last = block.name.rsplit(".", 1)[-1]
                    lines.append(_line("  " * level + last, block.kind, block.shape, block))
        return "\n".join(lines[1:])


def _line(name: str, kind: str, shape: tuple[int, ...] | None, block: BlockFacts) -> str:
    size = " x ".join(map(str, shape[1:])) if shape else ""
    numbers = f"{block.parameters:>13,} {block.flops / 1e9:>10.3f} GFLOP {block.bytes / 1e6:>9.2f} MB"
    return f"{name:26} {kind:38} {size:>16} {numbers}"


def describe(
    source: str | os.PathLike[str] | StableDiffusion | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **where: Any,
) -> Description:
    """The blocks of a model, and what each costs for one picture; `str` of it is a table, `.tree()` a tree.

    source         as for `load`, or a model; Stable Diffusion v1 itself if not given. Weights are not read
    height, width  in pixels, multiples of 8; the size the model was trained for if not given
    dtype          in which bytes are counted; the source's own if not given, float16 where there is no source
    config, where  as for `load`: sizes that a file does not tell; revision, variant, token

    Raises LoadError for what `load` would refuse by its sizes, and for config or where without a source to read.
    """
    name, size, sizes, own = _sizes(source, read_config(config), where)
    unet_config, vae_config, text_config = sizes
    f = vae_config.downsampling
    height, width = size if height is None else height, size if width is None else width
    if height % f or width % f or min(height, width) < f:
        raise LoadError(f"{width} x {height} pixels cannot be drawn: both must be multiples of {f}.")
    dtype = dtype or own
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"), torch.no_grad():
        tiny = isinstance(source, StableDiffusion) and isinstance(source.vae, TinyVAE)
        unet, vae = UNet(unet_config), TinyVAE(vae_config, vae_config) if tiny else VAE(vae_config)
        ends = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"], text_config.vocab_size - 1)
        text_sizes = {key: value for key, value in asdict(text_config).items() if key != "padding"}
        text = CLIPTextModel(CLIPTextConfig(**text_sizes, **ends))
        latents = torch.empty(1, unet_config.in_channels, height // f, width // f)
        context = torch.empty(1, text_config.max_position_embeddings, unet_config.context_dim)
        tokens = torch.zeros(1, text_config.max_position_embeddings, dtype=torch.long)
        image = torch.empty(1, 3, height, width)
        parts = {
            "text encoder": _blocks(text, lambda: text(tokens), dtype),
            "UNet": _blocks(unet, lambda: unet(latents, torch.empty(1), context, guidance=1.0), dtype),
            "VAE encoder": _blocks(vae, lambda: vae.moments(image), dtype, ("encoder", "quant_conv")),
            "VAE decoder": _blocks(vae, lambda: vae.decode(latents), dtype, ("decoder", "post_quant_conv")),
        }
    return Description(name, height, width, str(dtype).removeprefix("torch."), parts)


def _sizes(
    source: Any, config: Mapping[str, Any], where: dict[str, Any]
) -> tuple[str, int, tuple[UNetConfig, VAEConfig, TextConfig], torch.dtype]:
    """Name, side in pixels, configs, and dtype of a source."""
    if (source is None or isinstance(source, StableDiffusion)) and (config or any(v for v in where.values())):
        raise LoadError("config, revision and variant are of a file, folder or repository: give a source with them.")
    if isinstance(source, StableDiffusion):
        return source.name, source.size, (source.unet.config, source.vae.config, source.text.config), source.dtype
    if source is None:
        return "Stable Diffusion v1", 512, (UNetConfig(), VAEConfig(), TextConfig()), torch.float16
    found = find(source, look=True, **where)
    if found.problem:
        raise LoadError(found.problem)
    config = apply_config(found, config)
    refuse_other_kinds(found)
    configs = sizes(found, config)
    return found.name, found.size or 512, configs, next(iter(found.parts["unet"].values())).dtype


def _blocks(
    root: nn.Module, call: Callable[[], Any], dtype: torch.dtype, only: tuple[str, ...] = ()
) -> list[BlockFacts]:
    """Call a model, and look at all of its modules that begin with one of `only`."""
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    flops: dict[nn.Module, int] = {}
    order: dict[nn.Module, int] = {}
    began: list[int] = []

    def before(module: nn.Module, args: Any) -> None:
        order.setdefault(module, len(order))
        began.append(counter.get_total_flops())

    def after(module: nn.Module, args: Any, out: Any) -> None:
        flops[module] = flops.get(module, 0) + counter.get_total_flops() - began.pop()
        out = out if isinstance(out, Tensor) else out[0]
        shapes[module] = tuple(out.shape)

    handles = [
        h for m in root.modules() for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            out = call()
    finally:
        for handle in handles:
            handle.remove()
    out = out if isinstance(out, Tensor) else out[0]
    blocks = []
    for name, module in root.named_modules():
        name = name.removeprefix("text_model.").removeprefix("text_model")
        if name and only and name.split(".")[0] not in only:
            continue
        held = [p for n, p in module.named_parameters() if name or not only or n.split(".")[0] in only]
        count = sum(p.numel() for p in held)
        if not name and module is not root:
            continue
        if not name:
            blocks = [
                BlockFacts("", "", tuple(out.shape), count, counter.get_total_flops(), count * dtype.itemsize, -1)
            ]
        elif count or module in shapes:
            inside = sum(flops.get(m, 0) for m in _outermost(module, flops))
            blocks.append(
                BlockFacts(
                    name,
                    _kind(module),
                    shapes.get(module),
                    count,
                    inside,
                    count * dtype.itemsize,
                    order.get(module, 0),
                )
            )
    return blocks


def _outermost(module: nn.Module, called: Mapping[nn.Module, int]) -> Iterator[nn.Module]:
    """The modules in a container that were called themselves, each counted with what is in it."""
    if module in called:
        yield module
    else:
        for child in module.children():
            yield from _outermost(child, called)


def _kind(module: nn.Module) -> str:
    if isinstance(module, UNetBlock):
        return ", ".join(type(layer).__name__ for layer in module)
    if isinstance(module, nn.Conv2d):
        kernel, stride = module.kernel_size[0], module.stride[0]
        return f"Conv2d {kernel}x{kernel}" + (f", stride {stride}" if stride > 1 else "")
    return type(module).__name__

"""What tensors are called, in CompVis files and on the Hub, and what their shapes tell about a model.

CompVis names are ours; the Hub's (those of diffusers) are made from them by one table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..unet import UNetConfig, topology
from ..vae import VAEConfig

Tensors = Mapping[str, Tensor]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
}
TOKENIZER_FILES = ("vocab.json", "merges.txt")
PARTS = {"unet": "UNet", "vae": "VAE", "text": "text encoder"}
OPEN_CLIP = "cond_stage_model.model."  # where a file of SD 2 has OpenCLIP's text encoder, under names of its own

# In files, but not weights of the model: schedule buffers, losses, counters (each a full match).
KNOWN_EXTRAS = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|logvar|lvlb_weights"
    r"|v_pred|ztsnr|model_ema\..*|first_stage_model\.loss\..*|loss\..*|.*position_ids"
    r"|(cond_stage_model\.)?((transformer\.)?(text_model\.)?|model\.)(logit_scale|text_projection(\.weight)?)"
    r"|cond_stage_model\.model\.attn_mask)"
)

# ---- CompVis names to the Hub's

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# What converters call the VAE's attention in single files, where they keep the Hub's names for it.
VAE_ATTENTION = {f"to_{letter}": letter for letter in "qkv"} | {"to_out.0": "proj_out", "group_norm": "norm"}
VAE_ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """CompVis module -> Hub module, for every block of a UNet."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    if config.guidance_dim:
        table["time_embed.cond_proj"] = "time_embedding.cond_proj"
    last = len(config.channel_mult) - 1
    # What follows the block's name: the convolution in a layer that changes the resolution, and the list on the Hub.
    kinds = {"res": ("", "resnets"), "transformer": ("", "attentions")}
    kinds |= {"down": (".op", "downsamplers"), "up": (".conv", "upsamplers")}
    seen: Counter[tuple[str, str]] = Counter()  # how many layers of a kind a Hub block has so far
    inputs, (middle,), outputs = topology(config)
    sides = [(f"input_blocks.{n}", parts, "down_blocks.{}") for n, parts in enumerate(inputs)]
    sides += [("middle_block", middle, "mid_block")]
    sides += [(f"output_blocks.{n}", parts, "up_blocks.{}") for n, parts in enumerate(outputs)]
    for name, parts, hub in sides:
        for j, part in enumerate(parts):
            if part.kind == "conv":
                table[f"{name}.{j}"] = "conv_in"
                continue
            inner, kind = kinds[part.kind]
            place = hub.format(last - part.level if hub.startswith("up") else part.level)
            end = ".conv" if inner else ""
            table[f"{name}.{j}{inner}"] = f"{place}.{kind}.{seen[place, kind]}{end}"
            seen[place, kind] += 1
    return table


def unet_to_hub(names: Iterable[str], config: UNetConfig, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """CompVis name -> Hub name, for these tensors of a UNet; `more`: modules that it has beside its own."""
    modules = unet_modules(config) | dict(more or {})
    result = {}
    for name in names:
        parts = name.split(".")
        head = next(h for i in range(len(parts), 0, -1) if (h := ".".join(parts[:i])) in modules)
        tail = name[len(head) + 1 :]
        inner, _, leaf = tail.rpartition(".")
        result[name] = f"{modules[head]}.{_RES[inner]}.{leaf}" if inner in _RES else f"{modules[head]}.{tail}"
    return result


def controlnet_to_hub(names: Iterable[str], config: UNetConfig, hint_widths: int) -> dict[str, str]:
    """CompVis name -> Hub name, for these tensors of a ControlNet whose picture passes through so many widths."""
    inputs, _, _ = topology(config)
    between = 2 * (hint_widths - 1)  # convolutions, with a SiLU behind each, which takes a number as well
    more = {
        "input_hint_block.0": "controlnet_cond_embedding.conv_in",
        f"input_hint_block.{2 * between + 2}": "controlnet_cond_embedding.conv_out",
        "middle_block_out.0": "controlnet_mid_block",
    }
    more |= {f"input_hint_block.{2 * n + 2}": f"controlnet_cond_embedding.blocks.{n}" for n in range(between)}
    more |= {f"zero_convs.{n}.0": f"controlnet_down_blocks.{n}" for n in range(len(inputs))}
    return unet_to_hub(names, config, more)


def vae_to_hub(names: Iterable[str], config: VAEConfig) -> dict[str, str]:
    """CompVis name -> Hub name, for these tensors of a VAE."""
    last = len(config.ch_mult) - 1
    result = {}
    for name in names:
        hub = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{last - int(m[1])}.", name)  # counted from the other end
        for pattern, replacement in _VAE:
            hub = re.sub(pattern, replacement, hub)
        result[name] = hub
    return result


def from_hub(tensors: Tensors, names: Mapping[str, str], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by the Hub's names -> by CompVis names; what has no CompVis name keeps its own.

    1x1 convolutions of the VAE's attention are Linear there: the same numbers in another shape (a view).
    """
    rest = dict(tensors)
    result = {}
    for name, hub in names.items():
        if hub not in rest:
            for new, old in OLD_VAE_ATTENTION.items():
                hub = re.sub(rf"(attentions\.0)\.{re.escape(new)}\.", rf"\1.{old}.", hub)
        if hub in rest:
            tensor = rest.pop(hub)
            wanted = shapes[name]
            if tensor.shape != wanted and tensor.ndim == 2 and (*tensor.shape, 1, 1) == tuple(wanted):
                tensor = tensor[:, :, None, None]
            result[name] = tensor
    return result | rest


# ---- the parts of a file


def split(tensors: Tensors) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A flat file -> its parts, each without its prefix, and the names that belong to none of them."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    unknown = []
    open_clip = {n.removeprefix(OPEN_CLIP): t for n, t in tensors.items() if n.startswith(OPEN_CLIP)
                 and not KNOWN_EXTRAS.fullmatch(n)}  # fmt: skip
    parts["text"] = from_open_clip(open_clip)
    for name, tensor in tensors.items():
        if KNOWN_EXTRAS.fullmatch(name) or name.startswith(OPEN_CLIP):
            continue
        part, short = _place(name)
        if part == "vae":
            short, tensor = _vae_attention(short, tensor)
        if part is None or short in parts[part]:  # twice, with a prefix and without: which one is meant?
            unknown.append(name)
        else:
            parts[part][short] = tensor
    return parts, unknown


_OPEN_CLIP = (
    (r"token_embedding\.weight", "embeddings.token_embedding.weight"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_final\.", "final_layer_norm."),
    (r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def from_open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """OpenCLIP's text encoder under our names; what has no place in it keeps its own, behind "model.".

    Its queries, keys and values are one tensor. Its last layer is left out, for SD 2 reads the text before it; some
    converters have left that out, and 23 of the 24 layers are there.
    """
    layers = {m[1] for name in tensors if (m := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    last = f"transformer.resblocks.{len(layers) - 1}." if len(layers) != 23 else None
    result = {}
    for name, tensor in tensors.items():
        if last and name.startswith(last):
            continue
        theirs = name
        for pattern, replacement in _OPEN_CLIP:
            name = re.sub(rf"^{pattern}" if pattern[0] != "\\" else pattern, replacement, name)
        name = f"model.{name}" if name == theirs else name
        head, joined, kind = name.rpartition("in_proj_")
        if joined and tensor.ndim and tensor.shape[0] % 3 == 0:
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{head}{letter}_proj.{kind}"] = piece
        else:
            result[name] = tensor
    return result


def _vae_attention(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A tensor of the VAE in a single file, whose attention may have newer names, or linear layers for 1x1 ones."""
    module, found, rest = name.partition(".mid.attn_1.")
    if found:
        layer, _, kind = rest.rpartition(".")
        layer = VAE_ATTENTION.get(layer, layer)
        if tensor.ndim == 2 and kind == "weight":
            tensor = tensor[:, :, None, None]
        name = f"{module}{found}{layer}.{kind}"
    return name, tensor


def _place(name: str) -> tuple[str | None, str]:
    for part, prefix in PREFIXES.items():
        if name.startswith(prefix):
            return part, name[len(prefix) :]
    if name.startswith("cond_stage_model.transformer."):  # saved by transformers 5.6 or later: no text_model
        return "text", name.removeprefix("cond_stage_model.transformer.")
    if re.match(r"(input_blocks|middle_block|output_blocks|time_embed|out)\.", name):
        return "unet", name
    if re.match(r"text_model\.|embeddings\.|encoder\.layers\.|final_layer_norm\.", name):
        return "text", name.removeprefix("text_model.")
    if re.match(r"(encoder|decoder|quant_conv|post_quant_conv)\.", name):
        return "vae", name
    return None, name


def ema_names(names: Iterable[str]) -> dict[str, str]:
    """UNet tensor -> its name among the EMA weights of a full checkpoint, where the dots are gone."""
    return {name: "model_ema.diffusion_model" + name.replace(".", "") for name in names}


# ---- what a file holds, by its names and shapes

SD1, SD2 = "Stable Diffusion v1", "Stable Diffusion 2"  # those that are read here
CONTEXTS = {2048: "SDXL"}  # widths of the text's embeddings
MARKS = {  # a tensor of each part that other models have not
    "unet": "input_blocks.0.0.weight",
    "vae": "decoder.conv_in.weight",
    "text": "embeddings.token_embedding.weight",
}
CHANNELS = {8: "InstructPix2Pix"}  # that go into the UNet, where a model of ours takes 4, or 9 for inpainting


SCALES = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)")


def scaled(tensors: Iterable[str]) -> str | None:
    """A tensor by which weights in float8 are to be multiplied, or that says so, if there is one."""
    return next((name for name in tensors if SCALES.fullmatch(name)), None)


RAW_TAESD = re.compile(r"(?P<layer>\d+)\.(?P<rest>(conv\.\d+\.)?(weight|bias))")
_HUB_VAE = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.")
_HUB_TAESD = re.compile(r"(encoder|decoder)\.layers\.\d+\.(conv\.\d+\.)?(weight|bias)")


def vae_kind(tensors: Iterable[str]) -> str:
    """What VAE a file holds that holds nothing else: "TAESD", "Hub" or "CompVis", whose names they are; or ""."""
    kept = [name for name in tensors if not KNOWN_EXTRAS.fullmatch(name)]
    if not kept:
        return ""
    for pattern in (RAW_TAESD, _HUB_TAESD):
        if all(pattern.fullmatch(name) for name in kept):
            return "TAESD"
    if all(_place(name)[0] == "vae" for name in kept):
        return "Hub" if any(map(_HUB_VAE.match, kept)) else "CompVis"
    return ""


def half_of_taesd(tensors: Iterable[str]) -> str:
    """Which half a file of TAESD's own is: the first layer of the decoder has no weights."""
    return "encoder" if "0.weight" in tensors else "decoder"


def from_taesd(tensors: Tensors, half: str) -> dict[str, Tensor]:
    """The tensors of a file of TAESD's own by the names of the Hub; what has another name keeps it."""
    result = {}
    for name, tensor in tensors.items():
        match = RAW_TAESD.fullmatch(name)
        number = int(match["layer"][:9]) - (half == "decoder") if match else 0
        result[f"{half}.layers.{number}.{match['rest']}" if match else name] = tensor
    return result


def kind_of(tensors: Tensors) -> str:
    """A short name for what a file holds: "Stable Diffusion v1", "Stable Diffusion 2", or which other thing."""
    names = tensors.keys()

    def any_of(*words: str) -> bool:
        return any(word in name for word in words for name in names)

    if any_of("lora_", "lora.up", ".lora", "lycoris_", ".hada_w", ".lokr_w", ".ia3_l"):
        return "LoRA"
    if any_of("conditioner.embedders", "label_emb"):
        return "SDXL"
    if any_of("joint_blocks.", "double_blocks."):
        return "SD 3 or Flux"
    if any_of("control_model.", "input_hint_block.", "controlnet_cond_embedding."):
        return "ControlNet"
    inputs = ("input_blocks.0.0.weight", PREFIXES["unet"] + "conv_in.weight")  # CompVis' name, the Hub's
    first = next((t for n, t in tensors.items() if n.endswith(inputs)), None)
    if first is not None and first.ndim == 4 and first.shape[1] not in (4, 9):
        return CHANNELS.get(first.shape[1], f"{first.shape[1]}-channel")
    contexts = {t.shape[1] for n, t in tensors.items() if n.endswith("attn2.to_k.weight") and t.ndim == 2}
    for width in sorted(CONTEXTS, reverse=True):
        if width in contexts:
            return CONTEXTS[width]
    if any(re.match(r"(encoder\.)?down_blocks\.", name) for name in names):  # a file out of unet/ or vae/
        return "the Hub layout's (one part of a model: give the folder around it)"
    parts = split(tensors)[0]
    if not any(name in parts[part] for part, name in MARKS.items()):
        return "unknown"
    return SD2 if any_of(OPEN_CLIP) or is_sd2(parts["unet"]) else SD1


def is_sd2(unet: Tensors) -> bool:
    """Whether these tensors are of SD 2's UNet: its projections into a transformer are linear, not convolutions."""
    return any(name.endswith(".1.proj_in.weight") and tensor.ndim == 2 for name, tensor in unet.items())

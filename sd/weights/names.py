"""What tensors are called, in CompVis files and on the Hub, and what their shapes tell about a model.

CompVis names are ours; the Hub's (those of diffusers) are made from them by one table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..text import TextConfig
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

# In files, but not weights of the model: schedule buffers, losses, counters (each a full match).
KNOWN_EXTRAS = re.compile(
    r"(betas|alphas_cumprod(_prev)?|sqrt_.*|log_one_minus_alphas_cumprod|posterior_.*|logvar|lvlb_weights"
    r"|model_ema\..*|first_stage_model\.loss\..*|loss\..*|.*position_ids"
    r"|cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?))"
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


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """CompVis module -> Hub module, for every block of a UNet."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
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


def unet_to_hub(names: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """CompVis name -> Hub name, for these tensors of a UNet."""
    modules = unet_modules(config)
    result = {}
    for name in names:
        parts = name.split(".")
        head = next(h for i in range(len(parts), 0, -1) if (h := ".".join(parts[:i])) in modules)
        tail = name[len(head) + 1 :]
        inner, _, leaf = tail.rpartition(".")
        result[name] = f"{modules[head]}.{_RES[inner]}.{leaf}" if inner in _RES else f"{modules[head]}.{tail}"
    return result


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
    for name, tensor in tensors.items():
        if KNOWN_EXTRAS.fullmatch(name):
            continue
        part, short = _place(name)
        if part is None or short in parts[part]:  # twice, with a prefix and without: which one is meant?
            unknown.append(name)
        else:
            parts[part][short] = tensor
    return parts, unknown


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

CONTEXTS = {1024: "SD 2", 2048: "SDXL"}  # widths of the text's embeddings
CHANNELS = {9: "inpainting", 8: "InstructPix2Pix"}  # that go into the UNet


def kind_of(tensors: Tensors) -> str:
    """A short name for what a file holds: "Stable Diffusion v1", or which other thing."""
    names = tensors.keys()

    def any_of(*words: str) -> bool:
        return any(word in name for word in words for name in names)

    if any_of("lora_", "lora.up", ".lora"):
        return "LoRA"
    if any_of("conditioner.embedders", "label_emb"):
        return "SDXL"
    if any_of("joint_blocks.", "double_blocks."):
        return "SD 3 or Flux"
    if any_of("control_model.", "input_hint_block"):
        return "ControlNet"
    if any_of("cond_stage_model.model."):
        return "SD 2"
    inputs = ("input_blocks.0.0.weight", PREFIXES["unet"] + "conv_in.weight")  # CompVis' name, the Hub's
    first = next((t for n, t in tensors.items() if n.endswith(inputs)), None)
    if first is not None and first.ndim == 4 and first.shape[1] != 4:
        return CHANNELS.get(first.shape[1], f"{first.shape[1]}-channel")
    contexts = {t.shape[1] for n, t in tensors.items() if n.endswith("attn2.to_k.weight") and t.ndim == 2}
    for width in sorted(CONTEXTS, reverse=True):
        if width in contexts:
            return CONTEXTS[width]
    if any(re.match(r"(encoder\.)?down_blocks\.", name) for name in names):  # a file out of unet/ or vae/
        return "the Hub layout's (one part of a model: give the folder around it)"
    return "Stable Diffusion v1" if any(split(tensors)[0].values()) else "unknown"


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand at the group of a pattern, over all names."""
    return len({m[1] for name in names if (m := re.match(pattern, name))})


def infer_unet(tensors: Tensors) -> dict[str, Any]:
    """Fields of UNetConfig that shapes tell; the head count they do not."""
    first = tensors["input_blocks.0.0.weight"]
    blocks = count(tensors, r"input_blocks\.(\d+)\.")
    levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)  # a convolution that halves, between two
    stride = blocks // levels  # input blocks of a level: the first convolution or what halves, then residual blocks
    starts = range(1, 1 + levels * stride, stride)  # the first residual block of each level
    widths = [tensors[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in starts]
    attends = [2**level for level, n in enumerate(starts) if f"input_blocks.{n}.1.proj_in.weight" in tensors]
    return {
        "in_channels": first.shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "model_channels": first.shape[0],
        "channel_mult": tuple(width // first.shape[0] for width in widths),
        "num_res_blocks": stride - 1,
        "attention_resolutions": tuple(attends),
        "context_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "transformer_depth": count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
    }


def infer_vae(tensors: Tensors) -> dict[str, Any]:
    """Fields of VAEConfig that shapes tell; the scale factor they do not."""
    ch = tensors["encoder.conv_in.weight"].shape[0]
    levels = count(tensors, r"encoder\.down\.(\d+)\.")
    widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": tensors["decoder.conv_in.weight"].shape[1],
    }


def infer_text(tensors: Tensors) -> dict[str, Any]:
    """Fields of TextConfig, with CLIP's rule of 64 channels a head."""
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(tensors, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": tensors["embeddings.position_embedding.weight"].shape[0],
    }


# ---- the Hub's config.json files: of diffusers' many options, the one value that Stable Diffusion v1 has.
# An option left out has that value too; all of them matter, for a wrong one draws wrong pictures silently.

_UNET_OPTIONS: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
_VAE_OPTIONS: dict[str, Any] = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_SCHEDULE: dict[str, Any] = {  # how a model was trained; how it is sampled is the caller's choice
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}
_UNET_SIZES = {
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("attention_head_dim", "num_attention_heads", "norm_num_groups", "transformer_layers_per_block"),
    *("down_block_types", "up_block_types", "sample_size"),
    *("addition_embed_type_num_heads", "upcast_attention"),  # without effect here, or only on rounding
}
_VAE_SIZES = {
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels"),
    *("norm_num_groups", "scaling_factor", "down_block_types", "up_block_types", "sample_size", "force_upcast"),
}


def _refuse_options(config: Mapping[str, Any], fixed: Mapping[str, Any], sizes: Iterable[str], part: str) -> None:
    """Raise ValueError for an option that has another value than v1's; an unknown one must be off."""
    for key, value in config.items():
        value = "silu" if value == "swish" else value  # two names of x * sigmoid(x)
        if key in sizes or key.startswith("_") or value is None:
            continue
        if (value != fixed[key]) if key in fixed else value:
            raise ValueError(f"its {part} has {key} = {value!r}, which Stable Diffusion v1 does not have")


def _widths(config: Mapping[str, Any], part: str) -> list[int]:
    widths = config.get("block_out_channels")
    if not isinstance(widths, list) or not all(type(w) is int and w > 0 for w in widths) or not widths:
        raise ValueError(f"its {part} has block_out_channels = {widths!r}, which are no widths")
    if any(width % widths[0] for width in widths):
        raise ValueError(f"its {part} has widths {widths}, which are not multiples of the first")
    return widths


def unet_from_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hub UNet's config -> fields of UNetConfig. Raises ValueError naming what this UNet does not do."""
    if other := other_kind(config):
        raise ValueError(f"it holds {other}")
    _refuse_options(config, _UNET_OPTIONS, _UNET_SIZES, "UNet")
    widths = _widths(config, "UNet")
    down = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"]
    mirrored = [kind.replace("Down", "Up") for kind in map(str, down[::-1])]
    up = config.get("up_block_types") or mirrored
    if not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or up != mirrored or len(down) != len(widths):
        raise ValueError(f"its UNet has blocks {down} and {up}, which Stable Diffusion v1 does not have")
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if not isinstance(heads, int):
        raise ValueError(f"its UNet has other head counts on other levels ({heads}), as SD 2 and SDXL have")
    return {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config.get("layers_per_block", 2),
        "attention_resolutions": tuple(2**i for i, kind in enumerate(down) if kind.startswith("CrossAttn")),
        "num_heads": heads,  # "attention_head_dim": 8 means eight heads
        "context_dim": config.get("cross_attention_dim", 768),
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "num_groups": config.get("norm_num_groups", 32),
    }


def other_kind(config: Mapping[str, Any]) -> str | None:
    """The name of what a Hub UNet's config is of, where that is another well-known model."""
    known: dict[str, dict[Any, str]] = {
        "addition_embed_type": {"text_time": "SDXL"},
        "cross_attention_dim": CONTEXTS,
        "in_channels": CHANNELS,
    }
    for key, kinds in known.items():
        value = config.get(key)
        if isinstance(value, int | str) and value in kinds:
            return f"{kinds[value]} weights ({key} = {value!r})"
    return None


def vae_from_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hub VAE's config -> fields of VAEConfig. Raises ValueError naming what this VAE does not do."""
    if config.get("latents_mean") or config.get("shift_factor"):
        raise ValueError("its VAE is of a newer kind than Stable Diffusion v1's")
    _refuse_options(config, _VAE_OPTIONS, _VAE_SIZES, "VAE")
    widths = _widths(config, "VAE")
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if config.get(key, [kind] * len(widths)) != [kind] * len(widths):
            raise ValueError(f"its VAE has {key} = {config[key]!r}, which Stable Diffusion v1 does not have")
    return {
        "in_channels": config.get("in_channels", 3),
        "out_ch": config.get("out_channels", 3),
        "ch": widths[0],
        "ch_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": config.get("layers_per_block", 1),
        "z_channels": config.get("latent_channels", 4),
        "scale_factor": config.get("scaling_factor", 0.18215),
        "num_groups": config.get("norm_num_groups", 32),
    }


def text_from_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hub text encoder's config -> fields of TextConfig."""
    if config.get("architectures") not in (None, ["CLIPTextModel"]):
        raise ValueError(f"its text encoder is {config['architectures']}, not CLIPTextModel")
    return {f.name: config[f.name] for f in fields(TextConfig) if f.name in config}


def check_schedule(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a scheduler_config.json of a model that was trained otherwise than v1."""
    for key, value in _SCHEDULE.items():
        if key in config and config[key] != value:
            raise ValueError(f"it was trained with {key} = {config[key]!r}, and v1 with {value!r}")
    for key in ("beta_start", "beta_end"):
        if key in config and not (type(config[key]) is float and 0 < config[key] < 1):
            raise ValueError(f"it was trained with {key} = {config[key]!r}, which is no share of noise")
    if config.get("beta_start", 0.00085) > config.get("beta_end", 0.012):
        raise ValueError("it was trained with beta_end smaller than beta_start")
    for key, least in (("num_train_timesteps", 2), ("steps_offset", 0)):
        if key in config and not (type(config[key]) is int and least <= config[key] <= 100_000):
            raise ValueError(f"it was trained with {key} = {config[key]!r}, which is no number of steps")
    if not isinstance(config.get("set_alpha_to_one", False), bool):
        raise ValueError(f"it was trained with set_alpha_to_one = {config['set_alpha_to_one']!r}, not true or false")


_SOLVERS = {"PNDMScheduler": "pndm", "DDIMScheduler": "ddim", "LMSDiscreteScheduler": "lms"}
_SCHEDULE_FIELDS = ("beta_start", "beta_end", "num_train_timesteps", "steps_offset", "set_alpha_to_one")


def defaults_from_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json that `check_schedule` let pass -> a model's defaults, as plain data.

    A solver that is not here leaves v1's, "pndm". A value that is left out is v1's, whatever the class of
    diffusers has: its DDIM would end at abar 1, which is wrong for Stable Diffusion.
    """
    schedule = {key: config[key] for key in _SCHEDULE_FIELDS if key in config}
    if "steps_offset" in schedule:
        schedule["steps_offset"] = 1  # diffusers' StableDiffusionPipeline puts it there, whatever the file says
    solver = config.get("_class_name")
    steps = {"num_inference_steps": min(50, config.get("num_train_timesteps", 50))}
    return steps | {"scheduler": _SOLVERS.get(str(solver), "pndm"), "schedule": schedule}

"""The sizes of the three parts: from shapes of tensors, from the Hub's config.json files, and whether they can be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..files import PlainError
from ..text import ACTIVATIONS, TextConfig
from ..unet import UNetConfig, topology
from ..vae import VAEConfig
from .names import CHANNELS, CONTEXTS, Tensors


class LoadError(PlainError):
    """A source that cannot become a model; the message is one sentence: what is wrong, and what to do."""


# ---- from shapes


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand at the group of a pattern, over all names."""
    return len({m[1] for name in names if (m := re.match(pattern, name))})


def of_projection(weight: Tensor) -> dict[str, Any]:
    """Fields of UNetConfig by the projection into a transformer: linear in SD 2, whose heads have 64 channels."""
    return {"use_linear_in_transformer": True, "num_head_channels": 64} if weight.ndim == 2 else {}


def infer_unet(tensors: Tensors) -> dict[str, Any]:
    """Fields of UNetConfig that shapes tell; the head count of v1 they do not."""
    first = tensors["input_blocks.0.0.weight"]
    blocks = count(tensors, r"input_blocks\.(\d+)\.")
    levels = 1 + sum(name.endswith(".0.op.weight") for name in tensors)  # a convolution that halves, between two
    stride = blocks // levels  # input blocks of a level: the first convolution or what halves, then residual blocks
    starts = range(1, 1 + levels * stride, stride)  # the first residual block of each level
    widths = [tensors[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in starts]
    attends = [2**level for level, n in enumerate(starts) if f"input_blocks.{n}.1.proj_in.weight" in tensors]
    told = tensors.get("time_embed.cond_proj.weight")  # of LCM
    return {
        "in_channels": first.shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "model_channels": first.shape[0],
        "channel_mult": tuple(width // first.shape[0] for width in widths),
        "num_res_blocks": stride - 1,
        "attention_resolutions": tuple(attends),
        "context_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "transformer_depth": count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        **of_projection(tensors["middle_block.1.proj_in.weight"]),
        **({} if told is None else {"guidance_dim": told.shape[1]}),
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


def infer_hub_vae(tensors: Tensors) -> dict[str, Any]:
    """The same by the Hub's names."""
    levels = count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    ch = tensors["encoder.conv_in.weight"].shape[0]
    widths = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    return {
        "ch": ch,
        "ch_mult": tuple(width // ch for width in widths),
        "num_res_blocks": count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "z_channels": tensors["decoder.conv_in.weight"].shape[1],
    }


def infer_tiny_vae(tensors: Tensors) -> dict[str, Any]:
    """Fields of VAEConfig for TAESD by its decoder's tensors, which have the names of the Hub's AutoencoderTiny.

    Its latents are scaled as they are. A convolution without bias follows each enlargement, and one residual block
    the last of them.
    """
    first = tensors["decoder.layers.0.weight"]
    layers = {m[1] for name in tensors if (m := re.match(r"decoder\.layers\.(\d+)\.weight", name))}
    blocks = {m[1] for name in tensors if (m := re.match(r"decoder\.layers\.(\d+)\.conv\.", name))}
    levels = len(layers) - 1
    return {
        "ch": first.shape[0],
        "ch_mult": (1,) * levels,
        "num_res_blocks": (len(blocks) - 1) // (levels - 1),
        "z_channels": first.shape[1],
        "scale_factor": 1.0,
        "num_groups": 1,
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


PARTS: dict[str, tuple[type, Callable[[Tensors], dict[str, Any]]]] = {  # the config of each, and how shapes tell it
    "unet": (UNetConfig, infer_unet),
    "vae": (VAEConfig, infer_vae),
    "text": (TextConfig, infer_text),
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
_UNET_SIZES = {
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim"),
    *("attention_head_dim", "num_attention_heads", "norm_num_groups", "transformer_layers_per_block"),
    *("down_block_types", "up_block_types", "sample_size"),
    *("addition_embed_type_num_heads", "upcast_attention"),  # without effect here, or only on rounding
    *("use_linear_projection", "time_cond_proj_dim"),  # of SD 2, of LCM
}
_VAE_SIZES = {
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "latent_channels"),
    *("norm_num_groups", "scaling_factor", "down_block_types", "up_block_types", "sample_size", "force_upcast"),
}


def _refuse_options(config: Mapping[str, Any], fixed: Mapping[str, Any], sizes: Iterable[str], part: str) -> None:
    """Raise ValueError for an option that has another value than v1's; an unknown one must be off."""
    for key, value in config.items():
        value = "silu" if value == "swish" else alike(value)  # two names of x * sigmoid(x)
        if key in sizes or key.startswith("_") or value is None:
            continue
        if (value != fixed[key]) if key in fixed else value:
            raise ValueError(f"its {part} has {key} = {value!r}, which Stable Diffusion v1 does not have")


def alike(value: Any) -> Any:
    """The one value of a list that has it for every level; anything else as it is."""
    return value[0] if isinstance(value, list) and value and all(other == value[0] for other in value) else value


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
    return {
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": alike(config.get("layers_per_block", 2)),
        "attention_resolutions": tuple(2**i for i, kind in enumerate(down) if kind.startswith("CrossAttn")),
        **heads_from_hub(config, widths),
        "context_dim": alike(config.get("cross_attention_dim", 768)),
        "transformer_depth": alike(config.get("transformer_layers_per_block", 1)),
        "num_groups": config.get("norm_num_groups", 32),
        **({"use_linear_in_transformer": True} if config.get("use_linear_projection") else {}),
        **({"guidance_dim": dim} if (dim := config.get("time_cond_proj_dim")) is not None else {}),
    }


def heads_from_hub(config: Mapping[str, Any], widths: list[int]) -> dict[str, Any]:
    """Fields of UNetConfig: a head count, or SD 2's channels of a head, where all levels have as many.

    The Hub calls the head count "attention_head_dim": 8 means eight heads, and [5, 10, 20, 20] 64 channels each.
    """
    heads = alike(config.get("num_attention_heads") or config.get("attention_head_dim", 8))
    if isinstance(heads, int):
        return {"num_heads": heads}
    counts = heads if isinstance(heads, list) else []
    sound = len(counts) == len(widths) and all(type(n) is int and n > 0 for n in counts)
    channels = {width / n for width, n in zip(widths, counts, strict=True)} if sound else set()
    if len(channels) != 1 or not (one := channels.pop()).is_integer():
        raise ValueError(f"its UNet has head counts {heads}, where one number, or one for each level is expected")
    return {"num_head_channels": int(one)}


def other_kind(config: Mapping[str, Any]) -> str | None:
    """The name of what a Hub UNet's config is of, where that is another well-known model."""
    known: dict[str, dict[Any, str]] = {
        "addition_embed_type": {"text_time": "SDXL"},
        "cross_attention_dim": CONTEXTS,
        "in_channels": CHANNELS,
    }
    for key, kinds in known.items():
        value = alike(config.get(key))
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
        "num_res_blocks": alike(config.get("layers_per_block", 1)),
        "z_channels": config.get("latent_channels", 4),
        "scale_factor": config.get("scaling_factor", 0.18215),
        "num_groups": config.get("norm_num_groups", 32),
    }


_TINY_OPTIONS: dict[str, Any] = {
    "act_fn": "relu",
    "in_channels": 3,
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}
_TINY_SIZES = {
    *("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels", "latent_channels"),
    *("num_encoder_blocks", "num_decoder_blocks", "sample_size"),
    *("latent_magnitude", "latent_shift", "force_upcast"),  # of pictures that hold latents, or without effect here
}


def tiny_vae_from_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hub AutoencoderTiny's config. Shapes tell its sizes. Raises ValueError naming what TAESD does not do."""
    _refuse_options(config, _TINY_OPTIONS, _TINY_SIZES, "VAE")
    return {}


def text_from_hub(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Hub text encoder's config -> fields of TextConfig."""
    if config.get("architectures") not in (None, ["CLIPTextModel"], ["CLIPTextModelWithProjection"]):
        raise ValueError(f"its text encoder is {config['architectures']}, not CLIPTextModel")
    return {f.name: config[f.name] for f in fields(TextConfig) if f.name in config}


# ---- whether they can be

LIST = 8  # the most levels of a UNet or a VAE
LAYERS = 512  # the most layers of a UNet; v1 has 59, SDXL 107

# What each field of a config may be: a whole number from 1 to this; a tuple of them; a number between 0 and this; or,
# for hidden_act, one of ACTIVATIONS. Every size is bounded: a file's word for it must not make us build layers for
# hours.
WIDTH, DEEP = 1 << 17, 64
WHOLE: dict[str, int] = {
    **dict.fromkeys(["in_channels", "out_channels", "out_ch", "z_channels", "model_channels", "ch"], WIDTH),
    **dict.fromkeys(["context_dim", "hidden_size", "intermediate_size", "vocab_size", "num_groups"], WIDTH),
    **dict.fromkeys(["num_heads", "num_attention_heads", "max_position_embeddings"], WIDTH),
    **{"num_res_blocks": 16, "transformer_depth": DEEP, "num_hidden_layers": 128},
    **{"num_head_channels": WIDTH, "guidance_dim": WIDTH},
}
NONE = ("num_head_channels", "guidance_dim", "padding")  # that can also be None
SEVERAL: dict[str, int] = {"channel_mult": DEEP, "ch_mult": DEEP, "attention_resolutions": WIDTH}
FACTORS: dict[str, float] = {"scale_factor": 1e6, "layer_norm_eps": 1.0}


def fits(field: str, value: Any) -> bool:
    """Whether a field of a config can have this value."""
    if field in NONE and value is None:
        return True
    if field == "padding":  # the number of a token
        return type(value) is int and 0 <= value < WIDTH
    if field == "use_linear_in_transformer":
        return isinstance(value, bool)
    if field in WHOLE:
        return type(value) is int and 0 < value <= WHOLE[field]
    if field in SEVERAL:
        if not isinstance(value, tuple) or len(value) > LIST or (not value and field != "attention_resolutions"):
            return False
        return all(type(n) is int and 0 < n <= SEVERAL[field] for n in value)
    if field in FACTORS:
        return type(value) in (int, float) and 0 < value < FACTORS[field]
    return field == "hidden_act" and isinstance(value, str) and value in ACTIVATIONS


def config_of(kind: type, settings: Mapping[str, Any]) -> Any:
    """A config dataclass from fields, with lists (of JSON) as tuples. Raises LoadError for values that do not fit."""
    known = sorted(f.name for f in fields(kind))
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise LoadError(f"config: {kind.__name__} has no {unknown[0]!r}; its fields are {', '.join(known)}.")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    for key, value in settings.items():
        if not fits(key, value):
            raise LoadError(f"config: {kind.__name__} cannot have {key} = {value!r}: give it a usable size.")
    config = kind(**settings)
    if kind is UNetConfig:
        parts = [part for blocks in topology(config) for block in blocks for part in block]
        layers = len(parts) + (config.transformer_depth - 1) * sum(part.kind == "transformer" for part in parts)
        if layers > LAYERS:
            raise LoadError(f"config: a UNet cannot have {layers:,} layers, but at most {LAYERS}: give usable sizes.")
    if (guidance := getattr(config, "guidance_dim", None)) and (guidance < 4 or guidance % 2):
        raise LoadError(f"config: guidance_dim must be even and at least 4, not {guidance}: give a usable size.")
    if kind is TextConfig:
        if config.padding is not None and config.padding >= config.vocab_size:
            count = f"there are {config.vocab_size:,}"
            raise LoadError(f"config: padding is token {config.padding}, and {count}: give a lower number.")
        divided = {"num_attention_heads": [config.hidden_size]}
    elif kind is VAEConfig:
        divided = {"num_groups": [config.ch * m for m in (1, *config.ch_mult)]}
    else:
        widths = [config.model_channels * m for m in (1, *config.channel_mult)]
        divided = {"num_groups": widths, "num_head_channels" if config.num_head_channels else "num_heads": widths[1:]}
    for key, widths in divided.items():
        if odd := [width for width in widths if width % getattr(config, key)]:
            part = kind.__name__.removesuffix("Config").lower()
            raise LoadError(
                f"config: {odd[0]} channels cannot be split by {key} = {getattr(config, key)}: "
                f'give it as config, {{"{part}": {{"{key}": ...}}}}.'
            )
    return config

"""What LoRA files call things: the modules, and the parts of each.

The names of modules are made from ours and the Hub's (`sd/weights/names.py`) by writing them as each program does,
and looked up whole. They are never taken apart: with "_" for "." nobody can tell where one word ends.

    kohya             lora_unet_ and the Hub's name or CompVis', lora_te_ or lora_te1_, with _ for .
    SimpleTuner       lycoris_ and the Hub's name, with _ for .
    diffusers (old)   ...attn1.processor.to_q_lora, ...attn1.to_q.lora, ...self_attn.q_proj.lora_linear_layer
    PEFT              [unet.]... or base_model.model....: .lora_A.weight, .lora_B.weight
    ComfyUI           diffusion_model. and CompVis' name
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..model import StableDiffusion
from ..weights import names
from ..weights.configs import LoadError


class Place(NamedTuple):
    """A module of ours: "unet" or "text", and its name there."""

    part: str
    module: str


PARTS = ("unet", "text")


def parts_of(model: StableDiffusion) -> dict[str, nn.Module]:
    """The parts of a model that a LoRA may change."""
    return {"unet": model.unet, "text": model.text.model}


def weighted_modules(part: nn.Module) -> list[str]:
    """All modules that have a weight of their own, but for embeddings."""
    found = (name.rpartition(".")[0] for name, _ in part.named_parameters())
    return [name for name in dict.fromkeys(found) if not name.startswith("embeddings.")]


def stems(model: StableDiffusion) -> dict[str, Place]:
    """What each module may be called in a file -> the module."""
    table: dict[str, Place] = {}
    unet = weighted_modules(model.unet)
    hub_of = names.unet_to_hub([f"{name}.weight" for name in unet], model.unet.config)
    for name in unet:
        place, hub = Place("unet", name), hub_of[f"{name}.weight"].removesuffix(".weight")
        for dotted in dict.fromkeys((hub, name)):
            flat = dotted.replace(".", "_")
            table |= dict.fromkeys((f"lora_unet_{flat}", f"lycoris_{flat}", f"diffusion_model.{dotted}"), place)
        for prefix in ("", "unet.", "base_model.model.", "base_model.model.unet."):
            table[prefix + hub] = place
            module, _, layer = hub.removesuffix(".0").rpartition(".")
            if layer in ("to_q", "to_k", "to_v", "to_out") and "attn" in module:
                table[f"{prefix}{module}.processor.{layer}_lora"] = place
                table[f"{prefix}{module}.{layer}"] = place
    for name in weighted_modules(model.text.model):
        place, flat = Place("text", name), name.replace(".", "_")
        starts = ("lora_te_text_model_", "lora_te1_text_model_", "lycoris_text_model_", "lora_te_", "lora_te1_")
        table |= dict.fromkeys([start + flat for start in starts], place)
        old = re.sub(r"\.self_attn\.([qkv]|out)_proj$", r".self_attn.to_\1_lora", name)
        for prefix in ("text_encoder.", "", "base_model.model.", "base_model.model.text_encoder."):
            for dotted in dict.fromkeys((name, old)):
                table |= dict.fromkeys([f"{prefix}text_model.{dotted}", f"{prefix}{dotted}"], place)
    return table


DIALECTS = {  # by how a name begins, the first that does
    "kohya": r"lora_(unet|te|te1)_",
    "SimpleTuner": r"lycoris_",
    "ComfyUI": r"diffusion_model\.",
    "PEFT": r".*\.(lora_[AB]|lora_magnitude_vector|ia3_l)\b|base_model\.model\.",
    "diffusers (old)": r".*(_lora|\.lora|\.lora_linear_layer)\.(up|down)\.",
    "PEFT without its prefix": r".*\.(hada_|lokr_)",
}


def dialect_of(keys: Iterable[str]) -> str | None:
    """That of most of these names."""
    found = Counter(next((d for d, form in DIALECTS.items() if re.match(form, key)), None) for key in keys)
    return found.most_common(1)[0][0] if found else None


# What a module's parts are called -> our word for them. `%` stands for an adapter's name, which PEFT may put there.
_FIELDS = {
    r"lora_down\.weight|(lora\.|lora_linear_layer\.)?down\.weight|lora_A%\.weight": "down",
    r"lora_up\.weight|(lora\.|lora_linear_layer\.)?up\.weight|lora_B%\.weight": "up",
    r"lora_mid\.weight": "mid",
    r"(lora\.|lora_linear_layer\.)?alpha": "alpha",
    r"dora_scale": "dora_scale",
    r"lora_magnitude_vector%(\.weight)?": "magnitude",
    r"lora_B%\.bias": "up_bias",
    r"(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2)%": "",  # as it is
    r"(diff|diff_b|w_norm|b_norm|on_input|weight|[ab][12]\.weight|bm\.weight)": "",
    r"ia3_l%": "ia3_l",
}
FIELDS = {re.compile(form.replace("%", r"(\.[\w-]+)?")): word for form, word in _FIELDS.items()}
# Kinds that are not followed, by the names that tell them.
REFUSED = {"boft_": "BOFT", "oft_": "OFT", "vera_": "VeRA", "lora_embedding_": "a LoRA of embeddings"}
REFUSED |= {"custom_diffusion": "Custom Diffusion", "set_weight": "weights to replace others"}


def field_of(rest: str) -> str | None:
    """Our word for what stands after a module's name; None: it has none."""
    for form, word in FIELDS.items():
        if match := form.fullmatch(rest):
            return word or match[1]
    return None


def refused_kind(key: str) -> str | None:
    """The name of a kind that is not followed here."""
    return next((name for mark, name in REFUSED.items() if mark in key), None)


def placed_names(keys: Iterable[str], table: Mapping[str, Place]) -> dict[str, tuple[Place, str]]:
    """Of the names that begin with a module's: the module, and what stands after it. The longest module counts."""
    found = {}
    for key in keys:
        end = len(key)
        while (end := key.rfind(".", 0, end)) > 0:
            if place := table.get(key[:end]):
                found[key] = place, key[end + 1 :]
                break
    return found


# ---- for which model

WIDTHS = {768: "Stable Diffusion v1", 1024: "SD 2", 2048: "SDXL"}  # of the text that cross-attention looks at
MARKS = {  # names that only another model's files have
    "SDXL": r"lora_te2_|text_encoder_2\.|.*(label_emb|add_embedding)",
    "SD 3 or Flux": r".*(joint|double|single)(_transformer)?_blocks|lora_te3_|(lora_)?transformer[._]",
    "ControlNet": r"lora_controlnet|.*input_hint_block|controlnet_cond_embedding",
}
SAID = {  # in ss_base_model_version, as kohya writes it, or in modelspec.architecture
    "SDXL": r"xl",
    "SD 2": r"(sd|stable-diffusion)[-_]v?2",
    "SD 3": r"(sd|stable-diffusion-)3",
    "Flux": r"flux",
    "Stable Diffusion v1": r"(sd|stable-diffusion)[-_]v?1",
}
_CONTEXT = re.compile(r".*attn2[._]to_[kv].*(down\.weight|lora_A(\.[\w-]+)?\.weight|hada_w1_b(\.[\w-]+)?|\.diff)")


def width_of(tensors: Mapping[str, Tensor]) -> int | None:
    """How wide the text is that the file's cross-attention looks at, where a tensor tells it."""
    shapes = (t.shape for key, t in tensors.items() if _CONTEXT.fullmatch(key) and t.ndim >= 2)
    return next((shape[1] for shape in shapes), None)


def said_of_base(metadata: Mapping[str, Any]) -> str:
    """What the file says of the model that it was trained on; "" where it says nothing."""
    words = (metadata.get(key) for key in ("ss_base_model_version", "modelspec.architecture"))
    return next((word for word in words if isinstance(word, str) and word), "")


def family_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str | None:
    """Which model a file is for, as far as it tells: by names, by the text's width, or else by its own word."""
    for family, form in MARKS.items():
        if any(re.match(form, key) for key in tensors):
            return family
    width, said = width_of(tensors), said_of_base(metadata).lower()
    if width is not None:
        return WIDTHS.get(width)
    return next((family for family, form in SAID.items() if re.search(form, said)), None)


def refuse_other_models(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], width: int) -> None:
    """Raise LoadError for a file of another model than this one, whose text is `width` wide."""
    family, wide = family_of(tensors, metadata), width_of(tensors)
    ours = WIDTHS.get(width, "Stable Diffusion v1")
    if family == "ControlNet" and "lora_controlnet" not in tensors:
        raise LoadError(
            f"{name} holds ControlNet weights, and no LoRA: give it with sd.load_controlnet (--controlnet)."
        )
    if wide not in (None, width):
        what = f"{family or 'another model'} (its text is {wide} wide)"
    elif family in MARKS or (family not in (None, ours) and wide is None):
        what = family
    else:
        return
    raise LoadError(
        f"{name} is for {what}, and this model is {ours} (its text is {width} wide): give one that was made for it."
    )

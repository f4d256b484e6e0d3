"""The same tensors in diffusers: `to_diffusers` and `from_diffusers`, for whoever works with both libraries.

No weight is copied. Each side has Parameters of its own, and they lie in the same memory: what one side writes there
in place, as an optimizer does, the other computes with from then on. (Of the VAE's attention, 1x1 convolutions here
are linear layers there: views of the same numbers.)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..loader import build
from ..model import StableDiffusion
from ..schedule import NoiseSchedule
from ..weights import names
from ..weights.configs import LoadError, text_from_hub, unet_from_hub, vae_from_hub
from ..weights.defaults import Defaults, as_turbo, check_schedule, defaults_of, is_turbo
from ..weights.mapped import WeightFiles
from ..weights.source import Source, called, only_v1, refuse_other_kinds, rename
from ..weights.tokenizer import read_tokenizer
from . import reference
from .reference import CompareError

PARTS = {  # of each part: what a pipeline calls it, and of which class it is
    "unet": ("unet", "UNet2DConditionModel"),
    "vae": ("vae", "AutoencoderKL"),
    "text": ("text_encoder", "CLIPTextModel"),
}
# What a pipeline may have beside these. The last three look at pictures: to judge them, or for an IP-Adapter, which
# is seen in the UNet.
BESIDE = {"tokenizer", "scheduler", "safety_checker", "feature_extractor", "image_encoder"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PROBES = ("", "A red star, 12!")  # texts that a tokenizer of another kind numbers or fills up otherwise


# ---- from here to there


def to_diffusers(model: StableDiffusion) -> Any:
    """A pipeline of diffusers that computes with the very tensors of `model`: no weight is copied.

    It is a StableDiffusionPipeline, or for weights of inpainting (9 channels) a StableDiffusionInpaintPipeline, on
    the device and in the dtype of `model`, in eval mode, and it takes gradients. Its text encoder is transformers'
    CLIPTextModel; its scheduler does what `model.defaults` says, with the noise schedule, the kind of prediction and
    the spacing; pictures have the model's size. It has no safety checker. Steps and guidance are arguments of each
    call there: give it model.defaults.num_inference_steps and model.defaults.guidance_scale.

    What is changed in place there, as by an optimizer, is changed here too, and the other way round; samplers, and
    copies that `sd.fast` makes from then on, notice. Whatever gives one side new memory parts the two: `.to()` to
    another device, dtype or memory format, or resized embeddings. So move the model first, and share it then. Weights
    that are still in their file are read first; what `sd.lora` has added goes over merged. One tensor is a copy: the
    table of tokens of a model with words by `sd.textual_inversion`, which lies in two pieces here.

    Raises CompareError, a ValueError of one sentence, where diffusers is not installed, where it has no such
    scheduler, and where a part has weights of several dtypes, as a copy by `sd.fast` may have.
    """
    reference.diffusers()
    check_one_kind(model)
    inpaints = model.unet.config.in_channels != model.vae.config.z_channels
    kind = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    return reference.diffusers_pipeline(model, kind, reference.diffusers_scheduler(model.defaults.make_scheduler()))


def check_one_kind(model: StableDiffusion) -> None:
    """Raise CompareError unless each part has its weights in one place and dtype: diffusers' modules convert none."""
    for part, owner in (("unet", model.unet), ("vae", model.vae), ("text", model.text)):
        kinds = sorted({f"{t.dtype} on {t.device}".removeprefix("torch.") for t in owner.state_dict().values()})
        if len(kinds) > 1:
            raise CompareError(
                f"The {names.PARTS[part]} has weights in {' and in '.join(kinds)}, which diffusers cannot compute "
                "with: give the model that sd.load returned, not the copy that sd.fast made of it."
            )


# ---- from there to here


def from_diffusers(pipe: Any) -> StableDiffusion:
    """A model that computes with the very tensors of a pipeline of diffusers: no weight is copied.

    pipe: a StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline or their like, of
    Stable Diffusion v1 or 2: UNet2DConditionModel with 4 channels, with 9 for inpainting, or one that is told its
    guidance (LCM), AutoencoderKL, transformers' CLIPTextModel and a CLIPTokenizer, on any device and in any dtype.
    It stays as it is.

    The model draws by the pipeline's scheduler, with its noise schedule, and in its size; in 50 steps (LCM: 4) at
    guidance 7.5. All that is in `model.defaults`. A safety checker is left out. See `to_diffusers` for what is
    shared, and what parts the two. Warns (UserWarning) where there is no such scheduler here, and says which is taken
    in its place.

    Raises CompareError where diffusers is not installed, and LoadError, by name, for what is no such pipeline or
    would draw something else here: other models (SDXL, Flux), a part that is missing, a LoRA that is loaded and not
    merged, a ControlNet, an IP-Adapter, FreeU, weights that are quantised or offloaded. Both are ValueErrors of one
    sentence.
    """
    name, modules = networks_of(pipe)
    with only_v1(name):
        unet: dict[str, Any] = json.loads(modules["unet"].to_json_string())  # which has lists for tuples
        configs = {
            "unet": unet_from_hub(unet),
            "vae": vae_from_hub(json.loads(modules["vae"].to_json_string())),
            "text": text_from_hub({**modules["text"].config.to_dict(), "architectures": None}),
        }
        scheduler = dict(pipe.scheduler.config) | {"_class_name": type(pipe.scheduler).__name__}
        left_out = scheduler.pop("_use_default_values", None) or ()
        check_schedule(scheduler)
    check_nothing_beside(name, pipe)
    found = Source(name, "pipeline", {}, [], Path(), configs)
    for part, module in modules.items():
        found.parts[part] = rename(part, plain_tensors(name, part, module), configs)
    refuse_other_kinds(found)
    texts = texts_of(name, pipe.tokenizer)
    if (padding := pipe.tokenizer.pad_token_id) not in (None, pipe.tokenizer.eos_token_id):
        configs["text"]["padding"] = padding  # of SD 2
    found.family = names.SD2 if configs["unet"].get("use_linear_in_transformer") else names.SD1
    sides = unet.get("sample_size") or 64
    height, width = (sides, sides) if isinstance(sides, int) else sides
    factor = 2 ** (len(configs["vae"]["ch_mult"]) - 1)
    found.size = factor * max(height, width)
    found.defaults = defaults_of_pipeline(scheduler, left_out, name)
    if found.family == names.SD2 and is_turbo(called(str(getattr(pipe, "name_or_path", None) or ""))):
        found.defaults = as_turbo(found.defaults)
    if height != width:
        found.defaults = replace(found.defaults, height=factor * height, width=factor * width)
    model = build(found, {}, texts)
    check_tokens(model, name, pipe.tokenizer)
    model.name = str(getattr(pipe, "name_or_path", None) or name)
    model.files = WeightFiles()  # it is of no file
    return model


def networks_of(pipe: Any) -> tuple[str, dict[str, Any]]:
    """What to call a pipeline, and its three networks. Raises LoadError unless they are of the classes of v1."""
    kind = type(pipe).__name__
    if not isinstance(pipe, reference.diffusers().DiffusionPipeline):
        raise LoadError(
            f"from_diffusers takes a pipeline of diffusers, such as a StableDiffusionPipeline, not {kind!r}: a file, "
            "a folder or a repository is loaded by sd.load."
        )
    found = {}
    for part, (key, wanted) in PARTS.items():
        module = getattr(pipe, key, None)
        module = getattr(module, "_orig_mod", module)  # where torch.compile has wrapped it
        if not any(base.__name__ == wanted for base in type(module).__mro__):
            raise no_v1(kind, key, "none" if module is None else type(module).__name__, wanted)
        found[part] = module
    for key, wanted in (("tokenizer", "CLIPTokenizer"), ("scheduler", "PNDMScheduler or another one")):
        if getattr(pipe, key, None) is None:
            raise no_v1(kind, key, "none", wanted)
    return kind, found


def no_v1(kind: str, key: str, has: str, wanted: str) -> LoadError:
    return LoadError(
        f"{kind} is no whole pipeline of Stable Diffusion v1: its {key} is {has}, where {wanted} is expected; give a "
        "StableDiffusionPipeline with all its parts."
    )


def check_nothing_beside(name: str, pipe: Any) -> None:
    """Raise LoadError where more than the three networks decides what the pipeline draws."""
    for key, value in pipe.components.items():
        if value is not None and key not in BESIDE | {key for key, _ in PARTS.values()}:
            raise LoadError(
                f"{name} has a {key}, which would be left out: make a pipeline without it first, by "
                "StableDiffusionPipeline.from_pipe(pipe, torch_dtype=pipe.dtype), which shares the tensors."
            )
    for what, there, end in (
        ("an IP-Adapter loaded", getattr(pipe.unet, "encoder_hid_proj", None) is not None, "unload_ip_adapter"),
        ("FreeU switched on", any(getattr(b, "s1", None) is not None for b in pipe.unet.up_blocks), "disable_freeu"),
    ):
        if there:
            raise LoadError(f"{name} has {what}, which is not here: call pipe.{end}() first.")


def plain_tensors(name: str, part: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a part by the Hub's names. Raises LoadError for what cannot be computed with as it is."""
    tensors = {key: tensor for key, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    what = names.PARTS[part]
    if any(".base_layer." in key or "lora_" in key for key in tensors):
        raise LoadError(
            f"{name} has a LoRA that is loaded and not merged into the weights of its {what}: call pipe.fuse_lora(), "
            "if you have not, and then pipe.unload_lora_weights()."
        )
    for key, tensor in tensors.items():
        if tensor.is_meta or hasattr(module, "_hf_hook"):
            raise LoadError(
                f"{name} has its {what} offloaded, so that weights come and go: call pipe.remove_all_hooks(), or "
                "load it again without offloading."
            )
        plain = type(tensor) is Tensor
        if not (plain and tensor.dtype in DTYPES) and not key.endswith("position_ids"):
            kind = str(tensor.dtype).removeprefix("torch.") if plain else type(tensor).__name__
            raise LoadError(
                f"{name} has a {what} with quantised weights ({key} is {kind}): load it in float16, bfloat16 or "
                "float32."
            )
    return tensors


def texts_of(name: str, tokenizer: Any) -> dict[str, str]:
    """The files of a tokenizer of transformers, with the words that were added to it. Raises LoadError."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            texts = read_tokenizer(Path(folder))
    except (AttributeError, OSError, ValueError) as error:
        raise LoadError(f"{name} has a tokenizer that cannot be read ({error}): give it a CLIPTokenizer.") from None
    if texts is None:
        raise LoadError(f"{name} has a {type(tokenizer).__name__} for its tokenizer: give it a CLIPTokenizer.")
    return texts


def check_tokens(model: StableDiffusion, name: str, tokenizer: Any) -> None:
    """Raise LoadError unless the pipeline's tokenizer numbers texts, and fills them up, as the model's does."""
    length = model.text.config.max_position_embeddings
    for text in PROBES:
        theirs = tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
        if list(theirs) != list(model.text.chunks(text)[0].ids):
            raise LoadError(
                f"{name} has a tokenizer that numbers the text {text!r} otherwise than CLIP's, or fills it up with "
                "another token than the end of the text: give it the CLIPTokenizer of Stable Diffusion v1."
            )


def defaults_of_pipeline(config: Mapping[str, Any], left_out: Collection[str], name: str) -> Defaults:
    """The defaults of a model that draws by a scheduler with this config, in which every value stands.

    An option that was left out when the scheduler was made stays open: another solver has its own value for it.
    """
    schedule = NoiseSchedule(**{f.name: config[f.name] for f in fields(NoiseSchedule) if f.name in config})
    defaults = defaults_of(config, schedule, name)
    fewer = replace(defaults, options={k: v for k, v in defaults.options.items() if k not in left_out})
    return fewer if fewer.make_scheduler() == defaults.make_scheduler() else defaults

"""Small models with random weights, and files of them in the true layouts."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

import sd
from sd.compare.reference import SMALL_TEXT as TEXT
from sd.compare.reference import SMALL_UNET as UNET
from sd.compare.reference import SMALL_VAE as VAE
from sd.compare.reference import (
    diffusers_pipeline,
    diffusers_unet,
    diffusers_vae,
    hub_tensors,
    random_tensors,
    tokenizer_files,
    transformers_text,
)
from sd.compare.reference import random_model as make_model
from sd.text import CLIPText, TextConfig
from sd.weights import names
from sd.weights.tokenizer import bytes_to_letters

__all__ = ["TEXT", "UNET", "VAE", "bytes_to_letters", "diffusers_unet", "diffusers_vae", "hub_tensors", "make_model",
           "random_tensors", "tokenizer_files"]  # fmt: skip


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files().items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def compvis_tensors(model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    """All weights under the names of a CompVis checkpoint."""
    return {
        names.PREFIXES[part] + name: tensor.detach().clone()
        for part, owner in (("unet", model.unet), ("vae", model.vae), ("text", model.text))
        for name, tensor in owner.state_dict().items()
    }


def open_clip_tensors(text: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The weights of a text encoder as OpenCLIP has them in a file of SD 2, with one layer more, for nothing."""
    prefix, blocks = names.OPEN_CLIP, names.OPEN_CLIP + "transformer.resblocks."
    result = {
        prefix + "token_embedding.weight": text["embeddings.token_embedding.weight"],
        prefix + "positional_embedding": text["embeddings.position_embedding.weight"],
        prefix + "text_projection": torch.zeros(3, 3),
        prefix + "logit_scale": torch.zeros(()),
        blocks + f"{layers}.ln_1.weight": torch.zeros(3),
        blocks + f"{layers}.attn.in_proj_weight": torch.zeros(9, 3),
    }
    kinds = ("weight", "bias")
    result |= {f"{prefix}ln_final.{kind}": text[f"final_layer_norm.{kind}"] for kind in kinds}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    for i in range(layers):
        ours = f"encoder.layers.{i}."
        for kind in kinds:
            result |= {f"{blocks}{i}.{a}.{kind}": text[f"{ours}{b}.{kind}"] for a, b in parts.items()}
            joined = torch.cat([text[f"{ours}self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
            result[f"{blocks}{i}.attn.in_proj_{kind}"] = joined
    return result


def sd2_tensors(model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    """All weights as a single file of Stable Diffusion 2 has them."""
    kept = {n: t for n, t in compvis_tensors(model).items() if not n.startswith("cond_stage_model")}
    return kept | open_clip_tensors(model.text.state_dict(), model.text.config.num_hidden_layers)


def extras() -> dict[str, torch.Tensor]:
    """What CompVis checkpoints hold beside the weights."""
    buffers = [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "posterior_variance",
        "logvar",
    ]
    return {
        **{name: torch.linspace(0, 1, 10) for name in buffers},
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
    }


def write_ckpt(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A file as PyTorch Lightning 1.4.2 wrote it, ModelCheckpoint as a dict key included."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    made = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = made  # type: ignore[attr-defined]
    parents = ["pytorch_lightning", "pytorch_lightning.callbacks"]
    sys.modules |= {p: types.ModuleType(p) for p in parents} | {name: module}
    try:
        content = {
            "epoch": 2,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": {**extras(), **tensors},
            "callbacks": {made: {"best_model_score": torch.tensor(0.5)}},
            "lr_schedulers": [],
        }
        torch.save(content, path, pickle_protocol=2)
    finally:
        for p in [*parents, name]:
            del sys.modules[p]
    return path


def ema_tensors(model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    """EMA weights as full checkpoints hold them: half of the others here, to be told from them."""
    state = model.unet.state_dict()
    return {flat: state[name] / 2 for name, flat in names.ema_names(state).items()}


def write_hub(folder: Path, model: sd.StableDiffusion, *, old_vae: bool = False, suffix: str = "safetensors") -> Path:
    """A folder of the Hub's layout, its configs by diffusers and transformers themselves."""
    from diffusers import PNDMScheduler

    diffusers_unet(model).save_config(folder / "unet")
    diffusers_vae(model).save_config(folder / "vae")
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    schedule |= {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    schedule["prediction_type"] = model.defaults.prediction_type
    PNDMScheduler.from_config(schedule).save_config(folder / "scheduler")
    config = transformers_text(model.text).config
    config.architectures = ["CLIPTextModel"]
    config.save_pretrained(folder / "text_encoder")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    tokenizer |= {"pad_token": "!"} if model.text.config.padding == 0 else {}
    (write_tokenizer(folder / "tokenizer") / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "PNDMScheduler"}
    index = {"_class_name": "StableDiffusionPipeline"} | {k: ["diffusers", v] for k, v in parts.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    tensors = hub_tensors(model)
    if old_vae:
        for new, old in names.OLD_VAE_ATTENTION.items():
            for name in list(tensors["vae"]):
                if f"attentions.0.{new}." in name:
                    tensors["vae"][name.replace(f".{new}.", f".{old}.")] = tensors["vae"].pop(name)
    tensors["text"] = {f"text_model.{n}": t for n, t in model.text.state_dict().items()}
    tensors["text"]["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for part, where in (("unet", "unet"), ("vae", "vae"), ("text", "text_encoder")):
        stem = (
            "diffusion_pytorch_model" if part != "text" else "model" if suffix == "safetensors" else "pytorch_model"
        )
        path = folder / where / f"{stem}.{suffix}"
        if suffix == "safetensors":
            save_file({n: t.contiguous() for n, t in tensors[part].items()}, path)
        else:
            torch.save(tensors[part], path)
    return folder


def full_size_tensors(dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Every tensor of the full-size model, all zeros, under CompVis names."""
    with torch.device("meta"):
        parts = {"unet": sd.UNet(), "vae": sd.VAE(), "text": CLIPText(TextConfig())}
    return {
        names.PREFIXES[part] + name: torch.zeros(tensor.shape, dtype=dtype, device=device)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def write_full_size(folder: Path, hub: bool = False) -> tuple[Path, Path]:
    """Random weights of the full size in float16: a self-contained file, and a folder of the Hub's layout."""
    model = make_model(sd.UNetConfig(), sd.VAEConfig(), TextConfig(), size=512).to(dtype=torch.float16)
    sd.save(model, folder / "full.safetensors")
    if hub:
        write_hub(folder / "hub", model)
    return folder / "full.safetensors", folder / "hub"


def draw(model, prompt="a red star", sampler=sd.SimpleSampler, **call):
    return sampler(model)(prompt, **{"num_inference_steps": 3, "output_type": "latent", **call})


def diffusers_images(
    model: sd.StableDiffusion,
    scheduler,
    prompt="a red star above a blue ring",
    kind="StableDiffusionPipeline",
    seeds=(3,),
    parts=None,
    **options,
):
    """What one of diffusers' pipelines draws with the same weights, and transformers' text encoder and tokenizer."""
    pipeline = diffusers_pipeline(model, kind, scheduler, **(parts or {}))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipeline(prompt, generator=generators if len(seeds) > 1 else generators[0], **options).images

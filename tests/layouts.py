"""Small models with random weights, and files of them in the true layouts."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

import sd
from sd import names
from sd.text import TextConfig, TextEncoder, text_shapes

UNET = sd.UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=8,
    context_dim=64,
)
VAE = sd.VAEConfig(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1)
TEXT = TextConfig(vocab_size=517, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)


def bytes_to_letters() -> list[str]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def tokenizer_files() -> dict[str, str]:
    """A CLIP tokenizer of single bytes, with two merges."""
    letters = bytes_to_letters()
    tokens = [
        *letters,
        *(c + "</w>" for c in letters),
        "st",
        "ar</w>",
        "star</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return {
        "vocab.json": json.dumps({t: i for i, t in enumerate(tokens)}),
        "merges.txt": "#version: 0.2\ns t\na r</w>\nst ar</w>\n",
    }


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files().items():
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def random_tensors(shapes: dict[str, torch.Size], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a size at which nothing dies out or blows up."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        one = 0.1 * noise + name.endswith("weight")  # biases about 0, scales of norms about 1
        state[name] = (noise / shape[1:].numel() ** 0.5 if len(shape) > 1 else one).to(dtype)
    return state


def make_model(
    unet: sd.UNetConfig = UNET,
    vae: sd.VAEConfig = VAE,
    text: TextConfig = TEXT,
    dtype: torch.dtype = torch.float32,
    size: int = 64,
) -> sd.StableDiffusion:
    with torch.device("meta"):
        parts = [sd.UNet(unet), sd.VAE(vae)]
    for seed, part in enumerate(parts):
        shapes = {name: tensor.shape for name, tensor in part.state_dict().items()}
        part.load_state_dict(random_tensors(shapes, seed, dtype), assign=True)
    shapes = {name: torch.Size(shape) for name, shape in text_shapes(text).items()}
    files = tokenizer_files()
    encoder = TextEncoder(text, random_tensors(shapes, 2, dtype), files["vocab.json"], files["merges.txt"])
    return sd.StableDiffusion(parts[0].eval(), parts[1].eval(), encoder, name="tiny", size=size)


def compvis_tensors(model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    """All weights under the names of a CompVis checkpoint."""
    return {
        names.PREFIXES[part] + name: tensor.detach().clone()
        for part, owner in (("unet", model.unet), ("vae", model.vae), ("text", model.text))
        for name, tensor in owner.state_dict().items()
    }


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


def hub_tensors(model: sd.StableDiffusion) -> dict[str, dict[str, torch.Tensor]]:
    """The UNet's and the VAE's weights under the Hub's names."""
    unet, vae = model.unet.state_dict(), model.vae.state_dict()
    result = {
        "unet": {hub: unet[n] for n, hub in names.unet_to_hub(unet, model.unet.config).items()},
        "vae": {hub: vae[n] for n, hub in names.vae_to_hub(vae, model.vae.config).items()},
    }
    for name, tensor in result["vae"].items():
        if "attentions" in name and tensor.ndim == 4:
            result["vae"][name] = tensor[:, :, 0, 0]  # Linear there
    return result


def diffusers_unet(model: sd.StableDiffusion, assign: bool = True):
    """diffusers' UNet with the same weights."""
    from diffusers import UNet2DConditionModel

    c = model.unet.config
    attends = [2**i in c.attention_resolutions for i in range(len(c.channel_mult))]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=model.size // 8,
            block_out_channels=tuple(m * c.model_channels for m in c.channel_mult),
            layers_per_block=c.num_res_blocks,
            cross_attention_dim=c.context_dim,
            attention_head_dim=c.num_heads,
            norm_num_groups=c.num_groups,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
        )
    unet.load_state_dict(hub_tensors(model)["unet"], strict=True, assign=assign)
    return unet.eval()


def diffusers_vae(model: sd.StableDiffusion):
    """diffusers' VAE with the same weights."""
    from diffusers import AutoencoderKL

    c = model.vae.config
    levels = len(c.ch_mult)
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=tuple(m * c.ch for m in c.ch_mult),
            layers_per_block=c.num_res_blocks,
            latent_channels=c.z_channels,
            norm_num_groups=c.num_groups,
            scaling_factor=c.scale_factor,
            sample_size=model.size,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
    vae.load_state_dict(hub_tensors(model)["vae"], strict=True, assign=True)
    return vae.eval()


def write_hub(folder: Path, model: sd.StableDiffusion, *, old_vae: bool = False, suffix: str = "safetensors") -> Path:
    """A folder of the Hub's layout, its configs by diffusers and transformers themselves."""
    from diffusers import PNDMScheduler

    diffusers_unet(model).save_config(folder / "unet")
    diffusers_vae(model).save_config(folder / "vae")
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_config(folder / "scheduler")
    model.text.model.config.architectures = ["CLIPTextModel"]
    model.text.model.config.save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
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


def full_size_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the full-size model, all zeros, under CompVis names."""
    with torch.device("meta"):
        unet, vae = sd.UNet().state_dict(), sd.VAE().state_dict()
    shapes = {"unet": {n: t.shape for n, t in unet.items()}, "vae": {n: t.shape for n, t in vae.items()}}
    shapes["text"] = text_shapes(TextConfig())
    return {
        names.PREFIXES[part] + name: torch.zeros(shape, dtype=dtype)
        for part in shapes
        for name, shape in shapes[part].items()
    }


def write_full_size(folder: Path, hub: bool = False) -> tuple[Path, Path]:
    """Random weights of the full size in float16: a self-contained file, and a folder of the Hub's layout."""
    model = make_model(sd.UNetConfig(), sd.VAEConfig(), TextConfig(), size=512).to(dtype=torch.float16)
    sd.save(model, folder / "full.safetensors")
    if hub:
        write_hub(folder / "hub", model)
    return folder / "full.safetensors", folder / "hub"

"""What to measure against: models of random weights, and diffusers' models with the weights of ours.

Only `artist compare`, the tests and the benchmarks come here; nothing else in `sd` knows of diffusers, and here it
is imported by the functions that need it.
"""

from __future__ import annotations

import inspect
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import SpatialTransformer
from ..model import StableDiffusion
from ..prompts.encoder import TextEncoder
from ..prompts.tokenizer import END, START
from ..schedule import V1, NoiseSchedule
from ..text import CLIPText, TextConfig
from ..unet import Downsample, ResBlock, UNet, UNetConfig, Upsample
from ..vae import VAE, VAEConfig
from ..weights import names
from ..weights.tokenizer import bytes_to_letters


class CompareError(ValueError):
    """What keeps two models from being compared, in one sentence."""


# ---- random weights

SMALL_UNET = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=8,
    context_dim=64,
)
SMALL_VAE = VAEConfig(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1)
SMALL_TEXT = TextConfig(
    vocab_size=517, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1
)


def tokenizer_files() -> dict[str, str]:
    """A CLIP tokenizer of single bytes, with a few merges: the texts of vocab.json and merges.txt."""
    letters = bytes_to_letters()
    words = ["st", "ar</w>", "star</w>", "<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(c + "</w>" for c in letters), *words]
    return {
        "vocab.json": json.dumps({t: i for i, t in enumerate(tokens)}),
        "merges.txt": "#version: 0.2\ns t\na r</w>\nst ar</w>\n",
    }


def random_tensors(shapes: Mapping[str, torch.Size], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a size at which nothing dies out or blows up."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        one = 0.1 * noise + name.endswith("weight")  # biases about 0, scales of norms about 1
        state[name] = (noise / shape[1:].numel() ** 0.5 if len(shape) > 1 else one).to(dtype)
    return state


def random_model(
    unet: UNetConfig = SMALL_UNET,
    vae: VAEConfig = SMALL_VAE,
    text: TextConfig = SMALL_TEXT,
    dtype: torch.dtype = torch.float32,
    size: int = 64,
    name: str = "tiny",
) -> StableDiffusion:
    """A model of these sizes with random weights, always the same, and a tokenizer of single bytes."""
    with torch.device("meta"):
        parts = UNet(unet), VAE(vae), CLIPText(text)
    for seed, part in enumerate(parts):
        shapes = {key: tensor.shape for key, tensor in part.state_dict().items()}
        part.eval().load_state_dict(random_tensors(shapes, seed, dtype), assign=True)
    encoder = TextEncoder(parts[2].requires_grad_(False), tokenizer_files())
    return StableDiffusion(parts[0], parts[1], encoder, name=name, size=size)


def random_model_of(kind: str, dtype: torch.dtype) -> StableDiffusion:
    """ "full": Stable Diffusion v1's sizes, 1.07 billion parameters; "small": the same structure in 2.8 million."""
    if kind == "full":
        return random_model(UNetConfig(), VAEConfig(), TextConfig(), dtype, 512, "random weights, full size")
    if kind != "small":
        raise CompareError(f"Random weights come as 'full' or 'small', not {kind!r}.")
    return random_model(dtype=dtype, name="random weights, small size")


# ---- transformers, and diffusers, with our weights


def transformers_tokenizer(text: TextEncoder) -> Any:
    """transformers' CLIPTokenizer of the same files."""
    from transformers import AddedToken, CLIPTokenizer

    more: dict[str, Any] = {"model_max_length": text.config.max_position_embeddings}
    if words := json.loads(text.texts.get("added_tokens.json", "[]")):
        more["added_tokens_decoder"] = {word.pop("id"): AddedToken(**word) for word in words}
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 takes files only
        paths = [Path(folder, name) for name in ("vocab.json", "merges.txt")]
        for path in paths:
            path.write_text(text.texts[path.name], encoding="utf-8")
        return CLIPTokenizer(*map(str, paths), **more)


def transformers_text(text: TextEncoder) -> Any:
    """transformers' CLIPTextModel with the same weights, in the same memory; of either age of its layout."""
    from transformers import CLIPTextConfig, CLIPTextModel

    numbers = json.loads(text.texts["vocab.json"])
    ends = {"bos_token_id": numbers[START], "eos_token_id": numbers[END], "pad_token_id": numbers[END]}
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**asdict(text.config), **ends))
    prefix = "text_model." if any(n.startswith("text_model.") for n in model.state_dict()) else ""
    tensors = text.state_dict()
    model.load_state_dict({prefix + name: t for name, t in tensors.items()}, assign=True)
    device = next(iter(tensors.values())).device
    for module in model.modules():  # a buffer that no file holds, so it is still on meta
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(text.config.max_position_embeddings, device=device)[None]
    return model.eval().requires_grad_(False)


def diffusers() -> Any:
    """The package. Raises CompareError where it is not installed."""
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise CompareError(
            f"Comparing with diffusers needs it installed ({error}): pip install 'artificial-artist[compare]'."
        ) from None


def hub_tensors(model: StableDiffusion) -> dict[str, dict[str, Tensor]]:
    """The UNet's and the VAE's weights under the Hub's names: "unet" and "vae". No copies."""
    unet, vae = model.unet.state_dict(), model.vae.state_dict()
    result = {
        "unet": {hub: unet[n] for n, hub in names.unet_to_hub(unet, model.unet.config).items()},
        "vae": {hub: vae[n] for n, hub in names.vae_to_hub(vae, model.vae.config).items()},
    }
    for name, tensor in result["vae"].items():
        if "attentions" in name and tensor.ndim == 4:
            result["vae"][name] = tensor[:, :, 0, 0]  # Linear there
    return result


def diffusers_unet(model: StableDiffusion, assign: bool = True) -> Any:
    """diffusers' UNet2DConditionModel with the same weights; with `assign`, the very same memory."""
    c = model.unet.config
    attends = [2**i in c.attention_resolutions for i in range(len(c.channel_mult))]
    with torch.device("meta" if assign else "cpu"):
        unet = diffusers().UNet2DConditionModel(
            sample_size=model.size // 8,
            in_channels=c.in_channels,
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


def diffusers_vae(model: StableDiffusion) -> Any:
    """diffusers' AutoencoderKL with the same weights, in the same memory."""
    c = model.vae.config
    levels = len(c.ch_mult)
    with torch.device("meta"):
        vae = diffusers().AutoencoderKL(
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


CLASSES: dict[str, tuple[str, dict[str, Any]]] = {  # of each solver, diffusers' class, and what it needs to be told
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
}


def diffusers_scheduler(name: str, schedule: NoiseSchedule = V1, **options: Any) -> Any:
    """diffusers' scheduler for one of `CLASSES`, for a model that was trained so. Raises CompareError for others.

    options: of diffusers' class; those that it does not have are left out.
    """
    if name not in CLASSES:
        raise CompareError(f"There is no comparison of the scheduler {name!r}: choose among {', '.join(CLASSES)}.")
    kind, own = CLASSES[name]
    made = getattr(diffusers(), kind)
    wanted = asdict(schedule) | own | options
    known = inspect.signature(made.__init__).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return made(**{key: value for key, value in wanted.items() if key in known})


def diffusers_pipeline(model: StableDiffusion, kind: str, scheduler: Any) -> Any:
    """One of diffusers' pipelines with the same weights and this scheduler; it takes embeddings in place of texts."""
    unet, vae = diffusers_unet(model), diffusers_vae(model)
    with without_notices():
        pipe = getattr(diffusers(), kind)(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def without_notices() -> Iterator[None]:
    """Without what importing a pipeline says of packages that are missing, and of its own future."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


# ---- which part of diffusers' models does the work of which block of ours


def unet_counterparts(unet: UNet, theirs: Any) -> dict[str, Callable[..., Tensor]]:
    """Name of each of our UNet's input, middle and output blocks -> a function of its arguments."""
    table = names.unet_modules(unet.config)
    blocks: dict[str, Any] = {f"input_blocks.{i}": block for i, block in enumerate(unet.input_blocks)}
    blocks["middle_block"] = unet.middle_block
    blocks |= {f"output_blocks.{i}": block for i, block in enumerate(unet.output_blocks)}
    return {name: _in_sequence(name, block, table, theirs) for name, block in blocks.items()}


def _in_sequence(name: str, block: nn.ModuleList, table: Mapping[str, str], theirs: Any) -> Callable[..., Tensor]:
    def find(key: str) -> Any:
        return theirs.get_submodule(table[key].removesuffix(".conv"))

    layers = []
    for j, layer in enumerate(block):
        inner = {Downsample: ".op", Upsample: ".conv"}.get(type(layer), "")
        layers.append((type(layer), find(f"{name}.{j}{inner}")))

    def run(x: Tensor, emb: Tensor, context: Tensor, size: Any = None) -> Tensor:
        for kind, layer in layers:
            if kind is ResBlock:
                x = layer(x, emb)
            elif kind is SpatialTransformer:
                x = layer(x, encoder_hidden_states=context, return_dict=False)[0]
            else:
                x = layer(x, size) if kind is Upsample else layer(x)
        return x

    return run


def vae_counterparts(vae: VAE, theirs: Any) -> dict[str, Callable[..., Tensor]]:
    """Name of each block of our VAE -> diffusers' module for it, which takes the same argument."""
    last = len(vae.config.ch_mult) - 1
    table = {"quant_conv": theirs.quant_conv, "post_quant_conv": theirs.post_quant_conv}
    for side, levels in (("encoder", theirs.encoder.down_blocks), ("decoder", theirs.decoder.up_blocks)):
        half = getattr(theirs, side)
        table |= {f"{side}.conv_in": half.conv_in, f"{side}.mid": half.mid_block}
        table |= {f"{side}.norm_out": half.conv_norm_out, f"{side}.conv_out": half.conv_out}
        for i, level in enumerate(levels):
            table[f"encoder.down.{i}" if side == "encoder" else f"decoder.up.{last - i}"] = level
    return table

"""What to measure against: models of random weights, and diffusers' models with the weights of ours.

Only `artist compare`, the bridge (`bridge.py`), the tests and the benchmarks come here; nothing else in `sd` knows of
diffusers, and here it is imported by the functions that need it.
"""

from __future__ import annotations

import inspect
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.controlnet import ControlNet, config_for
from ..adapt.taesd import TinyVAE
from ..attention import SpatialTransformer
from ..model import StableDiffusion
from ..prompts.encoder import TextEncoder
from ..prompts.tokenizer import END, START
from ..schedule import V1, NoiseSchedule, Scheduler
from ..scheduler import make_scheduler, scheduler_name
from ..text import CLIPText, TextConfig
from ..unet import Downsample, ResBlock, UNet, UNetConfig, Upsample
from ..vae import VAE, VAEConfig
from ..weights import names
from ..weights.defaults import Defaults
from ..weights.tokenizer import bytes_to_letters


class CompareError(ValueError):
    """What keeps a model from standing beside diffusers, to be compared or shared, in one sentence."""


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
# Of Stable Diffusion 2: heads of as many channels on every level, and OpenCLIP's text encoder
SMALL_UNET_2 = replace(SMALL_UNET, num_head_channels=8, use_linear_in_transformer=True)
SMALL_TEXT_2 = replace(SMALL_TEXT, hidden_act="gelu", padding=0)
RANDOM = ("small", "small-sd2", "small-lcm", "full")


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


def random_controlnet(
    model: StableDiffusion, seed: int = 3, hint_widths: tuple[int, ...] | None = None
) -> ControlNet:
    """A ControlNet for a model, with random weights everywhere: also where training begins with zeros."""
    with torch.device("meta"):
        net = ControlNet(config_for(model.unet.config, hint_widths or (16, 32, 96, 256)))
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
    net.load_state_dict(random_tensors(shapes, seed, model.dtype), assign=True)
    net.to(model.device)
    net.name = "random weights"
    return net.eval()


def random_model_of(kind: str, dtype: torch.dtype) -> StableDiffusion:
    """ "full": Stable Diffusion v1's sizes, 1.07 billion parameters; "small": the same structure in 2.8 million.

    "small-sd2" has the structure of Stable Diffusion 2, and predicts v; "small-lcm" is told its guidance.
    """
    if kind == "full":
        return random_model(UNetConfig(), VAEConfig(), TextConfig(), dtype, 512, "random weights, full size")
    if kind == "small-sd2":
        model = random_model(SMALL_UNET_2, SMALL_VAE, SMALL_TEXT_2, dtype, name="random weights, small size, SD 2")
        v = NoiseSchedule(prediction_type="v_prediction")
        model.defaults = Defaults("ddim", prediction_type="v_prediction", schedule=v)
        return model
    if kind == "small-lcm":
        unet = replace(SMALL_UNET, guidance_dim=32)
        model = random_model(unet, dtype=dtype, name="random weights, small size, LCM")
        model.defaults = Defaults("lcm", 4, 8.5)
        return model
    if kind != "small":
        raise CompareError(f"Random weights come as {', '.join(RANDOM[:-1])} or {RANDOM[-1]}, not {kind!r}.")
    return random_model(dtype=dtype, name="random weights, small size")


# ---- transformers, and diffusers, with our weights


def transformers_tokenizer(text: TextEncoder) -> Any:
    """transformers' CLIPTokenizer of the same files."""
    from transformers import AddedToken, CLIPTokenizer

    more: dict[str, Any] = {"model_max_length": text.config.max_position_embeddings}
    if text.config.padding is not None:
        numbers = json.loads(text.texts["vocab.json"])
        more["pad_token"] = next(token for token, n in numbers.items() if n == text.config.padding)
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
    sizes = asdict(text.config)
    padding = sizes.pop("padding")
    ends = {"bos_token_id": numbers[START], "eos_token_id": numbers[END]}
    ends["pad_token_id"] = numbers[END] if padding is None else padding
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**sizes, **ends))
    prefix = "text_model." if any(n.startswith("text_model.") for n in model.state_dict()) else ""
    tensors = text.state_dict()
    model.load_state_dict({prefix + name: t for name, t in tensors.items()}, assign=True)
    device = next(iter(tensors.values())).device
    for module in model.modules():  # a buffer that no file holds, so it is still on meta
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(text.config.max_position_embeddings, device=device)[None]
    return model.eval()


def diffusers() -> Any:
    """The package. Raises CompareError where it is not installed."""
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise CompareError(
            f"This needs diffusers, which cannot be imported ({error}): pip install 'artificial-artist[compare]'."
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


def latent_size(model: StableDiffusion) -> int | tuple[int, int]:
    """The side of the latent of a picture of the size that the model draws by default; else height and width."""
    height, width = ((side or model.size) // model.vae.config.downsampling
                     for side in (model.defaults.height, model.defaults.width))  # fmt: skip
    return height if height == width else (height, width)


def head_counts(c: UNetConfig) -> int | tuple[int, ...]:
    """What diffusers calls attention_head_dim: the head count, or that of each level."""
    return tuple(c.heads(m * c.model_channels) for m in c.channel_mult) if c.num_head_channels else c.num_heads


def encoder_sizes(c: UNetConfig) -> dict[str, Any]:
    """What diffusers calls the sizes that a UNet and its ControlNet have in common."""
    attends = [2**i in c.attention_resolutions for i in range(len(c.channel_mult))]
    return {
        "block_out_channels": tuple(m * c.model_channels for m in c.channel_mult),
        "layers_per_block": c.num_res_blocks,
        "cross_attention_dim": c.context_dim,
        "attention_head_dim": head_counts(c),
        "use_linear_projection": c.use_linear_in_transformer,
        "norm_num_groups": c.num_groups,
        "transformer_layers_per_block": c.transformer_depth,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
    }


def diffusers_unet(model: StableDiffusion, assign: bool = True) -> Any:
    """diffusers' UNet2DConditionModel with the same weights; with `assign`, the very same memory."""
    c, own = model.unet.config, encoder_sizes(model.unet.config)
    with torch.device("meta" if assign else "cpu"):
        unet = diffusers().UNet2DConditionModel(
            sample_size=latent_size(model),
            in_channels=c.in_channels,
            out_channels=c.out_channels,
            time_cond_proj_dim=c.guidance_dim,
            up_block_types=tuple(kind.replace("Down", "Up") for kind in own["down_block_types"][::-1]),
            **own,
        )
    unet.load_state_dict(hub_tensors(model)["unet"], strict=True, assign=assign)
    return unet.eval()


def told_guidance(c: UNetConfig, scale: float, like: Tensor) -> Tensor | None:
    """The timestep_cond of LCM's UNets, as diffusers' pipelines make it: (B, guidance_dim) for latents like these."""
    if c.guidance_dim is None:
        return None
    embedding = diffusers().LatentConsistencyModelPipeline.get_guidance_scale_embedding
    return embedding(None, torch.tensor([scale - 1] * len(like)), embedding_dim=c.guidance_dim).to(like)


def hub_controlnet(net: ControlNet) -> dict[str, Tensor]:
    """A ControlNet's weights under the Hub's names. No copies."""
    tensors = net.state_dict()
    return {
        h: tensors[n] for n, h in names.controlnet_to_hub(tensors, net.config, len(net.config.hint_widths)).items()
    }


def diffusers_controlnet(net: ControlNet) -> Any:
    """diffusers' ControlNetModel with the same weights, in the same memory."""
    c: Any = net.config
    with torch.device("meta"):
        theirs = diffusers().ControlNetModel(
            in_channels=c.in_channels,
            conditioning_channels=c.hint_channels,
            conditioning_embedding_out_channels=c.hint_widths,
            global_pool_conditions=c.global_pool,
            **encoder_sizes(c),
        )
    theirs.load_state_dict(hub_controlnet(net), strict=True, assign=True)
    return theirs.eval()


def diffusers_vae(model: StableDiffusion) -> Any:
    """diffusers' AutoencoderKL, or AutoencoderTiny for TAESD, with the same weights, in the same memory."""
    if isinstance(model.vae, TinyVAE):
        return diffusers_tiny_vae(model.vae)
    c = model.vae.config
    levels = len(c.ch_mult)
    with torch.device("meta"):
        vae = diffusers().AutoencoderKL(
            in_channels=c.in_channels,
            out_channels=c.out_ch,
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


def diffusers_tiny_vae(vae: TinyVAE) -> Any:
    """diffusers' AutoencoderTiny. Raises CompareError for TAESD's decoder alone."""
    c, state = vae.config, vae.state_dict()
    if not any(name.startswith("encoder.") for name in state):
        raise CompareError("TAESD's decoder alone cannot be compared: put the file of its encoder beside it.")
    widths, rest = (c.ch,) * len(c.ch_mult), (c.num_res_blocks,) * (len(c.ch_mult) - 1)
    with torch.device("meta"):
        theirs = diffusers().AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=(1, *rest),
            num_decoder_blocks=(*rest, 1),
            latent_channels=c.z_channels,
        )
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval()


CLASSES = {  # of each solver, diffusers' class
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "ddpm": "DDPMScheduler",
}
COMPARED = [name for name in CLASSES if name != "dpmpp_sde"]  # whose noise is a Brownian tree there
# What a scheduler_config.json of Stable Diffusion says whatever the class: without it, those that have these settings
# would clip, end at abar 1, or begin with steps by Runge and Kutta.
ALWAYS = {"clip_sample": False, "skip_prk_steps": True}


def solver_config(solver: Scheduler) -> dict[str, Any]:
    """A scheduler_config.json for this solver, as plain data; `scheduler_from_config` is the way back.

    What has the class's own value is left out, as diffusers' from_config has it: so another class that is made from
    this config has its own value there.
    """
    if solver.name not in CLASSES:
        raise CompareError(f"diffusers has no scheduler for {solver.name!r}: choose among {', '.join(CLASSES)}.")
    apart = ("num_inference_steps", "schedule", "sigma_spacing", "eta")
    own = {f.name: getattr(solver, f.name) for f in fields(solver) if f.name not in apart}
    usual = {f.name: f.default for f in fields(solver)}
    config = asdict(solver.schedule) | ALWAYS | {key: value for key, value in own.items() if value != usual[key]}
    if spacing := getattr(solver, "sigma_spacing", ""):
        config[f"use_{spacing}_sigmas"] = True
    if solver.name == "dpmpp_2m_sde":
        config["algorithm_type"] = "sde-dpmsolver++"
    return {"_class_name": CLASSES[solver.name], **config}


def diffusers_scheduler(scheduler: str | Scheduler) -> Any:
    """diffusers' scheduler for one of ours, or for v1's of that name. Raises CompareError where it has none."""
    solver = make_scheduler(scheduler, 1) if isinstance(scheduler, str) else scheduler
    config = solver_config(solver)
    kind = getattr(diffusers(), config["_class_name"])
    known = inspect.signature(kind.__init__).parameters
    plain = asdict(V1) | ALWAYS | {key: config[key] for key in ("_class_name", "set_alpha_to_one")}
    for key, value in config.items():  # where a class has no set_alpha_to_one, that has no effect here either
        if key not in known and value != plain.get(key):
            raise CompareError(
                f"The {kind.__name__} of diffusers has no {key} = {value!r}, which {scheduler_name(solver)} of this "
                "model needs: choose another scheduler in model.defaults."
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kind(**{key: value for key, value in config.items() if key in known})
    except ImportError as error:
        package = "torchsde" if "torchsde" in str(error) else "scipy"
        raise CompareError(
            f"The {kind.__name__} of diffusers needs {package}, which is not installed: pip install {package}."
        ) from None
    # As from_config does: kept for other classes that are made from this config.
    made.register_to_config(**{key: value for key, value in config.items() if key not in known})
    return made


def diffusers_pipeline(model: StableDiffusion, kind: str, scheduler: Any, text: bool = True, **parts: Any) -> Any:
    """One of diffusers' pipelines with the same weights, in the same memory, and this scheduler.

    Without `text`, it takes embeddings in place of texts. parts: what it has beside those of a model.
    """
    with without_notices():
        pipe = getattr(diffusers(), kind)(
            vae=diffusers_vae(model),
            text_encoder=transformers_text(model.text) if text else None,
            tokenizer=transformers_tokenizer(model.text) if text else None,
            unet=diffusers_unet(model),
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    pipe.register_modules(scheduler=scheduler)  # not before: the pipeline would put 1 for its steps_offset
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


def unet_counterparts(unet: UNet | ControlNet, theirs: Any) -> dict[str, Callable[..., Tensor]]:
    """Name of each of our UNet's input, middle and output blocks -> a function of its arguments."""
    table = names.unet_modules(unet.config)
    blocks: dict[str, Any] = {f"input_blocks.{i}": block for i, block in enumerate(unet.input_blocks)}
    blocks["middle_block"] = unet.middle_block
    blocks |= {f"output_blocks.{i}": block for i, block in enumerate(getattr(unet, "output_blocks", ()))}
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


def tiny_blocks(vae: TinyVAE) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Name -> module, of the layers of TAESD's encoder and of its decoder."""
    encoder, decoder = (
        {f"{half}.layers.{i}": layer for i, layer in enumerate(vae.get_submodule(f"{half}.layers").children())}
        for half in ("encoder", "decoder")
    )
    return encoder, decoder


def vae_counterparts(vae: VAE, theirs: Any) -> dict[str, Callable[..., Tensor]]:
    """Name of each block of our VAE -> diffusers' module for it, which takes the same argument."""
    if isinstance(vae, TinyVAE):  # which has the Hub's names
        return {name: theirs.get_submodule(name) for part in tiny_blocks(vae) for name in part}
    last = len(vae.config.ch_mult) - 1
    table = {"quant_conv": theirs.quant_conv, "post_quant_conv": theirs.post_quant_conv}
    for side, levels in (("encoder", theirs.encoder.down_blocks), ("decoder", theirs.decoder.up_blocks)):
        half = getattr(theirs, side)
        table |= {f"{side}.conv_in": half.conv_in, f"{side}.mid": half.mid_block}
        table |= {f"{side}.norm_out": half.conv_norm_out, f"{side}.conv_out": half.conv_out}
        for i, level in enumerate(levels):
            table[f"encoder.down.{i}" if side == "encoder" else f"decoder.up.{last - i}"] = level
    return table

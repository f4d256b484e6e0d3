"""LoRA and its kin beside those who made them: PEFT's fusing, the forward of LyCORIS, pictures of diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sd
from sd.weights.unread import read_weights
from tests import loras
from tests.layouts import diffusers_images, diffusers_unet, make_model
from tests.loras import lora_tensors, write_lora

F64 = torch.float64


@pytest.fixture(scope="module")
def small():
    unet = sd.UNetConfig(
        model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), context_dim=64
    )
    return make_model(unet, dtype=F64)


def randomized(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(p.shape[-1], 1) ** 0.5)
    return module


# ---- LyCORIS: by the forward of its modules, for its get_diff_weight scales LoHa and LoKr twice

LYCORIS = {
    "LoCon": ("LoConModule", {}),
    "LoCon, rs": ("LoConModule", {"rs_lora": True}),
    "LoCon, Tucker": ("LoConModule", {"use_tucker": True}),
    "DoRA": ("LoConModule", {"weight_decompose": True}),
    "DoRA by columns": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "LoHa": ("LohaModule", {}),
    "LoHa, Tucker": ("LohaModule", {"use_tucker": True}),
    "LoHa with DoRA": ("LohaModule", {"weight_decompose": True}),
    "LoKr": ("LokrModule", {}),
    "LoKr, factor": ("LokrModule", {"factor": 4}),
    "LoKr, both": ("LokrModule", {"decompose_both": True, "factor": 8, "lora_dim": 1}),
    "LoKr, whole": ("LokrModule", {"full_matrix": True}),
    "LoKr, Tucker": ("LokrModule", {"use_tucker": True, "factor": 4, "lora_dim": 2}),
    "LoKr with DoRA": ("LokrModule", {"weight_decompose": True}),
    "IA3": ("IA3Module", {}),
    "IA3 on inputs": ("IA3Module", {"train_on_input": True}),
    "GLoRA": ("GLoRAModule", {}),
    "whole difference": ("FullModule", {}),
}
LAYERS = {
    "linear": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "middle_block.1.transformer_blocks.0.attn2.to_k",
    ),
    "1x1": ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
    "3x3": ("up_blocks.0.resnets.0.conv1", "output_blocks.0.0.in_layers.2"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", LYCORIS)
def test_the_forward_of_lycoris(small, tmp_path, kind, layer):
    pytest.importorskip("lycoris")
    from lycoris.modules import full, glora, ia3, locon, loha, lokr

    name, options = LYCORIS[kind]
    hub, own = LAYERS[layer]
    plain = small.unet.get_submodule(own)
    module_class = next(getattr(m, name) for m in (full, glora, ia3, locon, loha, lokr) if hasattr(m, name))
    options = {"lora_dim": 3, "alpha": 2.0, **options}
    with torch.no_grad():
        module = randomized(module_class("x", plain, 1.0, **options).double())
        x = torch.randn(2, plain.in_features if layer == "linear" else plain.in_channels, dtype=F64)
        x = x if layer == "linear" else x[:, :, None, None].repeat(1, 1, 5, 5) * torch.linspace(0, 1, 5, dtype=F64)
        wanted = module(x)
        tensors = module.state_dict()
        if "Full" in name:  # whose own takes off what only `apply_to` adds
            tensors = {"diff": module.weight} | ({} if module.bias is None else {"diff_b": module.bias})
    prefix = "lora_unet_" + hub.replace(".", "_")
    path = write_lora(tmp_path / "x.safetensors", {f"{prefix}.{w}": t.detach() for w, t in tensors.items()})
    model = sd.lora(small, path)
    with torch.no_grad():
        got = read_weights(model.unet).get_submodule(own)(x)
        assert (got - wanted).abs().max() < 1e-6 * wanted.abs().max()  # its alpha is in float32
        assert (plain(x) - wanted).abs().max() > 1e-3 * wanted.abs().max()


# ---- PEFT


def peft_configs():
    from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig

    linear = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
    both = [*linear, "conv1", "proj_in"]
    return {
        "LoRA": LoraConfig(r=3, lora_alpha=5, target_modules=both),
        "LoRA, rslora": LoraConfig(r=3, lora_alpha=5, target_modules=both, use_rslora=True),
        "LoRA, patterns": LoraConfig(
            r=3, lora_alpha=5, target_modules=both, rank_pattern={"to_q": 2}, alpha_pattern={"attn1.to_k": 9}
        ),
        "LoRA, bias": LoraConfig(r=3, lora_alpha=5, target_modules=["to_out.0", "conv1"], lora_bias=True),
        "DoRA": LoraConfig(r=3, lora_alpha=5, target_modules=both, use_dora=True),
        "LoHa": LoHaConfig(r=3, alpha=5, target_modules=both),
        "LoHa, effective convolutions": LoHaConfig(r=3, alpha=5, target_modules=both, use_effective_conv2d=True),
        "LoKr": LoKrConfig(r=3, alpha=5, target_modules=both),
        "LoKr, effective convolutions": LoKrConfig(
            r=2, alpha=5, target_modules=both, use_effective_conv2d=True, decompose_factor=4
        ),
        "LoKr, whole": LoKrConfig(r=32, alpha=5, target_modules=both),
        "IA3": IA3Config(target_modules=linear, feedforward_modules=["ff.net.2"]),
    }


PEFT = ["LoRA", "LoRA, rslora", "LoRA, patterns", "LoRA, bias", "DoRA", "LoHa", "LoHa, effective convolutions"]
PEFT += ["LoKr", "LoKr, effective convolutions", "LoKr, whole", "IA3"]


@pytest.mark.parametrize("kind", PEFT)
def test_the_fusing_of_peft(small, tmp_path, kind):
    """A folder as its save_pretrained writes it, and the UNet as its merge_and_unload leaves it."""
    peft = pytest.importorskip("peft")
    from sd.weights import names

    unet = diffusers_unet(small, assign=False).double()
    theirs = peft.get_peft_model(unet, peft_configs()[kind])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if any(mark in name for mark in ("lora_", "hada_", "lokr_", "ia3_")):
                noise = torch.randn(p.shape, generator=generator).to(p) / max(p.shape[-1], 1) ** 0.5
                p.copy_(noise.abs() + 0.5 if "magnitude" in name else noise)
    theirs.save_pretrained(tmp_path / "style")
    model = sd.lora(small, tmp_path / "style")
    assert not model.adapters[0].unmatched
    with torch.no_grad():
        fused = theirs.merge_and_unload().state_dict()
        ours = model.unet.state_dict()
    changed = 0
    for name, hub in names.unet_to_hub(ours, small.unet.config).items():
        w = fused[hub].view_as(ours[name])
        assert (ours[name] - w).abs().max() < 1e-6 * w.abs().max().clamp(min=1), name
        changed += int(not torch.equal(w, small.unet.get_parameter(name)))
    assert changed == sum(len(v) for v in model.adapters[0].file.deltas.items()) / 2 > 4


# ---- whole pictures of diffusers


CALL = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64}


def of_diffusers(model, path, scale, monkeypatch):
    """What diffusers draws with the file."""
    import diffusers

    real = diffusers.StableDiffusionPipeline.__call__

    def with_lora(pipe, *args, **kwargs):
        pipe.load_lora_weights(str(path), adapter_name="a")
        pipe.set_adapters(["a"], [scale])
        return real(pipe, *args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", with_lora)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = diffusers.DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False)
    return np.asarray(diffusers_images(model, scheduler, **CALL)[0]).astype(int)


def ours(model):
    call = CALL | {"seed": 3, "scheduler": "ddim"}
    return np.asarray(sd.SimpleSampler(model)("a red star above a blue ring", **call)[0]).astype(int)


@pytest.mark.parametrize("dialect", ["kohya", "PEFT", "diffusers (old)"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_whole_pictures_are_those_of_diffusers(tmp_path, monkeypatch, dialect, dtype):
    """Of the UNet and the text encoder, with one alpha: where they differ, diffusers takes one of them for all.

    In float32 a value may be 1 apart: diffusers multiplies beside each layer, and so rounds otherwise.
    """
    pytest.importorskip("peft")
    model = make_model(dtype=dtype)
    kind = loras.lora if dialect == "kohya" else loras.without_alpha
    names = {"unet": "diffusers, processors", "text": "diffusers, .lora_linear_layer"}
    tensors = {}
    for part in ("unet", "text"):
        places = [place for place in loras.attention_of(model) if place[0] == part]
        tensors |= lora_tensors(model, places, kind, names[part] if "old" in dialect else dialect)[0]
    path = write_lora(tmp_path / "style.safetensors", {n: t.to(dtype) for n, t in tensors.items()})
    theirs, drawn = of_diffusers(model, path, 0.7, monkeypatch), ours(sd.lora(model, path, 0.7))
    assert np.abs(theirs - drawn).max() <= (0 if dtype == F64 else 1)
    assert np.abs(ours(model) - drawn).max() > 8

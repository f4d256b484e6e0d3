"""Every layout of the same weights gives the same model; what is none is refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sd
import sd.weights.tokenizer
from sd.text import CLIPText, TextConfig
from sd.weights import configs, names
from sd.weights.contents import format_info
from sd.weights.source import shapes_of
from sd.weights.unread import computes_in
from tests.layouts import (
    compvis_tensors,
    diffusers_unet,
    diffusers_vae,
    ema_tensors,
    extras,
    make_model,
    tokenizer_files,
    write_ckpt,
    write_hub,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return write_tokenizer(folder / "tokenizer")


@pytest.fixture(scope="module")
def ckpt(tiny, folder):
    return write_ckpt(folder / "tiny.ckpt", compvis_tensors(tiny))


@pytest.fixture(scope="module")
def hub(tiny, folder):
    return write_hub(folder / "hub", tiny)


def identical(got, expected):
    a, b = compvis_tensors(got), compvis_tensors(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def draws_the_same(got, expected):
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    assert torch.equal(sd.SimpleSampler(got)("a star", **options), sd.SimpleSampler(expected)("a star", **options))


def test_ckpt(tiny, ckpt, tokenizer):
    model = sd.load(ckpt, tokenizer=tokenizer)
    identical(model, tiny)
    assert model.unet.config == tiny.unet.config
    assert model.vae.config == tiny.vae.config
    assert re.fullmatch("[0-9a-f]{10}", model.hash)
    draws_the_same(model, tiny)


def test_bare_state_dict(tiny, tmp_path, tokenizer):
    torch.save(compvis_tensors(tiny), tmp_path / "bare.ckpt")
    identical(sd.load(tmp_path / "bare.ckpt", tokenizer=tokenizer), tiny)


@pytest.mark.parametrize("prefixed", [True, False])
def test_safetensors(tiny, tmp_path, tokenizer, prefixed):
    tensors = compvis_tensors(tiny)
    if not prefixed:
        for prefix in names.PREFIXES.values():
            tensors = {n.removeprefix(prefix): t for n, t in tensors.items()}
    save_file({**tensors, **(extras() if prefixed else {})}, tmp_path / "a.safetensors")
    identical(sd.load(tmp_path / "a.safetensors", tokenizer=tokenizer), tiny)


def test_text_names_of_newer_transformers(tiny, tmp_path, tokenizer):
    tensors = {n.replace("transformer.text_model.", "transformer."): t for n, t in compvis_tensors(tiny).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    identical(sd.load(tmp_path / "a.safetensors", tokenizer=tokenizer), tiny)


@pytest.mark.parametrize("old_vae", [False, True])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hub_folder(tiny, tmp_path, old_vae, suffix):
    model = sd.load(write_hub(tmp_path / "hub", tiny, old_vae=old_vae, suffix=suffix))
    identical(model, tiny)
    assert model.size == 64
    draws_the_same(model, tiny)


def test_diffusers_reads_the_same_folder_alike(tiny, hub):
    diffusers = pytest.importorskip("diffusers")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    context = tiny.encode_prompt("a star")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(hub / "unet")  # without files of weights it would fail
    with torch.no_grad():
        assert torch.equal(theirs(x, t, context).sample, sd.load(hub).unet(x, t, context))
        vae = diffusers.AutoencoderKL.from_pretrained(hub / "vae")
        assert torch.equal(vae.decode(x / 0.18215).sample, sd.load(hub).vae.decode(x))


def test_full_ema(tiny, tmp_path, tokenizer, ckpt):
    path = write_ckpt(tmp_path / "full.ckpt", {**compvis_tensors(tiny), **ema_tensors(tiny)})
    identical(sd.load(path, tokenizer=tokenizer), tiny)
    averaged = sd.load(path, tokenizer=tokenizer, ema=True)
    for name, tensor in averaged.unet.state_dict().items():
        assert torch.equal(tensor, tiny.unet.state_dict()[name] / 2)
    with pytest.raises(sd.LoadError, match="no EMA weights"):
        sd.load(ckpt, tokenizer=tokenizer, ema=True)


def test_a_converted_file_needs_nothing_else(tiny, ckpt, hub, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sd.convert(ckpt, tmp_path / "a.safetensors", tokenizer=tokenizer)
    sd.convert(hub, tmp_path / "b.safetensors")
    sd.convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    for name in "abc":
        model = sd.load(tmp_path / f"{name}.safetensors")
        identical(model, tiny)
        draws_the_same(model, tiny)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:  # the official library reads it too
        assert "model.diffusion_model.input_blocks.0.0.weight" in file.keys()  # noqa: SIM118
        assert file.metadata()["format"] == "pt"
    with pytest.raises(sd.LoadError, match="exists"):
        sd.convert(ckpt, tmp_path / "a.safetensors", tokenizer=tokenizer)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_convert_to_half(tiny, ckpt, tokenizer, tmp_path):
    sd.convert(ckpt, tmp_path / "half.safetensors", dtype=torch.float16, tokenizer=tokenizer)
    model = sd.load(tmp_path / "half.safetensors", dtype=torch.float16)
    assert {t.dtype for t in compvis_tensors(model).values()} == {torch.float16}
    wide = sd.load(tmp_path / "half.safetensors")  # float32 on the CPU
    assert wide.dtype == torch.float32
    for name, tensor in compvis_tensors(wide).items():
        assert torch.equal(tensor, compvis_tensors(tiny)[name].half().float())


def test_tensors_stay_memory_mapped_and_the_file_stays_as_it_is(ckpt, tokenizer):
    before = ckpt.read_bytes()
    model = sd.load(ckpt, tokenizer=tokenizer)
    addresses = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.rstrip().endswith(ckpt.name):
                addresses.append([int(a, 16) for a in line.split()[0].split("-")])
    for p in [*model.unet.parameters(), *model.vae.parameters(), *model.text.state_dict().values()]:
        assert any(low <= p.data_ptr() < high for low, high in addresses)
    with torch.no_grad():
        next(model.unet.parameters()).zero_()
    assert ckpt.read_bytes() == before


def test_sizes_that_shapes_do_not_tell_can_be_given(tmp_path, tokenizer):
    four = make_model(unet=sd.UNetConfig(**{**vars(make_model().unet.config), "num_heads": 4}))
    path = write_ckpt(tmp_path / "four.ckpt", compvis_tensors(four))
    (tmp_path / "config.json").write_text(json.dumps({"unet": {"num_heads": 4}, "vae": {"scale_factor": 0.5}}))
    for config in (tmp_path / "config.json", {"unet": {"num_heads": 4}, "vae": {"scale_factor": 0.5}}):
        model = sd.load(path, tokenizer=tokenizer, config=config)
        assert model.unet.config.num_heads == 4
        assert model.vae.config.scale_factor == 0.5
    with pytest.raises(sd.LoadError, match="UNetConfig has no 'heads'"):
        sd.load(path, tokenizer=tokenizer, config={"unet": {"heads": 4}})
    with pytest.raises(sd.LoadError, match="A config is of the form"):
        sd.load(path, tokenizer=tokenizer, config={"heads": 4})


def changed(tiny, **changes):
    tensors = compvis_tensors(tiny)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


IN = "model.diffusion_model.input_blocks.0.0.weight"
TO_K = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_stage_model.decoder.conv_in.bias": None}, r"VAE: a tensor is missing \(decoder.conv_in.bias\)"),
        ({"model.diffusion_model.extra": torch.zeros(1)}, r"UNet: a tensor is surplus \(extra\)"),
        ({"something.else": torch.zeros(1)}, r"a tensor is surplus \(something.else\)"),
        ({"model.diffusion_model.out.0.bias": torch.zeros(3)}, r"out.0.bias is \(3,\), not \(32,\)"),
        ({IN: torch.zeros(32, 8, 3, 3)}, "holds InstructPix2Pix weights"),
        ({TO_K: torch.zeros(64, 2048)}, "holds SDXL weights"),
        ({"cond_stage_model.model.ln_final.weight": torch.zeros(2)}, "a tensor is surplus"),
        ({"conditioner.embedders.0.x": torch.zeros(2)}, "holds SDXL weights"),
        ({"lora_unet_down.lora_up.weight": torch.zeros(2)}, "holds a LoRA, not a model"),
        ({"model.diffusion_model.joint_blocks.0.x": torch.zeros(2)}, "holds SD 3 or Flux weights"),
    ],
)
def test_other_weights_are_refused_by_name(tiny, tmp_path, tokenizer, changes, message):
    path = tmp_path / "other.safetensors"
    save_file(changed(tiny, **changes), path)
    with pytest.raises(sd.LoadError, match=message) as caught:
        sd.load(path, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    assert "other.safetensors" in str(caught.value)
    format_info(sd.info(path))  # and yet it can be looked at


@pytest.mark.parametrize(("part", "name"), [("unet", "UNet"), ("vae", "VAE"), ("text", "text encoder")])
def test_an_absent_part_is_named(tiny, tmp_path, tokenizer, part, name):
    tensors = {n: t for n, t in compvis_tensors(tiny).items() if not n.startswith(names.PREFIXES[part])}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(sd.LoadError, match=f"has no {name}"):
        sd.load(tmp_path / "part.safetensors", tokenizer=tokenizer)


def test_files_that_are_no_weights(tmp_path, tokenizer):
    for content, message in (
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"", "empty"),
    ):
        for suffix in ("ckpt", "safetensors"):
            path = tmp_path / f"bad.{suffix}"
            path.write_bytes(content)
            for call in (sd.load, sd.info):
                with pytest.raises(sd.CheckpointError, match=message):
                    call(path)


@pytest.mark.parametrize("source", ["nothing.ckpt", "no/such/model.safetensors", "./here", "what is this"])
def test_no_such_source(source):
    with pytest.raises(sd.LoadError, match="There is no file or folder"):
        sd.load(source)


def change_config(folder, where, **changes):
    path = folder / where
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        ("unet/config.json", {"only_cross_attention": True}, "only_cross_attention"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config.json", {"attention_head_dim": [5, 10, 20]}, "head counts"),
        ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        ("text_encoder/config.json", {"architectures": ["T5Encoder"]}, "T5Encoder"),
        ("vae/config.json", {"shift_factor": 0.1}, "VAE is of a newer kind"),
    ],
)
def test_a_hub_config_of_another_model_is_refused(tiny, tmp_path, where, changes, message):
    folder = write_hub(tmp_path / "hub", tiny)
    change_config(folder, where, **changes)
    with pytest.raises(sd.LoadError, match=message):
        sd.load(folder)


def test_an_incomplete_folder_says_what_it_lacks(tiny, tmp_path):
    folder = write_hub(tmp_path / "hub", tiny)
    with pytest.raises(ValueError, match=r"no weights unet/diffusion_pytorch_model.fp16.*it has no variants"):
        sd.load(folder, variant="fp16")
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights vae/"):
        sd.load(folder)


def test_without_a_tokenizer_the_ways_are_listed(ckpt, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sd.weights.tokenizer, "PACKAGES", ())
    model = sd.load(ckpt)  # and its parts compute
    with torch.no_grad():
        assert model.unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 77, 64)).shape == (1, 4, 8, 8)
        assert model.vae.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)
    assert sd.describe(model)
    ways = r"brings no tokenizer.*tokenizer= .--tokenizer.*clip.*clip-vit-large-patch14.*converted"
    for call in (lambda: model.encode_prompt("a"), lambda: sd.convert(ckpt, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=ways) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(sd.LoadError, match=r"tokenizer folder .* cannot be read"):
        sd.load(ckpt, tokenizer=tmp_path)


def test_info(ckpt, hub, tiny):
    facts = sd.info(ckpt)
    assert facts["kind"] == "Stable Diffusion v1"
    assert facts["form"] == "CompVis file"
    assert facts["metadata"]["global_step"] == 470000
    assert not facts["ema"]
    assert not facts["tokenizer"]
    for part in ("unet", "vae"):
        assert facts["parts"][part]["parameters"] == sum(p.numel() for p in getattr(tiny, part).parameters())
    assert facts["parts"]["unet"]["dtypes"] == ["float32"]
    assert sd.info(hub)["tokenizer"]
    text = format_info(facts)
    assert "UNet" in text
    assert "model_channels=32" in text


def test_names_of_the_full_model_are_those_of_diffusers_and_transformers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet, vae = sd.UNet(), sd.VAE()
        their_unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
        their_vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    assert set(names.unet_to_hub(unet.state_dict(), unet.config).values()) == set(their_unet.state_dict())
    assert set(names.vae_to_hub(vae.state_dict(), vae.config).values()) == set(their_vae.state_dict())
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    with torch.device("meta"):
        shapes = shapes_of(CLIPText(TextConfig()))
    assert len(shapes) == 196
    assert {n.removeprefix("text_model."): tuple(t.shape) for n, t in text.state_dict().items()} == shapes


def test_sizes_are_read_off_a_full_size_file():
    with torch.device("meta"):
        unet, vae, text = sd.UNet(), sd.VAE(), CLIPText(TextConfig())
    assert sd.UNetConfig(**configs.infer_unet(unet.state_dict())) == sd.UNetConfig()
    assert sd.VAEConfig(**configs.infer_vae(vae.state_dict())) == sd.VAEConfig()
    assert TextConfig(**configs.infer_text(text.state_dict())) == TextConfig()


def test_peer_models_have_the_same_weights(tiny):
    """Under the same names, so that each weight does the same work: a wrong one would change what comes out."""
    pytest.importorskip("diffusers")
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), tiny.encode_prompt("a star")
    with torch.no_grad():
        assert torch.equal(diffusers_unet(tiny)(x, t, context).sample, tiny.unet(x, t, context))
        assert torch.equal(diffusers_vae(tiny).decode(x / 0.18215).sample, tiny.vae.decode(x))


def test_loading_needs_neither_diffusers_nor_transformers(ckpt, tokenizer):
    """transformers takes seconds to import: only the first prompt waits for it."""
    code = """
import sys, sd
sd.load(sys.argv[1], tokenizer=sys.argv[2])
assert sd.to_diffusers and sd.from_diffusers
assert not {"diffusers", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, ckpt, tokenizer], check=True)


def test_a_damaged_header_of_ours_is_refused(tiny, tmp_path):
    save_file(compvis_tensors(tiny), tmp_path / "a.safetensors", metadata={"sd": "{"})
    with pytest.raises(sd.LoadError, match="damaged metadata"):
        sd.load(tmp_path / "a.safetensors")


def test_a_tokenizer_that_does_not_fit_is_refused(ckpt, tmp_path):
    files = tokenizer_files()
    vocab = json.loads(files["vocab.json"])
    files["vocab.json"] = json.dumps({**vocab, "more": 10_000})
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(sd.LoadError, match="do not fit"):
        sd.load(ckpt, tokenizer=tmp_path)


def test_parts_on_different_devices():
    model = sd.load("shapes", device={"unet": "cpu", "vae": "meta"}, dtype=torch.float32)
    assert computes_in(model.vae)[0].type == "meta"
    assert {p.device.type for p in model.unet.parameters()} == {"cpu"}
    assert computes_in(model.text.model)[0].type == "cpu"
    latents = sd.SimpleSampler(model)("a red star", num_inference_steps=2, output_type="latent")
    assert latents.device.type == "cpu"
    assert model.vae.decode(latents.to("meta")).shape == (1, 3, 128, 128)
    assert {p.device.type for p in model.vae.parameters()} == {"meta"}


@pytest.mark.parametrize("device", [{"vae": "cpu"}, {"unet": "cpu", "clip": "cpu"}])
def test_what_is_no_placement_is_refused(device):
    with pytest.raises(sd.LoadError, match="device is a name, or like"):
        sd.load("shapes", device=device)


def test_lazy_no_longer_matters():
    eager, lazy = (sd.load("shapes", device={"unet": "cpu", "vae": "meta"}, lazy=value) for value in (False, True))
    assert computes_in(eager.vae) == computes_in(lazy.vae) == (torch.device("meta"), torch.float16)
    assert eager.dtype == lazy.dtype == torch.float32
    assert {p.dtype for p in lazy.unet.parameters()} == {torch.float16}  # as in the file

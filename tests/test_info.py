"""`info` says no problem exactly where `load` succeeds: files and folders of many kinds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import sd
from sd.weights import names
from sd.weights.contents import format_info
from tests.layouts import compvis_tensors, ema_tensors, extras, write_ckpt, write_hub

UNET, VAE, TEXT = names.PREFIXES.values()
FIRST = f"{UNET}input_blocks.0.0.weight"


def without(tensors, *beginnings):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def flat_attention(tensors):
    """The VAE's attention as linear layers."""
    return {name: t[:, :, 0, 0] if ".mid.attn_1." in name and t.ndim == 4 else t for name, t in tensors.items()}


NEWER = [(".attn_1.q.", ".attn_1.to_q."), (".attn_1.k.", ".attn_1.to_k."), (".attn_1.v.", ".attn_1.to_v.")]
NEWER += [(".attn_1.proj_out.", ".attn_1.to_out.0."), (".attn_1.norm.", ".attn_1.group_norm.")]
V = {"modelspec.prediction_type": "v"}

# name -> what a single file holds, of the tensors of a small model; whether it loads
FILES = {
    "whole": (lambda t: t, True),
    "with its extras": (lambda t: t | extras(), True),
    "bare UNet names": (lambda t: renamed(t, (UNET, "")), True),
    "text encoder by transformers 5.6": (lambda t: renamed(t, ("transformer.text_model.", "transformer.")), True),
    "a projection of the text": (lambda t: t | {"text_projection.weight": torch.zeros(2, 2)}, True),
    "a projection, prefixed": (lambda t: t | {f"{TEXT}text_projection.weight": torch.zeros(2, 2)}, True),
    "the VAE's attention, newer names": (lambda t: renamed(t, *NEWER), True),
    "the VAE's attention, linear": (flat_attention, True),
    "the VAE's attention, both": (lambda t: flat_attention(renamed(t, *NEWER)), True),
    "half precision": (lambda t: {n: v.half() for n, v in t.items()}, True),
    "no UNet": (lambda t: without(t, UNET), False),
    "no VAE": (lambda t: without(t, VAE), False),
    "no text encoder": (lambda t: without(t, TEXT), False),
    "the UNet alone": (lambda t: without(t, VAE, TEXT), False),
    "the VAE alone": (lambda t: without(t, UNET, TEXT), False),
    "the VAE alone, bare names": (lambda t: renamed(without(t, UNET, TEXT), (VAE, "")), False),
    "the text encoder alone": (lambda t: without(t, UNET, VAE), False),
    "the first tensor missing": (lambda t: without(t, FIRST), False),
    "a tensor of the UNet missing": (lambda t: without(t, f"{UNET}middle_block.0.in_layers.2.bias"), False),
    "a tensor of the VAE missing": (lambda t: without(t, f"{VAE}decoder.conv_out.bias"), False),
    "a tensor of the text encoder missing": (lambda t: without(t, f"{TEXT}final_layer_norm.bias"), False),
    "the VAE's attention missing": (lambda t: without(t, f"{VAE}decoder.mid.attn_1."), False),
    "a surplus tensor": (lambda t: t | {f"{UNET}more.weight": torch.zeros(1)}, False),
    "a strange tensor": (lambda t: t | {"something.else": torch.zeros(1)}, False),
    "a tensor of another shape": (lambda t: t | {f"{UNET}out.2.bias": torch.zeros(5)}, False),
    "a tensor of whole numbers": (lambda t: t | {f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.int32)}, False),
    "an empty tensor": (lambda t: t | {f"{UNET}out.2.bias": torch.zeros(0)}, False),
    "a scalar": (lambda t: t | {FIRST: torch.zeros(())}, False),
    "no channels": (lambda t: t | {FIRST: torch.zeros(0, 4, 3, 3)}, False),
    "inpainting": (lambda t: t | {FIRST: torch.zeros(len(t[FIRST]), 9, 3, 3)}, True),
    "SD 2": (lambda t: renamed(t, (TEXT, "cond_stage_model.model.")), False),
    "SDXL": (lambda t: t | {f"{UNET}label_emb.0.0.weight": torch.zeros(2, 2)}, False),
    "ControlNet": (lambda t: {f"control_model.{n.removeprefix(UNET)}": v for n, v in t.items()}, False),
    "LoRA": (lambda t: {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 4)}, False),
    "BERT": (lambda t: {f"embeddings.{n}.weight": torch.zeros(4, 4) for n in ("word_embeddings", "position")}, False),
    "an optimizer": (lambda t: {f"state.{n}": torch.zeros(4) for n in range(4)}, False),
    "v, by a tensor": (lambda t: t | {"v_pred": torch.zeros(0)}, True),
}
METADATA = {
    "v, by modelspec": (V, True),
    "v, by kohya's trainer": ({"ss_v_parameterization": "True"}, True),
    "something newer, by modelspec": ({"modelspec.prediction_type": "flow"}, False),
    "epsilon, by modelspec": ({"modelspec.prediction_type": "epsilon"}, True),
    "epsilon, by kohya's trainer": ({"ss_v_parameterization": "False"}, True),
}


def agree(path, loads):
    """What `info` says is what `load` does."""
    try:
        problem = sd.info(path)["problem"]
    except ValueError as error:
        problem = str(error)
    if loads:
        sd.load(path)
        assert problem is None
    else:
        with pytest.raises(ValueError, match=r"\.$") as caught:
            sd.load(path)
        assert problem == str(caught.value)
        assert len(problem) < 600
        assert problem.isprintable()


@pytest.fixture(scope="module")
def tensors(tiny):
    return compvis_tensors(tiny)


@pytest.mark.parametrize("name", FILES)
def test_a_file(name, tensors, tmp_path):
    change, loads = FILES[name]
    kept = {n: t.clone().contiguous() for n, t in change(tensors).items()}
    save_file(kept, tmp_path / "a.safetensors")
    agree(tmp_path / "a.safetensors", loads)
    torch.save({"state_dict": kept}, tmp_path / "a.ckpt")
    agree(tmp_path / "a.ckpt", loads)


@pytest.mark.parametrize("name", METADATA)
def test_what_a_header_says_that_the_model_predicts(name, tensors, tmp_path):
    metadata, loads = METADATA[name]
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "a.safetensors", metadata)
    agree(tmp_path / "a.safetensors", loads)


@pytest.mark.parametrize(("text", "loads"), [('model:\n    parameterization: "v"\n', True),
                                             ("model:\n  parameterization: edm\n", False),
                                             ("model:\n  parameterization: eps\n", True)])  # fmt: skip
def test_what_a_config_beside_the_file_says_that_the_model_predicts(text, loads, tensors, tmp_path):
    path = write_ckpt(tmp_path / "a.ckpt", tensors)
    (tmp_path / "a.yaml").write_text(text)
    agree(path, loads)


HUB = {
    "as it is": ("unet/config.json", {}, True),
    "head counts in a list": ("unet/config.json", {"attention_head_dim": [4, 4]}, True),
    "blocks in a list": ("unet/config.json", {"layers_per_block": [1, 1]}, True),
    "other head counts": ("unet/config.json", {"attention_head_dim": [4, 8]}, False),
    "thousands of layers": ("unet/config.json", {"transformer_layers_per_block": 64, "layers_per_block": 16}, False),
    "fewer layers": ("unet/config.json", {"layers_per_block": 2}, False),
    "a projection of the text": (
        "text_encoder/config.json",
        {"architectures": ["CLIPTextModelWithProjection"]},
        True,
    ),
    "another text encoder": ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, False),
    "v": ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, True),
    "flow": ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, False),
    "no schedule": ("scheduler/scheduler_config.json", {"beta_start": -1}, False),
}


@pytest.mark.parametrize("name", HUB)
def test_a_folder(name, tiny, tmp_path_factory):
    whole = tmp_path_factory.getbasetemp() / "info-hub"
    if not whole.exists():
        write_hub(whole, tiny)
    where, changes, loads = HUB[name]
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("hub") / "hub")
    file = folder / where
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    if where.startswith("unet") and changes.get("layers_per_block") == [1, 1]:
        assert json.loads((whole / where).read_text())["layers_per_block"] == 1  # or this says nothing
    agree(folder, loads)


def test_ema_weights_are_no_problem(tiny, tensors, tmp_path):
    path = write_ckpt(tmp_path / "a.ckpt", tensors | ema_tensors(tiny))
    agree(path, True)
    assert "EMA weights   yes" in format_info(sd.info(path))

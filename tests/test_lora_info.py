"""What is told of a LoRA: `artist info`, `artist compare --lora`."""

from __future__ import annotations

import json

import pytest
import torch

import sd
from sd.adapt.adapter_facts import format_lora_info, lora_info
from sd.cli import main
from sd.compare.adapted import compare_lora
from tests import loras
from tests.layouts import make_model
from tests.loras import attention_of, lora_tensors, write_lora

PLACES = [("unet", "middle_block.1.proj_in"), ("text", "encoder.layers.0.mlp.fc1")]


def v1_tensors(kind="lora_down.weight", width=768):
    """Of two modules of Stable Diffusion v1 itself."""
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    other = "lora_te_text_model_encoder_layers_11_mlp_fc1"
    return {
        f"{key}.lora_down.weight": torch.zeros(4, width),
        f"{key}.lora_up.weight": torch.zeros(1280, 4),
        f"{key}.alpha": torch.tensor(4.0),
        f"{other}.lora_down.weight": torch.zeros(8, 768),
        f"{other}.lora_up.weight": torch.zeros(3072, 8),
        "lora_te_text_model_encoder_layers_12_mlp_fc1.alpha": torch.tensor(4.0),
    }


METADATA = {
    "ss_base_model_version": "sd_v1",
    "ss_tag_frequency": json.dumps({"10_cat": {"cat": 3, "sitting ": 1}, "5_dog": {"dog": 9, "sitting": 1}}),
}


def test_the_facts_of_a_file(tmp_path):
    path = write_lora(tmp_path / "style.safetensors", v1_tensors(), METADATA)
    facts = lora_info(path)
    assert facts["problem"] is None
    assert (facts["dialect"], facts["ranks"], facts["kinds"]) == ("kohya", [4, 8], ["LoRA"])
    assert (facts["base_model"], facts["base_model_said"]) == ("Stable Diffusion v1", "sd_v1")
    assert facts["trained_words"] == ["dog", "cat", "sitting"]
    assert facts["modules"] == {"unet": 1, "text": 1}
    assert facts["unmatched"] == ["lora_te_text_model_encoder_layers_12_mlp_fc1.alpha"]
    text = format_lora_info(facts)
    for words in (
        "LoRA, names as of kohya",
        "rank 4, 8",
        "it says 'sd_v1'",
        "dog, cat, sitting",
        "1 modules of the UNet",
    ):
        assert words in text
    json.dumps(facts)


def test_of_a_model_that_is_given(tmp_path):
    model = make_model()
    path = write_lora(tmp_path / "style.safetensors", lora_tensors(model, PLACES, loras.loha)[0])
    facts = lora_info(path, model)
    assert (facts["problem"], facts["kinds"], facts["modules"]) == (None, ["LoHa"], {"unet": 1, "text": 1})


def test_what_is_to_be_written(tmp_path):
    path = write_lora(
        tmp_path / "a.safetensors", v1_tensors(), METADATA | {"modelspec.trigger_phrase": "in my style"}
    )
    assert lora_info(path)["trained_words"] == ["in my style"]


@pytest.mark.parametrize("words", ["{", "[1]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 100_000, "null"])
def test_damaged_metadata_costs_nothing(tmp_path, words):
    path = write_lora(tmp_path / "a.safetensors", v1_tensors(), {"ss_tag_frequency": words})
    assert lora_info(path)["trained_words"] == []


def test_a_file_that_is_refused_is_told_of_too(tmp_path, capsys):
    path = write_lora(tmp_path / "a.safetensors", v1_tensors(width=2048), {"ss_base_model_version": "sdxl_base_v1-0"})
    facts = lora_info(path)
    assert (facts["base_model"], facts["text_width"], facts["ranks"]) == ("SDXL", 2048, [4, 8])
    assert "is for SDXL" in facts["problem"]
    assert main(["info", str(path)]) == 0
    assert "base model    SDXL; its text is 2048 wide; it says 'sdxl_base_v1-0'" in capsys.readouterr().out


def test_the_command_tells_a_lora_from_a_model(tmp_path, capsys, tiny):
    folder = tmp_path / "peft"
    folder.mkdir()
    down, up = torch.zeros(2, 4, 3, 3), torch.zeros(320, 2, 1, 1)
    tensors = {"base_model.model.conv_in.lora_A.weight": down, "base_model.model.conv_in.lora_B.weight": up}
    write_lora(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(loras.peft_config())
    tensors = {"lycoris_conv_in.lokr_w1": torch.zeros(4, 2), "lycoris_conv_in.lokr_w2": torch.zeros(80, 2, 3, 3)}
    lycoris = write_lora(tmp_path / "l.safetensors", tensors)
    for path, words in ((folder, "names as of PEFT"), (lycoris, "names as of SimpleTuner")):
        assert main(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert words in out
        assert "changes       1 modules of the UNet" in out
    sd.save(tiny, tmp_path / "model.safetensors")
    assert main(["info", str(tmp_path / "model.safetensors")]) == 0
    assert "text encoder" in capsys.readouterr().out
    with pytest.raises(sd.LoadError, match=r"holds a LoRA, not a model: add it to one with sd\.lora \(--lora\)"):
        sd.load(lycoris)


# ---- compare


def test_the_blocks_that_a_lora_changes(tmp_path):
    model = make_model(dtype=torch.float64)
    tensors, wanted = lora_tensors(model, PLACES)
    path = write_lora(tmp_path / "style.safetensors", tensors)
    report = compare_lora(model, [(path, 0.5)])
    rows = {row.name: row for row in report.rows}
    assert rows["unet.middle_block"].difference > 0.001
    assert rows["unet.input_blocks.1"].difference == 0.0
    assert rows["unet.input_blocks.1"].note == "no weights changed"
    w = model.unet.get_submodule(PLACES[0][1]).weight.detach()
    whole = sum(float(p.detach().norm()) ** 2 for p in model.unet.middle_block.parameters()) ** 0.5
    share = 0.5 * float((wanted[PLACES[0]] - w).norm()) / whole
    assert rows["unet.middle_block"].note == f"1 of 46 tensors, by {share:.1e}"
    assert rows["text"].difference > 0.001
    assert rows["unet (whole)"].difference > 0.001
    assert "style at 0.5" in report.title


def test_the_command_compares(tmp_path, capsys):
    shapes = sd.load("shapes")
    path = write_lora(tmp_path / "style.safetensors", lora_tensors(shapes, list(attention_of(shapes))[:8])[0])
    figures = tmp_path / "figures.json"
    assert main(["compare", "--lora", f"{path}:0.5", "--size", "64", "--json", str(figures)]) == 0
    out = capsys.readouterr().out
    assert "without (A) and with (B) style at 0.5" in out
    assert "no weights changed" in out
    assert "bound" not in out
    assert json.loads(figures.read_text())["rows"][0]["name"] == "text"
    for options in (["other.ckpt"], ["--bound", "1"], ["--only", "unet"], ["--repeats", "2"]):
        assert main(["compare", "shapes", *options, "--lora", str(path)]) == 2
        assert "does not go with --lora" in capsys.readouterr().err

"""The model as a table and a tree: what is counted is what is there."""

from __future__ import annotations

import json
import re

import pytest
import torch

import sd
from sd.cli import main
from tests.layouts import compvis_tensors, full_size_tensors, make_model, write_ckpt, write_hub


@pytest.fixture(scope="module")
def v1():
    return sd.describe()


def test_stable_diffusion_v1(v1):
    assert v1.whole("UNet").parameters == 859_520_964
    assert round(v1.whole("UNet").flops / 1e12, 3) == 0.803
    assert v1.whole("VAE encoder").parameters + v1.whole("VAE decoder").parameters == 83_653_863
    assert round(v1.whole("VAE decoder").flops / 1e12, 2) == 2.51
    assert v1.whole("text encoder").parameters == 123_060_480
    assert v1.whole("UNet").bytes == 2 * 859_520_964


def test_rows_sum_to_the_whole(v1):
    for part in v1.parts:
        rows, whole = v1.table(part), v1.whole(part)
        assert sum(b.parameters for b in rows) == whole.parameters
        assert sum(b.flops for b in rows) == whole.flops
        assert sum(b.bytes for b in rows) == whole.bytes
    assert len(v1.table("UNet")) == 1 + 12 + 1 + 12 + 1


def test_shapes_are_those_of_the_docstring(v1):
    """Channels and sizes in the table at the head of sd/unet.py."""
    shapes = {b.name: b.shape for b in v1.table("UNet")}
    assert shapes["input_blocks.5"] == (1, 640, 32, 32)
    assert shapes["middle_block"] == (1, 1280, 8, 8)
    assert shapes["output_blocks.8"] == (1, 640, 64, 64)
    assert [b.name for b in v1.table("VAE decoder")][3:7] == [f"decoder.up.{i}" for i in (3, 2, 1, 0)]


def test_flops_by_hand(v1):
    blocks = {b.name: b for b in v1.parts["UNet"]}
    assert blocks["input_blocks.0.0"].flops == 2 * 9 * 4 * 320 * 64 * 64
    attention = blocks["input_blocks.1.1.transformer_blocks.0.attn1"]
    assert attention.flops == 2 * 4096 * 320 * 320 * 4 + 2 * 2 * 4096 * 4096 * 320  # projections, and both products
    inner = [b for b in blocks.values() if re.fullmatch(r"input_blocks\.1\.[01]", b.name)]
    assert sum(b.flops for b in inner) == blocks["input_blocks.1"].flops


def test_size_and_dtype():
    big = sd.describe(height=1024, width=1024, dtype=torch.float32)
    assert round(big.whole("UNet").flops / 1e12, 2) == 4.67
    assert big.whole("UNet").bytes == 4 * 859_520_964
    with pytest.raises(ValueError, match="multiples of 8"):
        sd.describe("shapes", height=100)


def test_sources_agree(tiny, tmp_path):
    wanted = sd.describe(tiny)
    parameters = sum(t.numel() for t in compvis_tensors(tiny).values())
    assert sum(wanted.whole(part).parameters for part in wanted.parts) == parameters
    sd.save(tiny, tmp_path / "m.safetensors")
    assert sd.describe(tmp_path / "m.safetensors").parts == wanted.parts
    assert sd.describe(write_hub(tmp_path / "hub", make_model())).parts == wanted.parts
    ckpt = write_ckpt(tmp_path / "m.ckpt", compvis_tensors(tiny))
    assert sd.describe(ckpt, height=64, width=64).parts == wanted.parts


def test_command(capsys):
    assert main(["describe", "shapes"]) == 0
    text = capsys.readouterr().out
    assert "6,715,588" in text
    assert "output_blocks.3" in text
    assert main(["describe", "shapes", "--tree", "--depth", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.match(r"    3 +ResBlock, SpatialTransformer +128 x 8 x 8 ", line) for line in lines)
    assert main(["describe", "shapes", "--json", "--dtype", "float32"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["UNet"][0]["bytes"] == 4 * 6_715_588
    assert main(["describe", "no/such/file.ckpt"]) == 2
    assert "There is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "{}"], "does not exist|give a source"),
        (["--revision", "main"], "give a source"),
        (["--hub-variant", "fp16"], "give a source"),
        (["--depth", "2"], "--tree"),
        (["--tree", "--depth", "0"], "at least 1"),
        (["--height", "0"], "multiples of 8"),
    ],
)
def test_options_without_use_are_refused(options, message, capsys):
    assert main(["describe", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_full_size_file(tmp_path, v1):
    """No tensor is read: the file is a hole behind its header."""
    tensors, end, header = full_size_tensors(torch.float16, "meta"), 0, {}
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    path, text = tmp_path / "full.safetensors", json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert sd.describe(path).parts == v1.parts

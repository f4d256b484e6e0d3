"""Pictures, their PNG files, and what is written into them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd import files
from sd.image import from_pil, parameters_text, read_settings, save_png, to_pil

SETTINGS = {
    "prompt": "a red star, above",
    "negative_prompt": "",
    "num_inference_steps": 30,
    "scheduler": "ddim",
    "eta": 0.5,
    "guidance_scale": 4.0,
    "seed": 1,
    "width": 128,
    "height": 64,
    "model": "models/sd-v1-4.ckpt",
    "model_hash": "0123456789",
}


def test_every_8_bit_value_survives_there_and_back():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = from_pil(Image.fromarray(array))
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.min() == -1
    assert tensor.max() == 1
    (image,) = to_pil(tensor / 2 + 0.5)
    assert (np.asarray(image) == array).all()


def test_values_are_rounded_not_cut():
    (image,) = to_pil(torch.full((1, 3, 1, 1), 99.6 / 255))
    assert image.getpixel((0, 0)) == (100, 100, 100)


def test_parameters_have_the_form_of_automatic1111():
    assert parameters_text(SETTINGS | {"negative_prompt": "blur"}) == (
        "a red star, above\nNegative prompt: blur\nSteps: 30, Sampler: DDIM, CFG scale: 4.0, Seed: 1, "
        "Size: 128x64, Model hash: 0123456789, Model: sd-v1-4, Eta: 0.5"
    )
    assert "Negative prompt" not in parameters_text(SETTINGS)


def test_settings_are_read_back(tmp_path):
    settings = SETTINGS | {"prompt": "ein großer Stern \u2605\nzwei Zeilen"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings


def test_nothing_is_written_over_or_left_behind(tmp_path):
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (8, 8), "red"), path)
    with pytest.raises(FileExistsError):
        save_png(Image.new("RGB", (8, 8), "blue"), path)
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    save_png(Image.new("RGB", (8, 8), "blue"), path, force=True)
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(TypeError):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "b.png", {**SETTINGS, "seed": {1, 2}})
    with pytest.raises(OSError, match="no"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "no" / "c.png")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<html>"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_settings(path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "open", lambda *_: Path("/dev/full").open("wb"), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match=r"a\.png cannot be written: No space left on device; make room"):
        save_png(Image.new("RGB", (512, 512)), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())

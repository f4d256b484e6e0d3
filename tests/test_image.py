"""Pictures, their PNG files, and what is written into them."""

from __future__ import annotations

import json
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
        "a red star, above\nNegative prompt: blur\nSteps: 30, Sampler: DDIM, Schedule type: Automatic, CFG scale: 4, "
        "Seed: 1, Size: 128x64, Model hash: 0123456789, Model: sd-v1-4, RNG: CPU, Eta DDIM: 0.5"
    )
    assert "Negative prompt" not in parameters_text(SETTINGS)


@pytest.mark.parametrize("model", ["a, b", "a: b", "a\nb", '"a"', '"a", b'])
def test_values_that_would_end_a_field_are_quoted(model):
    last = parameters_text(SETTINGS | {"model": model}).partition("Model: ")[2]
    assert json.loads(last.partition(", RNG")[0]) == model
    assert "\n" not in last
    assert 'Model: a "b", RNG' in parameters_text(SETTINGS | {"model": 'a "b"'})  # as theirs


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/home/me/nets/v1.ckpt", "v1.ckpt"),
        ("/home/me/nets/folder/", "folder"),
        ("~/nets/v1.safetensors", "v1.safetensors"),
        ("C:\\Users\\me\\v1.ckpt", "v1.ckpt"),
        ("\\\\server\\nets\\v1.ckpt", "v1.ckpt"),
        ("nets/v1.ckpt", "nets/v1.ckpt"),
        ("CompVis/stable-diffusion-v1-4", "CompVis/stable-diffusion-v1-4"),
    ],
)
def test_no_path_from_a_disks_root_stands_in_a_picture(model, name, tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS | {"model": model})
    assert read_settings(tmp_path / "a.png")["model"] == name
    data = (tmp_path / "a.png").read_bytes()
    assert not any(part in data for part in (b"home", b"Users", b"~", b"server"))


def kinds(path):
    """The kind of each text chunk of a PNG, by its keyword."""
    data, found, at = path.read_bytes(), {}, 8
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind in (b"tEXt", b"iTXt", b"zTXt"):
            found[data[at + 8 :].partition(b"\0")[0].decode()] = kind.decode()
        at += size + 12
    return found


@pytest.mark.parametrize(("prompt", "kind"), [("a red star", "tEXt"), ("größer ½", "tEXt"), ("star \u2605", "iTXt")])
def test_parameters_stand_in_the_chunk_that_everybody_reads_where_it_has_the_letters(prompt, kind, tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS | {"prompt": prompt})
    assert kinds(tmp_path / "a.png")["parameters"] == kind
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"].splitlines()[0] == prompt


def test_odd_letters_cost_no_picture(tmp_path):
    """Of a file name that is no UTF-8, and of a prompt that was not encoded."""
    odd = SETTINGS | {"model": "\udcff.ckpt", "negative_prompt": "a\0b\ud800"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", odd)
    assert read_settings(tmp_path / "a.png") == odd


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

"""The trainer of the built-in model: what it measures, and what it does when a run cannot go on."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes"))

import bank as bank_file
import fitting
import scenes
import train as train_file
from bank import Bank, as_input
from cleanness import cleanness
from export import trained
from fitting import Run, TrainingError, fit
from text_stage import Text, random_caption
from unet_stage import SPREAD, make_latents
from vae_stage import VAE_SIZES

import sd
from sd.vae import VAE

RECIPE = {"steps": 6, "lr": 1e-2, "inner": {"batch": 3}}


def train(folder, steps=6, recipe=RECIPE, spoil=None, name="net"):
    """A linear layer, trained for the first of its steps; `spoil` maps step to loss."""
    torch.manual_seed(0)
    net, average = nn.Linear(3, 1), nn.Linear(3, 1)

    def batch_of(step):
        if step == steps:
            raise KeyboardInterrupt
        return torch.randn(4, 3), torch.tensor(float(spoil) if spoil and step == 4 else 1.0)

    def loss_of(x, factor):
        return net(x).square().mean() * factor

    fit(name, net, batch_of, loss_of, Run(folder), recipe, average)
    return net.state_dict() | {f"average {k}": v for k, v in average.state_dict().items()}


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(fitting, "SECONDS", -1)


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path, often):
    whole = train(tmp_path / "whole" if (tmp_path / "whole").mkdir() is None else None)
    (tmp_path / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", steps=3)
    resumed = train(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_checkpoint_that_is_cut_short(tmp_path, often, cut):
    train(tmp_path)
    path = tmp_path / "net.pt"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TrainingError, match=r"net\.pt cannot be read .*: remove it"):
        train(tmp_path)


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"inner": {"batch": 4}}, {"new": 1}])
def test_a_folder_of_another_recipe(tmp_path, often, change):
    train(tmp_path)
    before = (tmp_path / "net.pt").read_bytes()
    with pytest.raises(TrainingError, match=f"another recipe.*{next(iter(change))}.*--out"):
        train(tmp_path, recipe=RECIPE | change)
    assert (tmp_path / "net.pt").read_bytes() == before


@pytest.mark.parametrize("spoil", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_are_spoilt(tmp_path, often, spoil):
    with pytest.raises(TrainingError, match=r"The loss of net is (nan|inf) at step 4"):
        train(tmp_path, spoil=spoil)
    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["module"].values())


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, often, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=3)
    before = (tmp_path / "net.pt").read_bytes()

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        flush = tell = lambda self: 0

    @contextmanager
    def full(path, *, force):
        yield Full()

    monkeypatch.setattr(fitting, "writing", full)
    with pytest.raises(TrainingError, match=r"net\.pt cannot be written .*make room, the one before is kept"):
        train(tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == before


def test_true_pictures_are_clean_and_others_are_not():
    rng = random.Random(3)
    for _ in range(12):
        scene = scenes.random_scene(rng)
        image = scenes.paint(scene, rng)
        clean = cleanness(image)
        assert clean.overlap > 0.97, scene.caption()
        assert clean.inside < 0.6, scene.caption()
        assert clean.ground < 0.1, scene.caption()
        assert clean.lattice < 0.1, scene.caption()
    wave = 8 * np.sin(np.arange(128) * np.pi / 4)[None, :, None]
    latticed = cleanness(Image.fromarray((np.asarray(image) + wave).clip(0, 255).astype(np.uint8)))
    assert latticed.lattice > 3
    assert cleanness(image.filter(ImageFilter.GaussianBlur(4))).inside > 5
    wobbly = image.transform(
        (128, 128), Image.Transform.AFFINE, (1, 0.15, -9, 0, 1, 0), fillcolor=image.getpixel((0, 0))
    )
    assert cleanness(wobbly).overlap < 0.95


def test_the_bank_is_the_same_whenever_it_is_made():
    bank = Bank(bank_file.PART + 20)
    assert bank.pictures.shape == (bank.count, 128, 128, 3)
    assert Bank(bank.count + 5).scenes[: bank.count] == bank.scenes
    rng = random.Random(bank_file.SEED + bank_file.PART)
    last = [np.asarray(scenes.paint(scene, rng)) for scene in bank.scenes[bank_file.PART :]]
    assert np.array_equal(bank.pictures[bank_file.PART :], last)
    x = as_input(bank.pictures[:2])
    assert x.shape == (2, 3, 128, 128)
    assert x.min() >= -1
    assert x.max() <= 1


def test_tokens_of_words_are_those_of_the_tokenizer(tmp_path):
    text, rng = Text(tmp_path), random.Random(5)
    captions = [random_caption(scenes.random_scene(rng), rng)[0] for _ in range(60)] + [""]
    expected = text.tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(text.tokens(captions), expected)


def test_all_three_stages_and_a_picture(tmp_path, monkeypatch):
    few = dict.fromkeys(train_file.RECIPES["cpu"], 3) | {"vae_scenes": 4, "unet_scenes": 30}
    monkeypatch.setitem(train_file.RECIPES, "cpu", few)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--device", "cpu", "--held-out"])
    assert train_file.main() == 0
    model = trained(tmp_path)
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)
    assert model.vae.config.scale_factor == latents["scale"]
    assert latents["scale"] * latents["latents"].float().std() == pytest.approx(SPREAD, rel=1e-2)
    (image,) = sd.SimpleSampler(model)("a red star on a white background", num_inference_steps=1)
    assert image.size == (128, 128)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--device", "cpu"])
    assert train_file.main() == 2


def test_pairs_that_are_held_out_are_not_learned(tmp_path):
    bank, text = Bank(40), Text(tmp_path)
    data = make_latents(VAE(VAE_SIZES), text, bank, {}, Run(tmp_path), scenes.HELD_OUT)
    kept = [scene for scene in bank.scenes if not scenes.holds(scene, scenes.HELD_OUT)]
    assert 20 < len(kept) < 40
    assert len(data.z) == len(data.contexts) == len(kept)


def test_pairs_that_are_held_out_are_not_drawn():
    rng = random.Random(0)
    drawn = [scenes.random_scene(rng, without=scenes.HELD_OUT) for _ in range(2000)]
    seen = {(o.colour, o.shape) for scene in drawn for o in scene.objects}
    assert len(seen) == len(scenes.COLOURS) * len(scenes.SHAPES) - len(scenes.HELD_OUT)
    assert {colour for colour, _ in scenes.HELD_OUT} <= {colour for colour, _ in seen}
    assert {shape for _, shape in scenes.HELD_OUT} == set(scenes.SHAPES)

"""The ControlNet of examples/controlnet: the edges that it learns from, its trainer, and that it follows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from sd.cli import main
from sd.pictures.canny import canny_edges

FOLDER = Path(__file__).parents[1] / "examples" / "controlnet"
sys.path.insert(0, str(FOLDER))

import follow  # noqa: E402
from edges import as_picture, covered, edges, example, overlap  # noqa: E402


def run(*args, cwd, check=True):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=check)


def test_edges_are_thin_and_where_they_are():
    picture = Image.new("RGB", (32, 32), (245, 140, 40))  # orange and red, of about one brightness
    picture.paste((220, 40, 40), (8, 10, 24, 20))
    lines = edges(picture)
    rows, columns = np.nonzero(lines)
    assert {*rows} <= {*range(9, 21)}
    assert {*columns} <= {*range(7, 25)}
    assert 2 * (16 + 10) - 8 <= lines.sum() <= 2 * (16 + 10) + 8
    assert not edges(Image.new("RGB", (32, 32), "red")).any()
    assert np.asarray(as_picture(lines)).max() == 255


def test_edges_are_canny_s():
    pytest.importorskip("cv2")
    overlaps = [overlap(e.lines, np.asarray(canny_edges(e.picture))[..., 0] > 0) for e in map(example, range(20))]
    assert np.mean(overlaps) > 0.97


def test_what_is_covered():
    for one in map(example, range(10)):
        assert overlap(covered(one.picture), covered(one.picture)) == 1
        assert 0.02 < covered(one.picture).mean() < 0.6
    left, right = np.zeros((2, 4, 4), dtype=bool)
    assert overlap(left, right) == 1
    left[:, :2], right[:, 1:3] = True, True
    assert overlap(left, right) == pytest.approx(1 / 3)
    assert example(3).scene == example(3).scene
    assert example(3).scene != example(4).scene


@pytest.mark.slow
def test_the_trainer_trains_and_goes_on(tmp_path):
    out = tmp_path / "run"
    small = [FOLDER / "train.py", "--out", out, "--scenes", 9, "--batch", 2, "--threads", 1]
    run(*small, "--steps", 2, cwd=tmp_path)
    before = sd.load_controlnet(out / "edges.safetensors").state_dict()
    assert before["middle_block_out.0.weight"].abs().max() > 0  # it began as zeros
    run(*small, "--steps", 2, "--file", tmp_path / "again.safetensors", cwd=tmp_path)  # nothing is left to do
    after = sd.load_controlnet(tmp_path / "again.safetensors").state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    refused = run(*small, "--steps", 3, cwd=tmp_path, check=False)
    assert (refused.returncode, "controlnet.pt is of another recipe" in refused.stderr) == (2, True)
    refused = run(*small, "--file", "net.pt", cwd=tmp_path, check=False)
    assert (refused.returncode, "must end in .safetensors" in refused.stderr) == (2, True)


@pytest.mark.slow
def test_edges_are_followed():
    """Of 8 scenes, with fewer steps than examples/controlnet/follow.py counts with."""
    model = sd.load("shapes")
    net = sd.load_controlnet(follow.OWN, model=model)
    examples = [example(k) for k in range(8)]
    hints = [as_picture(e.lines) for e in examples]
    told, untold = (follow.drawn(model, n, examples, hints, num_inference_steps=12) for n in (net, None))

    def mean(pictures):
        return np.mean([overlap(covered(p), covered(e.picture)) for e, p in zip(examples, pictures, strict=True)])

    assert mean(told) > 0.88
    assert mean(untold) < 0.7
    right = follow.report("", examples, told).split("|")[-2]
    assert float(right.strip(" %")) >= 87


def test_the_command_follows_a_picture_s_edges(tmp_path, monkeypatch):
    """The line of the README beside the file, in few steps: what it draws lies on the picture that it was given."""
    pytest.importorskip("cv2")
    monkeypatch.chdir(tmp_path)
    one = example(0)
    one.picture.save("scene.png")
    words = [one.scene.caption(), "--controlnet", str(follow.OWN), "--control-image", "scene.png", "--canny"]
    assert main([*words, "--steps", "10", "-o", "drawn.png", "--quiet"]) == 0
    assert overlap(covered(Image.open("drawn.png")), covered(one.picture)) > 0.85

"""Traces, rough colours, and the pages and scripts that are made with instruments."""

from __future__ import annotations

import json
import random
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from sd import study
from sd.weights.checkpoint import write_safetensors
from tests.layouts import make_model

sys.path[:0] = [str(Path(__file__).parents[1] / "examples" / part) for part in ("lab", "shapes")]


def test_trace(tiny, tmp_path):
    sampler = sd.SimpleSampler(tiny)
    call = {"num_inference_steps": 5, "num_images_per_prompt": 2, "seed": 3}
    t = study.trace(sampler, "a red star", **call)
    steps = list(sampler.stream("a red star", **call))
    assert torch.equal(t.latents, steps[-1].latents)
    assert torch.equal(t.noise, torch.stack([s.noise for s in steps]))
    assert torch.equal(t.x0, torch.stack([s.denoised for s in steps]))
    assert torch.equal(t.x[1:], torch.stack([s.latents for s in steps[:-1]]))
    assert torch.equal(t.x[0, 1], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))[0])
    assert torch.equal(t.noise, t.noise_without + 7.5 * (t.noise_with - t.noise_without))
    assert t.timesteps.tolist() == list(sd.PNDM(5).timesteps)
    assert t.norms["x"][0].sub(1).abs().max() < 0.2  # unit noise
    a, b = t.noise_without[2, 0].double().flatten(), t.noise_with[2, 0].double().flatten()
    assert torch.isclose(torch.cos(torch.deg2rad(t.angle[2, 0])), a @ b / a.norm() / b.norm())
    t.save(tmp_path / "t.safetensors")
    again = study.Trace.load(tmp_path / "t.safetensors")
    assert again.settings == t.settings
    assert again.settings["seeds"] == [3, 4]
    assert again.settings | {"eta": 0.0, "dtype": "float32", "version": sd.__version__} == again.settings
    assert again.settings["num_images_per_prompt"] == 2
    assert "model_hash" in again.settings
    assert torch.equal(again.noise_without, t.noise_without)
    assert torch.equal(again.angle, t.angle)
    with pytest.raises(ValueError, match="exists"):
        t.save(tmp_path / "t.safetensors")
    sd.save(tiny, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is no trace"):
        study.Trace.load(tmp_path / "model.safetensors")
    plain = study.trace(
        sampler, "a red star", negative_prompt=["bad"], guidance_scale=1.0, num_inference_steps=2, scheduler="lms"
    )
    assert plain.settings["negative_prompt"] == ["bad"]
    assert plain.noise_without is None
    assert plain.angle is None
    assert torch.equal(plain.noise, plain.noise_with)
    assert plain.norms["x"][0].item() < 1.3  # what the UNet is given, not LMS' own x
    with pytest.raises(ValueError, match="no 'noise_without'"):
        plain.picture(kind="noise_without")


@pytest.mark.parametrize(
    ("tensors", "settings", "says"),
    [
        ({}, "[" * 100_000, "brackets"),
        ({}, "[1]", "no JSON object"),
        ({}, "{", "not JSON"),
        ({}, '{"seeds": ' + "9" * 5000 + "}", "a number that is too long"),
        ({"latents": torch.zeros(1, 4, 8, 7)}, "{}", "does not fit"),
        ({"timesteps": torch.zeros(4)}, "{}", "does not fit"),
        ({"timesteps": torch.zeros(())}, "{}", "does not fit"),
        ({"noise": torch.zeros(5, 1, 4, 8, 8, dtype=torch.int64)}, "{}", "tensor noise does not fit"),
        ({"rgb": torch.zeros(3, 3)}, "{}", "tensor rgb does not fit"),
        ({"x": torch.zeros(5, 1, 4, 8)}, "{}", "tensor x does not fit"),
    ],
)
def test_damaged_traces_are_refused(tensors, settings, says, tmp_path):
    whole = {kind: torch.zeros(5, 1, 4, 8, 8) for kind in ("x", "noise_without", "noise_with", "noise", "x0")}
    whole |= {"timesteps": torch.zeros(5), "latents": torch.zeros(1, 4, 8, 8), "rgb": torch.zeros(5, 3)}
    write_safetensors(tmp_path / "sound", whole, {"trace": "{}"})
    assert study.Trace.load(tmp_path / "sound").settings == {}
    write_safetensors(tmp_path / "damaged", whole | tensors, {"trace": settings})
    with pytest.raises(ValueError, match=says) as caught:
        study.Trace.load(tmp_path / "damaged")
    assert str(caught.value).startswith(f"{tmp_path / 'damaged'} is a damaged trace: ")


def test_what_others_call_between_two_steps_is_not_traced(tiny):
    call = {"num_inference_steps": 2, "scheduler": "ddim"}
    sampler = sd.SimpleSampler(tiny)
    wanted = study.trace(sampler, "a red star", **call)

    def busy(steps, total):
        for step in steps:
            sampler("st", num_inference_steps=1, output_type="latent")
            yield step

    got = study.trace(sampler, "a red star", progress=busy, **call)
    assert torch.equal(got.noise_with, wanted.noise_with)
    assert torch.equal(got.noise_without, wanted.noise_without)


def test_rough_colours(shapes):
    """The matrix that is fitted gives about the colours that the VAE gives."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(8, 3, generator=generator)
    latents = torch.cat([shapes.vae.encode((2 * c - 1).view(1, 3, 1, 1).expand(-1, -1, 128, 128)) for c in colours])
    rough = study.to_rgb(latents, study.latent_rgb(shapes)).mean((2, 3))
    assert (rough - colours).abs().mean() < 0.16 < (colours - colours.mean(0)).abs().mean()
    t = study.trace(sd.SimpleSampler(shapes), "a red star", num_inference_steps=2)
    assert t.picture().size == t.picture(vae=shapes.vae).size == (128, 128)
    v1 = study.latent_rgb(make_model(vae=sd.VAEConfig(ch=32)))
    torch.testing.assert_close(v1[:, 0], torch.tensor([0.149, 0.0935, -0.079, -0.092, 0.5]))


@pytest.mark.slow
def test_the_shape_word_lies_on_the_shape(shapes):
    """A few of what examples/lab/attention.py measures over 200 captions."""
    import attention as lab
    import scenes

    rng, shares, ground = random.Random(2), [], []
    for i in range(6):
        result = lab.measure(shapes, scenes.random_scene(rng, pairs=0), i)
        if result:
            _, (shape, both, background) = result
            shares += [lab.top_share(words["map"], words["own"], 0.01) for words in (shape, both)]
            ground.append(lab.top_share(background["map"], background["own"], 0.1))
    assert len(ground) >= 4
    assert sum(shares) / len(shares) >= 0.85
    assert sum(ground) / len(ground) <= 0.1


@pytest.mark.slow
def test_quality_in_small(tmp_path, monkeypatch, capsys):
    """Only that examples/lab/quality.py runs, and that its table and plot have what was asked for."""
    import quality

    plot = tmp_path / "quality.png"
    call = ["quality.py", "--count", "2", "--calls", "2", "3", "--schedulers", "ddim", "pndm", "--plot", str(plot)]
    call += ["--keep", str(tmp_path / "kept.json")]
    monkeypatch.setattr(sys, "argv", call)
    quality.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [
        ["ddim", "2", "2"],
        ["pndm", "2", "1"],
        ["ddim", "3", "3"],
        ["pndm", "3", "2"],
    ]
    assert all(float(row[4]) in (0, 50, 100) for row in rows)
    assert Image.open(plot).size == (640, 340)
    assert len(json.loads((tmp_path / "kept.json").read_text())) == 4
    monkeypatch.setattr(quality, "evaluate", None)  # all of it is kept, so nothing is drawn
    quality.main()


@pytest.mark.slow
def test_the_documentation_runs(tmp_path, monkeypatch):
    """docs/study.md as it stands, and what it says of its pictures."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 9
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec("\n".join(blocks), found)
    pictures = {name: torch.from_numpy(np.array(p)).float() for name, p in found["pictures"].items()}
    assert Image.open("edits.png").width == 824

    def differ(a, b):
        return (pictures[a] - pictures[b]).abs().mean().item()

    # what the text says of them
    assert differ("as it is", "without “red”") < 3
    assert differ("two objects", "keys swapped") < 5
    assert differ("as it is", "middle block: circle") < 3
    assert differ("as it is", "no middle block") < 5
    star, ring = (30, 64), (92, 64 - 18)  # the middle of the star, the left of the ring: red and blue change places
    for place, colour in ((star, 2), (ring, 0)):
        assert pictures["tokens swapped"][place].argmax() == colour
        assert pictures["two objects"][place].argmax() == 2 - colour
    assert pictures["the other's end"][5, 5].max() < 60  # a black background
    covered = {name: (p.min(-1).values < 150).float().mean() for name, p in pictures.items()}
    assert covered["small"] < covered["half way to small"] < covered["as it is"]
    green = {name: pictures[name][star][1] for name in pictures if name.startswith(("in steps", "no guidance"))}
    assert green.pop("no guidance") > 100  # orange
    assert max(green.values()) < 70  # red


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    """docs/tour.md as it stands, and what it says of its figures."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "tour.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) == 13
    try:
        exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    finally:
        torch.set_grad_enabled(True)
    out = capsys.readouterr().out
    assert float(re.search(r"by hand and by the library: (\S+)", out)[1]) < 1e-5
    assert all(float(error) < 0.1 for error in re.findall(r"t \d+: error (\S+)", out))
    assert all(float(error) < 1e-4 for error in re.findall(r"(?:the same|pieces of 16): (\S+)", out))
    distance = {(name, n): float(d) for name, n, d in re.findall(r"(\w+) in (\d+) steps: (\S+)", out)}
    assert min((d, name) for (name, n), d in distance.items() if n == "10")[1] == "ddim"
    assert min((d, name) for (name, n), d in distance.items() if n == "20")[1] == "pndm"
    assert "above the mask nothing changed: True" in out
    x, y = map(int, re.search(r"at \((\d+), (\d+)\)", out).groups())
    assert max(abs(x - 64), abs(y - 64)) < 25
    assert Image.open("tour.png").size == (792, 660)
    x, y = map(int, re.search(r"drawn around \((\d+), (\d+)\)", out).groups())
    assert max(abs(x - 44), abs(y - 80)) < 4
    assert "at a scale of 0 nothing has changed: True" in out


def test_paths_on_the_noise_schedule(tmp_path, monkeypatch, capsys):
    import paths

    plot = tmp_path / "paths.png"
    monkeypatch.setattr(sys, "argv", ["paths.py", "--steps", "4", "--plot", str(plot)])
    paths.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(paths.PATHS)
    assert all(
        [float(s) for s in row.split()[-4:]] == sorted(map(float, row.split()[-4:]), reverse=True) for row in rows
    )
    assert Image.open(plot).width == 860


@pytest.mark.slow
def test_composition_in_small(monkeypatch, capsys):
    import composition

    assert all(composition.holds(s, composition.HELD_OUT) for s in composition.captions(True, 1, 20, 0))
    assert not any(composition.holds(s, composition.HELD_OUT) for s in composition.captions(False, 0, 20, 0))
    monkeypatch.setattr(sys, "argv", ["composition.py", "--count", "1"])
    composition.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| one", "| two"))]
    assert len(rows) == 4

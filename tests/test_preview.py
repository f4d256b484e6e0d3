"""`--preview`: what is seen while a picture is drawn, where it lies, and when it goes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from sd.adapt.taesd import TinyVAE
from sd.cli import main
from sd.cli.preview import Previews
from sd.weights.checkpoint import write_safetensors
from tests.layouts import random_tensors

DRAW = ["a red star on a white background", "--steps", "4", "--quiet"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def taesd(folder):
    """A small one with random weights."""
    c = sd.VAEConfig(ch=8, ch_mult=(1,) * 4, num_res_blocks=1, scale_factor=1.0, num_groups=1)
    shapes = {name: t.shape for name, t in TinyVAE(c, c).state_dict().items()}
    write_safetensors(folder / "taesd.safetensors", random_tensors(shapes, 3, torch.float32))
    return "taesd.safetensors"


@pytest.fixture
def seen(monkeypatch, folder):
    """The previews that lie there after each step, by name: lists of pictures."""
    found: list[dict[str, Image.Image]] = []
    show = Previews.show

    def shown(self, step, steps, first):
        show(self, step, steps, first)
        found.append({p.name: Image.open(p).copy() for p in folder.glob("*-preview.png")})

    monkeypatch.setattr(Previews, "show", shown)
    return found


def test_a_preview_every_so_many_steps_and_none_in_the_end(seen, folder):
    assert main([*DRAW, "-o", "a.png", "--preview", "2", "--scheduler", "ddim", "--steps", "6"]) == 0
    assert [sorted(there) for there in seen] == [[], *[["a-preview.png"]] * 5]
    first, second = seen[1]["a-preview.png"], seen[3]["a-preview.png"]
    assert first.tobytes() == seen[2]["a-preview.png"].tobytes() != second.tobytes()
    assert second.tobytes() == seen[5]["a-preview.png"].tobytes()  # the last step has the picture itself
    assert [p.name for p in folder.iterdir()] == ["a.png"]
    assert first.size == Image.open("a.png").size


def test_a_preview_looks_like_the_picture(seen):
    assert main([*DRAW, "-o", "a.png", "--preview", "1", "--steps", "8"]) == 0
    picture, preview = (np.asarray(i.convert("RGB"), float) for i in (Image.open("a.png"), seen[-1]["a-preview.png"]))
    assert abs(picture - preview).mean() < 12  # of 255


def test_several_pictures_have_their_own(seen, folder):
    assert main([*DRAW, "-o", "a.png", "--count", "2", "--preview", "1", "--steps", "2"]) == 0
    assert [sorted(there) for there in seen] == [["a-1-preview.png"], ["a-1-preview.png"], ["a-2-preview.png"],
                                                 ["a-2-preview.png"]]  # fmt: skip
    assert sorted(p.name for p in folder.iterdir()) == ["a-1.png", "a-2.png"]


def test_previews_change_nothing(seen, taesd, folder):
    assert main([*DRAW, "-o", "a.png"]) == 0
    assert main([*DRAW, "-o", "b.png", "--preview", "1"]) == 0
    assert main([*DRAW, "-o", "c.png", "--preview", "1", "--preview-vae", taesd]) == 0
    assert main([*DRAW, "-o", "d.png", "--preview", "1", "--variant", "lean"]) == 0
    assert main([*DRAW, "-o", "e.png", "--preview", "1", "--variant", "parallel"]) == 0
    files = [(folder / f"{name}.png").read_bytes() for name in "abc"]
    assert files == files[:1] * 3
    own, taesd, matrix, ranks = (np.asarray(step[f"{name}-preview.png"], float)
        for name, step in zip("bcde", seen[7::4], strict=True))  # fmt: skip
    assert abs(own - ranks).max() <= 1
    assert abs(own - taesd).max() > 10
    assert len(np.unique(matrix[:8, :8])) <= 3  # one colour for each pixel of the latents
    assert len(np.unique(matrix)) > 20


def test_by_taesd_it_is_what_taesd_decodes(seen, taesd, folder):
    options = ["--preview", "2", "--preview-vae", taesd, "--scheduler", "ddim", "--exact"]
    assert main([*DRAW, "-o", "a.png", *options]) == 0
    model = sd.with_vae(sd.load("shapes"), taesd)
    sampler = sd.SimpleSampler(model)
    steps = list(sampler.stream(DRAW[0], num_inference_steps=4, scheduler="ddim"))
    (wanted,) = sampler.decode(steps[1].denoised)
    assert seen[-1]["a-preview.png"].tobytes() == wanted.tobytes()


def test_where_the_drawing_is_stopped_the_preview_stays(folder, monkeypatch, capsys):
    monkeypatch.setattr("sd.sampler.SimpleSampler.finish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*DRAW, "-o", "a.png", "--preview", "1"]) == 130
    assert [p.name for p in folder.iterdir()] == ["a-preview.png"]


def test_a_disk_that_takes_no_preview_takes_nothing_from_the_picture(folder, monkeypatch, capsys):
    import sd.image

    real = sd.image.writing

    def fails(path, **options):
        if "preview" in str(path):
            raise OSError(f"{path} cannot be written: No space left on device; make room, or choose another place.")
        return real(path, **options)

    monkeypatch.setattr(sd.image, "writing", fails)
    assert main([*DRAW, "-o", "a.png", "--preview", "1"]) == 0
    assert capsys.readouterr().err.count("There will be no more previews") == 1
    assert [p.name for p in folder.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("options", "says"), [
    (["--preview", "0"], "--preview must be a whole number from 1 to 1000, not 0"),
    (["--preview-vae", "x"], "ask for them with --preview N"),
    (["--preview", "1", "--preview-vae", "x", "--variant", "lean"], "--preview-vae only works with --variant simple"),
    (["--preview", "1", "--preview-vae", "gone.pt"], "There is no file or folder gone.pt"),
    (["--preview", "1"], r"a-preview\.png exists"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(options, says, folder, capsys):
    (folder / "a-preview.png").write_bytes(b"somebody's")
    force = [] if "exists" in says else ["--force"]
    assert main([*DRAW, "-o", "a.png", *options, *force]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert (folder / "a-preview.png").read_bytes() == b"somebody's"
    assert not (folder / "a.png").exists()

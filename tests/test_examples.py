"""The examples and the README's code run as they stand."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

import reader  # noqa: E402
import scenes  # noqa: E402
import vocabulary  # noqa: E402

import sd  # noqa: E402


def run(*args, cwd):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, check=True)


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block.replace("num_inference_steps=30", "num_inference_steps=3"), names)
    assert Image.open("star.png").size == (128, 128)


@pytest.mark.slow
def test_pictures_in():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/pictures.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["wide"].size == (192, 160)
    assert names["found"].error < 1
    assert reader.read(names["star"]).caption().startswith("a red star to the left of a blue ring")
    assert reader.read(names["cross"]).caption().startswith("a green cross to the left of a blue ring")
    assert reader.read(names["square"]).caption().startswith("a red star to the left of a yellow square")


def test_extending(monkeypatch):
    monkeypatch.setitem(sd.scheduler.SCHEDULERS, "half", None)  # and gone again afterwards
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    names: dict = {"__name__": "extending"}
    for block in blocks:
        exec(block, names)
    latents = sd.SimpleSampler(names["relative"])("a", scheduler="half", num_inference_steps=2, output_type="latent")
    assert latents.shape == (1, 4, 8, 8)
    assert names["ops"].convolutions > 10


def test_the_reference_is_made_from_the_docstrings(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_api

    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == make_api.reference()


@pytest.mark.slow
def test_steps(tmp_path):
    run(ROOT / "examples" / "steps.py", "a red star", "s.png", cwd=tmp_path)
    assert Image.open(tmp_path / "s.png").size == (8 * 128, 128)


@pytest.mark.slow
def test_beside_diffusers(monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(ROOT / "examples")
    import beside_diffusers

    assert beside_diffusers.main() == 0


@pytest.mark.slow
def test_evaluate_prints_shares(tmp_path):
    script = ROOT / "examples" / "shapes" / "evaluate.py"
    out = run(script, "--count", 4, "--steps", 2, "--guidance", 4, "--sheet", "s.png", "--all", cwd=tmp_path).stdout
    assert "% right" in out
    assert (tmp_path / "s-4.png").exists()


def test_every_painted_scene_is_read_back():
    rng = random.Random(0)
    for _ in range(150):
        scene = scenes.random_scene(rng)
        assert reader.same(reader.read(scenes.paint(scene, rng)), scene), scene.caption()


def test_captions():
    rng = random.Random(1)
    one = scenes.Scene((scenes.Object("orange", "star", "centre", "small"),), "orange")
    assert one.caption() == "a small orange star on an orange background"
    assert one.caption(an=False, with_size=False) == "a orange star on a orange background"
    pair = scenes.Scene((scenes.Object("red", "star", "top"), scenes.Object("blue", "ring", "bottom")), "white")
    assert pair.caption() == "a red star above a blue ring on a white background"
    for _ in range(500):
        scene = scenes.random_scene(rng)
        assert all(o.colour != scene.background for o in scene.objects)


@pytest.mark.parametrize("blot", ["empty", "three", "scribble"])
def test_what_is_no_scene_is_not_read(blot):
    image = Image.new("RGB", (128, 128), scenes.COLOURS["white"])
    canvas = scenes.ImageDraw.Draw(image)
    if blot == "three":
        for x in (20, 64, 108):
            scenes.draw(canvas, "circle", x, 64, 15, scenes.COLOURS["red"], None)
    elif blot == "scribble":
        canvas.line([(10, 10), (110, 30), (20, 60), (110, 100)], fill=scenes.COLOURS["red"], width=6)
    with pytest.raises(reader.UnreadableError):
        reader.read(image)


def test_every_word_is_one_token():
    text = sd.load("shapes").text
    for word in vocabulary.WORDS:
        assert len(text.ids(word)) == 3, word


@pytest.mark.slow
def test_the_trainer_trains_and_resumes(tmp_path):
    """All stages, stopped after the second one and then gone on with; the result can be packed and drawn with."""
    script, out = ROOT / "examples" / "shapes" / "train.py", tmp_path / "run"
    small = ["--out", out, "--text-steps", 2, "--vae-steps", 2, "--vae-batch", 2, "--vae-scenes", 20]
    small += ["--unet-scenes", 64, "--unet-batch", 4, "--threads", 1, "--no-bfloat16"]
    nothing = run(script, *small, "--unet-steps", 0, cwd=tmp_path)
    assert "float32 on" in nothing.stdout
    run(script, *small, "--unet-steps", 2, cwd=tmp_path)
    refused = subprocess.run(
        [sys.executable, script, *map(str, small), "--unet-steps", "3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "unet.pt is of another recipe (steps is 2 in it, and 3 here)" in refused.stderr
    run(ROOT / "examples" / "shapes" / "export.py", out, tmp_path / "m.safetensors", cwd=tmp_path)
    (image,) = sd.SimpleSampler(sd.load(tmp_path / "m.safetensors"))("a red star", num_inference_steps=1)
    assert image.size == (128, 128)


def test_small_latents_let_pndm_follow():
    import stiffness

    assert stiffness.share_right(7.5, 0.3, 200, trials=200) > stiffness.share_right(7.5, 1.0, 200, trials=200)
    assert stiffness.share_right(7.5, 0.3, 9, trials=200) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("page", ["prompts", "solvers"])
def test_the_pages_of_docs_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["image"].size == (128, 128)

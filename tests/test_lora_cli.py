"""LoRAs on the command line, in prompts, and in pictures that are drawn again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sd
from sd.cli import loras as command
from sd.cli import main
from sd.cli.options import Chosen, CommandError, lora_file
from sd.cli.settings import drawing_of
from sd.image import JSON_CHUNK, read_settings
from tests.loras import attention_of, lora_tensors, write_lora

STAR = "a red star"
FAST = ["--steps", "1", "--quiet", "--scheduler", "ddim", "--device", "cpu"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, shapes):
    """A folder with two LoRAs for the built-in model."""
    folder = tmp_path_factory.mktemp("loras")
    for name, seed in (("style", 1), ("other", 2)):
        (folder / "sub").mkdir(exist_ok=True)
        tensors, _ = lora_tensors(shapes, list(attention_of(shapes)), seed=seed)
        place = folder / ("sub" if name == "other" else ".") / f"{name}.safetensors"
        write_lora(place, {n: t.float() for n, t in tensors.items()}, {"ss_network_dim": "3"})
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content_digest(file):
    data = Path(file).read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def said(arguments, capsys):
    code = main([*map(str, arguments)])
    return code, capsys.readouterr().err


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_lora_is_drawn_with_recorded_and_drawn_with_again(files, here, capsys, shapes):
    style, other = files / "style.safetensors", files / "sub/other.safetensors"
    assert said([STAR, *FAST, "--lora", f"{style}:0.8", "--lora", other, "-o", "a.png"], capsys)[0] == 0
    assert said([STAR, *FAST, "-o", "plain.png"], capsys)[0] == 0
    model = sd.lora(sd.lora(shapes, style, 0.8), other)
    (wanted,) = sd.SimpleSampler(model)(STAR, num_inference_steps=1, scheduler="ddim")
    assert np.array_equal(pixels("a.png"), np.asarray(wanted))
    assert np.abs(pixels("a.png") - pixels("plain.png")).max() > 4  # rounding is 1
    settings = read_settings("a.png")
    assert settings["lora"] == [
        {"file": "style.safetensors", "scale": 0.8, "digest": hashlib.sha256(style.read_bytes()).hexdigest()[:10],
         "hash": content_digest(style)[:12]},
        {"file": "other.safetensors", "scale": 1.0, "digest": hashlib.sha256(other.read_bytes()).hexdigest()[:10],
         "hash": content_digest(other)[:12]},
    ]  # fmt: skip
    text = Image.open("a.png").text["parameters"]
    assert text.startswith(f"{STAR} <lora:style:0.8> <lora:other:1>\n")
    assert f'Lora hashes: "style: {content_digest(style)[:12]}, other: {content_digest(other)[:12]}"' in text
    code, error = said(["--again", "a.png", "--quiet", "--device", "cpu", "-o", "b.png"], capsys)
    assert code == 2
    assert "drawn with the LoRA style.safetensors, which is no file here: add --lora-dir" in error
    code, error = said(["--again", "a.png", "--quiet", "--device", "cpu", "--lora-dir", files, "-o", "b.png"], capsys)
    assert (code, error) == (0, "")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert read_settings("b.png")["lora"] == settings["lora"]
    assert (
        said(["--again", "a.png", "--quiet", "--device", "cpu", "--lora", f"{style}:0", "-o", "c.png"], capsys)[0]
        == 0
    )
    assert np.array_equal(pixels("c.png"), pixels("plain.png"))


def test_a_file_below_this_folder_is_found_again_and_another_one_is_named(files, here, capsys):
    Path("own").mkdir()
    Path("own/style.safetensors").write_bytes((files / "style.safetensors").read_bytes())
    assert said([STAR, *FAST, "--lora", "own/style.safetensors:0.5", "-o", "a.png"], capsys)[0] == 0
    assert read_settings("a.png")["lora"][0]["file"] == "own/style.safetensors"
    assert drawing_of({"again": "a.png"}).lora == (Chosen("own/style.safetensors", 0.5),)
    Path("own/style.safetensors").write_bytes((files / "sub/other.safetensors").read_bytes())
    command.digests.cache_clear()
    with pytest.warns(UserWarning, match=r"drawn with another LoRA than own/style\.safetensors"):
        drawing_of({"again": "a.png"})


def test_the_prompt_may_name_them(files, here, capsys):
    options = ["--lora-dir", files, *FAST]
    assert said([f"<lora:style:0.8>{STAR}<lora:other:0.5:1>", *options, "-o", "a.png"], capsys)[0] == 0
    drawing = drawing_of({"prompt": f"<lora:style:0.8>{STAR}<lora:other:0.5:1>", "lora_dir": [str(files)]})
    assert drawing.prompt == STAR
    assert drawing.lora == (
        Chosen(str(files / "style.safetensors"), 0.8),
        Chosen(str(files / "sub/other.safetensors"), {"text": 0.5, "unet": 1.0}),
    )
    settings = read_settings("a.png")
    assert settings["prompt"] == STAR
    assert settings["lora"][1]["scale"] == {"text": 0.5, "unet": 1.0}
    assert Image.open("a.png").text["parameters"].startswith(f"{STAR} <lora:style:0.8> <lora:other:0.5:1>\n")
    again = drawing_of({"again": "a.png", "lora_dir": [str(files)]})
    assert (again.prompt, again.lora) == (STAR, drawing.lora)


@pytest.mark.parametrize(
    ("tag", "scale"),
    [
        ("<lora:style>", 1.0),
        ("<lora:style:0.25>", 0.25),
        ("<lora:style:1:1>", 1.0),
        ("<lyco:style:te=0.5:unet=1>", {"text": 0.5, "unet": 1.0}),
        ("<lora:style:0.5:unet=2>", {"text": 0.5, "unet": 2.0}),
    ],
)
def test_scales_in_prompts_are_those_of_automatic1111(files, tag, scale):
    assert drawing_of({"prompt": f"x {tag}", "lora_dir": [str(files)]}).lora[0].scale == scale


def foreign(path, prompt, fields=""):
    info = PngInfo()
    text = f"{prompt}\nSteps: 1, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 128x128{fields}"
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


def test_pictures_of_automatic1111_find_theirs_by_name_and_by_digest(files, here):
    style = files / "style.safetensors"
    digest = content_digest(style)[:12]
    given = {"model": "shapes", "lora_dir": [str(files)]}
    for name, hashes in (
        ("style", ""),
        ("renamed", digest),
        ("renamed", hashlib.sha256(style.read_bytes()).hexdigest()[:10]),
    ):
        fields = f', Lora hashes: "{name}: {hashes}"' if hashes else ""
        picture = foreign("a.png", f"a star <lora:{name}:0.6>", fields)
        drawing = drawing_of({"again": picture, **given})
        assert (drawing.prompt, drawing.lora) == ("a star ", (Chosen(str(style), 0.6),))
    picture = foreign("a.png", "a star <lora:style:0.6>", ', Lora hashes: "style: 000000000000"')
    with pytest.warns(UserWarning, match="another LoRA"):
        drawing_of({"again": picture, **given})
    with pytest.raises(CommandError, match="names the LoRA 'style': say with --lora-dir"):
        drawing_of({"again": picture, "model": "shapes"})
    mine = drawing_of({"again": picture, "model": "shapes", "lora": [Chosen("x.safetensors")]})
    assert (mine.prompt, mine.lora) == ("a star ", (Chosen("x.safetensors"),))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora:stile:1>", "did you mean style?"),
        ("<lora:style:much>", "write <lora:NAME:0.8>"),
        ("<lora:style:1:1:1>", "write <lora:NAME:0.8>"),
        ("<lora:style:nan>", "write <lora:NAME:0.8>"),
        ("<lora:style:dyn=4>", "write <lora:NAME:0.8>"),
        ("<hypernet:style:1>", "a hypernetwork"),
    ],
)
def test_what_a_prompt_may_not_name(files, prompt, words):
    with pytest.raises(CommandError, match=words.replace("?", r"\?")):
        drawing_of({"prompt": prompt, "lora_dir": [str(files)]})


def test_other_words_in_angle_brackets_are_words(files):
    assert drawing_of({"prompt": "a <b> <c:d>"}).prompt == "a <b> <c:d>"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", Chosen("a.safetensors", 1.0)),
        ("a.safetensors:-0.5", Chosen("a.safetensors", -0.5)),
        ("C:\\a.safetensors", Chosen("C:\\a.safetensors", 1.0)),
        ("C:\\a.safetensors:2", Chosen("C:\\a.safetensors", 2.0)),
    ],
)
def test_file_and_scale(text, wanted):
    assert lora_file(text) == wanted


def test_a_file_with_a_colon_in_its_name(here):
    Path("a:0.5").write_bytes(b"")
    assert lora_file("a:0.5") == Chosen("a:0.5", 1.0)
    assert lora_file("a:0.5:0.7") == Chosen("a:0.5", 0.7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora", "x:nan"], "--lora must be like style.safetensors:0.8"),
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--lora-dir", "nowhere", "--lora", "x"], "x does not exist"),
        (["--lora"], "--lora needs a value after it"),
    ],
)
def test_messages(options, words, here, capsys):
    code, error = said([STAR, *FAST, *options], capsys)
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        "style", [1], [{"file": ""}], [{"file": "a", "scale": "x"}], [{"file": "a", "digest": "xyz"}], [{}] * 65,
        [{"file": "a", "scale": {"vae": 1}}], [{"file": "a", "other": 1}], [{"file": "a", "scale": True}],
    ],
)  # fmt: skip
def test_damaged_settings_are_one_sentence(value, here):
    info = PngInfo()
    info.add_itxt(JSON_CHUNK, json.dumps({"prompt": "a", "lora": value}))
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=info)
    with pytest.raises(CommandError, match="its setting lora is damaged"):
        drawing_of({"again": "a.png"})


@pytest.mark.parametrize(
    "variant",
    [
        ["--variant", "lean"],
        pytest.param(["--variant", "parallel", "--ranks", "2"], marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_run_draw_the_same(files, here, capsys, variant):
    style = f"{files / 'style.safetensors'}:0.8"
    assert said([STAR, *FAST, "--lora", style, "-o", "a.png"], capsys)[0] == 0
    code, error = said([STAR, *FAST, "--lora", style, *variant, "-o", "b.png"], capsys)
    assert code == 0, error
    assert np.abs(pixels("a.png") - pixels("b.png")).max() <= 1
    assert read_settings("b.png")["lora"] == read_settings("a.png")["lora"]

"""What a picture says of itself is read within bounds, believed only where it can be, and fetches nothing."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import sd
from sd.cli import main
from sd.cli.again import RECORDED
from sd.cli.draw import parser
from sd.cli.options import CommandError
from sd.cli.settings import Drawing, differences, drawing_of, hashes_of, settings_used
from sd.compare.reference import random_controlnet
from sd.image import SIGNATURE, read_settings, save_png
from sd.scheduler import make_scheduler
from tests.layouts import compvis_tensors, ema_tensors, write_ckpt, write_hub, write_tokenizer
from tests.loras import attention_of, lora_tensors, write_lora
from tests.test_image import SETTINGS

SOUND = {"prompt": "a red star", "model": "shapes", "num_inference_steps": 4}


def chunk(kind, data, *, crc=None):
    code = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", code)


HEAD = SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
END = chunk(b"IEND", b"")
BOMB = zlib.compress(b"[" + b" " * 150_000_000, 9)  # 150 kB that unpack to 150 MB
TEXT = b"sd\0" + json.dumps(SOUND).encode()


def png(path, *parts):
    path.write_bytes(b"".join([HEAD, *parts]))
    return path


@pytest.fixture
def said(tmp_path):
    """Write a picture that says this of itself."""

    def write(settings, name="a.png"):
        info = PngInfo()
        info.add_itxt("sd", settings if isinstance(settings, str) else json.dumps(settings))
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=info)
        return str(tmp_path / name)

    return write


# ---- reading


@pytest.mark.parametrize(
    "part",
    [
        chunk(b"tEXt", TEXT),
        chunk(b"zTXt", b"sd\0\0" + zlib.compress(TEXT[3:])),
        chunk(b"iTXt", b"sd\0\0\0en\0sd\0" + TEXT[3:]),
        chunk(b"iTXt", b"sd\0\1\0\0\0" + zlib.compress(TEXT[3:])),
    ],
)
@pytest.mark.parametrize(
    "before", [b"", chunk(b"tEXt", b"sdx\0no") + chunk(b"IDAT", b"x" * 50) + chunk(b"tEXt", b"")]
)
def test_text_is_read_from_every_kind_of_chunk_wherever_it_stands(part, before, tmp_path):
    assert read_settings(png(tmp_path / "a.png", before, part, END)) == SOUND


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([chunk(b"zTXt", b"sd\0\0" + BOMB), END], "damaged, or too long"),
        ([chunk(b"iTXt", b"sd\0\1\0\0\0" + BOMB), END], "damaged, or too long"),
        ([chunk(b"zTXt", b"comment\0\0" + BOMB), chunk(b"IDAT", BOMB), END], "no text chunk"),
        ([chunk(b"IDAT", BOMB)], "a part of it is missing"),
        ([chunk(b"tEXt", TEXT)[:-9]], "damaged, or too long"),
        ([chunk(b"tEXt", TEXT, crc=7), END], "damaged, or too long"),
        ([struct.pack(">I", 2**32 - 1) + b"tEXt" + TEXT], "damaged, or too long"),
        ([struct.pack(">I", 2**32 - 1) + b"IDAT"], "a part of it is missing"),
        ([chunk(b"zTXt", b"sd\0\0no zlib"), END], "its text is damaged"),
        ([chunk(b"zTXt", b"sd\0"), END], "damaged"),
        ([chunk(b"iTXt", b"sd\0"), END], "damaged"),
        ([chunk(b"iTXt", b'sd\0\0\0\0\0"\xff"'), END], "not text in UTF-8"),
        ([chunk(b"tEXt", b"sd\0" + b"[" * 900_000), END], "brackets"),
        ([chunk(b"tEXt", b"sd\0[" + b"[]," * 300_000 + b"1]"), END], "no JSON object"),
        ([chunk(b"tEXt", b'sd\0{"seed":' + b"9" * 9000 + b"}"), END], "too long"),
        ([chunk(b"tEXt", b"")] * 50_000, "a part of it is missing"),
        ([chunk(b"tEXt", b"")] * 80_000, "too many parts"),
    ],
)
def test_hostile_pictures_take_little_and_are_one_sentence(parts, says, tmp_path):
    path = png(tmp_path / "a.png", *parts)
    assert path.stat().st_size < 1_000_000
    start = time.process_time()
    with pytest.raises(ValueError, match=says) as caught:
        read_settings(path)
    assert time.process_time() - start < 20  # not the hours of what grows with the square; 1 to 2 s on a busy machine
    tracemalloc.start()  # in a second run, for it takes time itself
    try:
        with pytest.raises(ValueError, match=says):
            read_settings(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path} ")
    assert str(caught.value).endswith(".")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "device.png", "."):
        with pytest.raises(ValueError, match="not a regular file"):
            read_settings(tmp_path / name)
    for name in ("none.png", "a\0b.png", "x" * 300):
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            read_settings(tmp_path / name)


def test_a_picture_of_another_format_is_not_tried(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", "GIF")
    with pytest.raises(ValueError, match="it is no PNG"):
        read_settings(tmp_path / "a.png")


# ---- settings, one by one


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", [["a"], 1, True, {}, "x" * 100_001, "\ud800"]),
        ("negative_prompt", [["a"], 0, "\udcff"]),
        ("seed", ["3", -1, 2**63, 10**400, 3.0, True, float("nan"), [1]]),
        ("num_inference_steps", [0, -5, 10**9, 5.5, "7", False]),
        ("height", [0, 7, 10**9, "8", 128.0]),
        ("width", [0, 7, 10**9, True]),
        ("guidance_scale", [float("nan"), float("inf"), -1, 101, 10**400, "7", True]),
        ("eta", [float("-inf"), 2, "x", False]),
        ("scheduler", ["eulr", "Euler a", "PNDM\n", 3, ["ddim"]]),
        ("dtype", ["load", "int8", "float", 16, "__class__"]),
        ("model", [1, "", "a\0b", "x" * 1001, ["shapes"]]),
        ("revision", [1, "", "a\0b"]),
        ("ema", ["yes", 1, 0]),
        ("config", ["c.json", [1], {"unet": 1}, {"unet": [1]}]),
        ("model_hash", [5, "xyz", "a" * 65]),
        ("vae_hash", ["\x1b[31m"]),
        ("text_hash", [1.5]),
        ("config_hash", ["é"]),
        ("tokenizer_hash", [[]]),
    ],
)
def test_every_setting_is_checked(name, values, said):
    assert not RECORDED.keys() - set(Drawing.__dataclass_fields__)
    for value in values:
        with pytest.raises(CommandError, match=rf"cannot be drawn again: its setting {name} is damaged \(") as caught:
            drawing_of({"again": said(SOUND | {name: value})})
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


def test_other_names_and_nothing_are_passed_over(said):
    drawing = drawing_of({"again": said(SOUND | {"output": "/etc/passwd", "force": True, "eta": None, "x": {}})})
    assert drawing == Drawing("a red star", num_inference_steps=4, again=drawing.again)


# ---- the model that a picture names


@pytest.mark.parametrize(
    "model", ["CompVis/stable-diffusion-v1-4", "gone.ckpt", "~/x.ckpt", "/here.ckpt", "C:\\x.ckpt"]
)
def test_a_picture_names_only_what_is_here(model, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.ckpt").write_bytes(b"")
    model = str(tmp_path / "here.ckpt") if model.startswith("/") else model
    picture = said(SOUND | {"model": model, "revision": "v1; rm -rf ~", "hub_variant": "fp16"})
    with pytest.raises(CommandError, match="--model ") as caught:
        drawing_of({"again": picture})
    assert model[-20:] in str(caught.value)  # a long one loses its middle
    assert "--revision 'v1; rm -rf ~' --hub-variant fp16" in str(caught.value)  # as a shell takes it for one word
    assert drawing_of({"again": said(SOUND | {"model": "here.ckpt"})}).model == "here.ckpt"


def test_what_belongs_to_a_model_goes_with_it(said):
    hashes = {"model_hash": "ab", "vae_hash": "cd", "text_hash": "01", "config_hash": "23", "tokenizer_hash": "ef"}
    picture = said(SOUND | hashes | {"model": "me/mine", "revision": "r", "ema": True, "config": {"unet": {}}})
    same = drawing_of({"again": picture, "model": "/disk/mine"})
    assert {name: getattr(same, name) for name in hashes} == hashes
    assert (same.ema, same.config) == (True, {"unet": {}})
    assert same.revision is None  # that is fetched only where it is asked for
    other = drawing_of({"again": picture, "model": "other.ckpt"})
    assert other == Drawing("a red star", num_inference_steps=4, model="other.ckpt", again=picture)


# ---- what is recorded


def test_the_content_of_a_config_is_recorded_and_used_again(tmp_path):
    config = {"unet": {"num_heads": 4}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    drawing = drawing_of({"prompt": "a red star", "config": str(tmp_path / "c.json")})
    assert drawing.config == config
    request = SimpleNamespace(
        scheduler=make_scheduler("ddim", 3), guidance=(2, 0.0), height=8, width=8, pictures=None
    )
    used = settings_used(drawing, SimpleNamespace(dtype="torch.float32"), request)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS | used | {"model_hash": "ab", "seed": 3})
    again = drawing_of({"again": str(tmp_path / "a.png")})
    assert (again.config, again.seed, again.scheduler) == (config, 3, "ddim")
    (tmp_path / "d.json").write_text("{}")
    assert drawing_of({"again": str(tmp_path / "a.png"), "config": str(tmp_path / "d.json")}).config == {}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """Of the Hub's layout, the UNet in two files."""
    path = write_hub(tmp_path_factory.mktemp("hub") / "hub", tiny)
    tensors = load_file(path / "unet/diffusion_pytorch_model.safetensors")
    (path / "unet/diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    for k, part in enumerate((names[:40], names[40:]), 1):
        file = path / f"unet/diffusion_pytorch_model-0000{k}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
    return path


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "model_hash", "another UNet"),
        ("unet/diffusion_pytorch_model-00002-of-00002.safetensors", "model_hash", "another UNet"),
        ("vae/diffusion_pytorch_model.safetensors", "vae_hash", "another VAE"),
        ("text_encoder/model.safetensors", "text_hash", "another text encoder"),
        ("scheduler/scheduler_config.json", "config_hash", "other sizes, or another noise schedule"),
        ("text_encoder/config.json", "config_hash", "other sizes, or another noise schedule"),
        ("tokenizer/merges.txt", "tokenizer_hash", "another tokenizer"),
    ],
)
def test_it_is_said_which_part_differs(folder, file, name, words):
    """Every part of a folder, also one that is split over files; and the others do not differ then."""
    before, content = hashes_of(sd.load(folder)), (folder / file).read_bytes()
    assert all(before.values())
    drawing = Drawing("a red star", again="a.png", **before)
    assert differences(drawing, hashes_of(sd.load(folder))) == []
    if file.endswith("safetensors"):
        changed = content[:-1] + bytes([content[-1] ^ 1])
    elif file.endswith("json"):
        changed = content.replace(b"0.00085", b"0.00095").replace(b"quick_gelu", b"gelu")
    else:
        changed = content.rstrip().rpartition(b"\n")[0]
    assert changed != content
    try:
        (folder / file).write_bytes(changed)
        now = hashes_of(sd.load(folder))
    finally:
        (folder / file).write_bytes(content)
    assert {key for key in now if now[key] != before[key]} == {name}
    (said,) = differences(drawing, now)
    assert said.startswith(f"a.png was drawn with {words} (the hash was {before[name]}, and now it is {now[name]})")


def test_of_one_file_all_weights_are_one(tiny, tmp_path):
    sd.save(tiny, tmp_path / "a.safetensors")
    model = sd.load(tmp_path / "a.safetensors")
    hashes = hashes_of(model)
    assert hashes["model_hash"] == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()[:10]
    assert (hashes["vae_hash"], hashes["text_hash"]) == (None, None)
    assert hashes["config_hash"] == hashes_of(tiny)["config_hash"]
    drawing = Drawing("a red star", again="a.png", **hashes)
    now = hashes | {"model_hash": "ab", "tokenizer_hash": "cd"}
    (said,) = differences(drawing, now)  # one sentence for all
    assert "with other weights (the hash" in said
    assert said.endswith("now it is cd), so this picture may differ; choose by --model and --tokenizer.")
    gone = sd.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").unlink()
    assert hashes_of(gone) == hashes | {"model_hash": None}


def test_all_of_the_solver_is_recorded(tiny, tmp_path, monkeypatch, capsys):
    """Also what its name does not say: the spacing of a model's files, which others may have by then."""
    monkeypatch.chdir(tmp_path)
    folder = write_hub(tmp_path / "hub", tiny)
    file = folder / "scheduler/scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}))
    size = ("--height", "64", "--width", "64", "--steps", "3")
    assert main(["a red star", "--model", "hub", "-o", "a.png", *size]) == 0
    assert read_settings("a.png")["solver_options"] == {"timestep_spacing": "trailing"}
    file.write_text(json.dumps(settings | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}))
    assert main(["--again", "a.png", "-o", "b.png"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    assert main(["--again", "a.png", "-o", "c.png", "--scheduler", "euler"]) == 0
    assert Image.open("a.png").tobytes() != Image.open("c.png").tobytes()
    assert "drawn with" not in capsys.readouterr().err  # the same model
    file.write_text(json.dumps(settings | {"beta_end": 0.013}))
    assert main(["--again", "a.png", "-o", "e.png"]) == 0
    assert "a.png was drawn with other sizes, or another noise schedule (the hash" in capsys.readouterr().err
    image = Image.open("a.png")
    save_png(image, "d.png", read_settings("a.png") | {"solver_options": {"nothing": 1}})
    assert main(["--again", "d.png"]) == 2


# ---- drawn with every option

FROM_FILE = ["--model", "m.safetensors", "--height", "64", "--width", "72"]
FULL = ["--model", "full.ckpt", "--tokenizer", "words", "--height", "64", "--width", "64"]
EVERY = {  # what is drawn -> what has to be given again, because a picture does not hold it
    ("--prompt-style", "a1111", "--negative", "(b:1.2)", "--clip-skip", "1", "--rng", "cuda", "--seed", "7",
     "--scheduler", "DPM++ 2M Karras", "--guidance", "5.5", "--guidance-rescale", "0.5", "--dtype", "float64",
     *FROM_FILE): [],
    ("--prompt-style", "compel", "--scheduler", "ddim", "--eta", "0.5", "--count", "2", "--seed", "random", "--exact",
     *FROM_FILE): [],
    ("--prompt-style", "comfy", "--image", "w.png", "--mask", "k.png", "--strength", "0.7", "--no-paste",
     "--scheduler", "euler_a", *FROM_FILE): ["--image", "w.png", "--mask", "k.png"],
    ("--image", "w.png", "--extend", "right=8,top=16", "--model", "m.safetensors"): ["--image", "w.png"],
    ("--hires", "1.5", "--scheduler", "unipc", "--threads", "1", *FROM_FILE): [],
    ("--recipe", "turbo", *FROM_FILE): [],
    ("--lora", "style.safetensors:0.5", "--lora-dir", ".", *FROM_FILE): [],
    ("--embedding", "cat.bin", "--vae", "v.safetensors", *FROM_FILE): [],
    ("--controlnet", "net.safetensors:0.5", "--control-image", "w.png", "--canny", "--control-start", "0.1",
     "--control-end", "0.9", "--guess-mode", *FROM_FILE): ["--control-image", "w.png"],
    ("--ema", "--config", "c.json", *FULL): ["--tokenizer", "words"],
    ("--model", "hub", "--hub-variant", "half", "--height", "64", "--width", "64", "--device", "cpu"):
     ["--device", "cpu"],
}  # fmt: skip
ELSEWHERE = {"--again", "--embedding-dir"}  # in tests/test_given_parts.py
ELSEWHERE |= {"--revision"}  # of the Hub: it is named by tests/test_hub.py's own
NOT_OF_THE_PICTURE = {"--output", "--force", "--quiet", "--plan", "--variant", "--memory", "--ranks", "--split"}
NOT_OF_THE_PICTURE |= {"--preview", "--preview-vae"}


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """One in each form, and two pictures."""
    path = tmp_path_factory.mktemp("models")
    sd.save(tiny, path / "m.safetensors")
    write_ckpt(path / "full.ckpt", compvis_tensors(tiny) | ema_tensors(tiny))
    write_tokenizer(path / "words")
    sd.save_controlnet(random_controlnet(tiny), path / "net.safetensors")
    write_lora(path / "style.safetensors", lora_tensors(tiny, list(attention_of(tiny)))[0])
    torch.save({"star": torch.ones(2, 64)}, path / "cat.bin")
    save_file({name: 1.1 * t for name, t in tiny.vae.state_dict().items()}, path / "v.safetensors")
    (path / "c.json").write_text(json.dumps({"unet": {"num_heads": 4}}))
    hub = write_hub(path / "hub", tiny)
    for file in [*hub.glob("*/*.safetensors")]:
        file.rename(file.with_suffix(".half.safetensors"))
    image = Image.linear_gradient("L").resize((72, 64))
    image.convert("RGB").save(path / "w.png")
    image.point(lambda x: 255 * (x > 100)).save(path / "k.png")
    return path


@pytest.mark.parametrize("options", EVERY, ids=lambda options: " ".join(options[:2]))
def test_what_was_drawn_with_every_option_is_drawn_again(options, models, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(models)
    steps = ["--steps", "3", "--quiet", "--force"]
    assert main(["a (red:1.3) star++", *options, *steps, "-o", str(tmp_path / "a.png")]) == 0
    name = "a-2.png" if "--count" in options else "a.png"
    recwarn.clear()
    picture, again = tmp_path / name, tmp_path / "b.png"
    assert main(["--again", str(picture), *EVERY[options], "--quiet", "-o", str(again)]) == 0
    assert [str(warning.message) for warning in recwarn if "prompt-style" not in str(warning.message)] == []
    assert Image.open(picture).tobytes() == Image.open(again).tobytes()
    assert read_settings(picture) == read_settings(again)


def test_no_option_is_left_out():
    known = {option for action in parser()._actions for option in action.option_strings if option.startswith("--")}
    given = {word for options in EVERY for word in options if word.startswith("--")}
    twice = {"--paste", "--help", "--version"}  # --no-paste is the same option
    assert known - given - ELSEWHERE - NOT_OF_THE_PICTURE - twice == {"--steps"}

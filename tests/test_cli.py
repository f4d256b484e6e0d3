"""The command `artist` as a newcomer would use and misuse it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd.cli import draw, main
from sd.cli.settings import Drawing, drawing_of
from sd.image import read_settings
from sd.scheduler import make_scheduler

CAPTION = "a red star above a blue ring on a white background"


def artist(*args, cwd, **options):
    return subprocess.run(
        [sys.executable, "-m", "sd", *map(str, args)], cwd=cwd, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with star.png in it, and what the command said."""
    folder = tmp_path_factory.mktemp("drawn")
    done = artist(CAPTION, "-o", "star.png", "--steps", 4, "--seed", 3, "--negative", "black", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


COMMANDS = ["draw", "study", "describe", "info", "compare", "convert"]


def helped(words, capsys):
    """What the command prints for help, which is no error."""
    try:
        code = main(words)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert not code
    return capsys.readouterr().out


def test_help_needs_nothing_but_the_standard_library():
    code = """
import sys
from sd.cli import main
try:
    main(["--help"])
finally:
    for name in ("torch", "numpy", "PIL", "tqdm", "transformers", "difflib"):
        assert name not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--scheduler" in done.stdout


def test_help_names_every_command(capsys):
    text = helped(["help"], capsys)
    assert text == helped(["--help"], capsys) == helped(["-h"], capsys) == helped(["help", "draw"], capsys)
    for name in COMMANDS:
        assert f"artist {name} " in text


@pytest.mark.parametrize("name", COMMANDS[1:])
def test_help_about_one_command(name, capsys):
    text = helped(["help", name], capsys)
    assert text == helped([name, "--help"], capsys)
    assert text.startswith(f"usage: artist {name} ")


def test_help_speaks_of_no_python(capsys):
    for name in COMMANDS:
        assert not re.search(r"None|True|False|torch\.|=\s|\w+_\w+", helped(["help", name], capsys))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inof", "model.ckpt"], "did you mean 'artist info'? To draw that word: artist draw inof."),
        (["inof"], "There is no command 'inof'; did you mean 'artist info'?"),
        (["Compair"], "did you mean 'artist compare'?"),
        (["hlep"], "did you mean 'artist help'?"),
        (["help", "stduy"], "did you mean 'artist study'?"),
        (["help", "paint"], "There is no command 'paint': the commands are draw, study"),
        (["a", "red", "star"], "quotation marks"),
        (["info", "a", "b"], "cannot use the word 'b'"),
        (["info"], "artist info --help"),
        (["star of gold", "--stpes", "3"], "There is no option --stpes; did you mean --steps?"),
        (["star of gold", "--steps"], "--steps needs a value after it"),
    ],
)
def test_slips_get_a_suggestion(words, says, capsys):
    refused(words, capsys, says)


@pytest.mark.parametrize("words", [["draw", "inof"], ["--", "inof"], ["star"], ["Drawing a house"]])
def test_a_word_that_is_no_command_is_drawn(words, tmp_path, capsys, monkeypatch):
    """As far as the first thing that is looked at then: where the picture goes."""
    monkeypatch.chdir(tmp_path)
    place = ["-o", "nowhere/x.png"]
    refused([*words[:1], *place, *words[1:]] if words[0] == "draw" else [*place, *words], capsys, "no folder nowhere")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--variant", "lean", "--exact"],
            "--exact only works with --variant simple, and you asked for --variant lean",
        ),
        (["--variant", "simple", "--plan"], "--plan only works with --variant lean or parallel, and you asked for"),
        (["--memory", "600MB"], "--memory only works with --variant lean: add that, or leave --memory out."),
        (["--variant", "lean", "--split", "rows=2"], "--split only works with --variant parallel, and"),
        (["--ranks", "2"], "--ranks only works with --variant parallel: add that, or leave --ranks out."),
        (["--variant", "lean", "--memory", "much"], "600MB"),
        (["--variant", "small"], "--variant must be simple, lean or parallel, not small"),
    ],
)
def test_options_that_exclude_each_other(options, says, capsys):
    refused([CAPTION, *options], capsys, says)


def test_a_drawing_is_what_is_given_and_nothing_else():
    drawing = drawing_of({"prompt": CAPTION, "seed": 3, "scheduler": "ddim"})
    assert drawing == Drawing(CAPTION, seed=3, scheduler="ddim")
    assert drawing.call == {"negative_prompt": "", "scheduler": "ddim", "eta": 0.0}  # the rest is the model's
    with pytest.raises(FrozenInstanceError):
        drawing.seed = 4


def test_again_takes_what_is_not_given_from_the_picture(drawn):
    star = str(drawn[0] / "star.png")
    drawing = drawing_of({"again": star, "seed": 9, "guidance_scale": 2.0})
    assert (drawing.prompt, drawing.negative_prompt, drawing.seed) == (CAPTION, "black", 9)
    assert (drawing.num_inference_steps, drawing.guidance_scale, drawing.height) == (4, 2.0, 128)
    assert drawing.model_hash
    assert drawing_of({"again": star, "model": "other.ckpt"}).model_hash is None  # other weights are asked for


@pytest.mark.parametrize(("name", "value"), [("seed", "three"), ("dtype", "load"), ("prompt", ["a"]), ("model", 1)])
def test_damaged_settings_are_refused(name, value, tmp_path, capsys):
    settings = {"prompt": CAPTION, "num_inference_steps": 1, "model": "shapes", name: value}
    info = PngInfo()
    info.add_itxt("sd", json.dumps(settings))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    refused(["--again", tmp_path / "x.png"], capsys, "cannot be drawn again", name)


class Counting:
    """A sampler that stands for any: it draws black pictures, and counts."""

    def __init__(self, split=None):
        self.asked, self.calls = split, []
        self.model = SimpleNamespace(dtype="torch.float32", hash="0123456789")

    def request(self, prompt, *, seed, num_images_per_prompt, **call):
        self.calls.append((seed, num_images_per_prompt))
        scheduler = make_scheduler("pndm", 1)
        return SimpleNamespace(
            images=num_images_per_prompt,
            scheduler=scheduler,
            guidance=(7.5, 0.0),
            height=8,
            width=8,
            timesteps=[1.0],
            pictures=None,
        )

    def run(self, request):
        yield SimpleNamespace(latents=request.images)

    def finish(self, images, request):
        return [Image.new("RGB", (8, 8))] * images


def test_the_last_pictures_have_a_smaller_split(monkeypatch):
    """Five pictures, two at a time: the fifth is drawn by a sampler whose split deals out one."""
    made = []

    def make_sampler(model, drawing):
        made.append(Counting(drawing.split))
        return made[-1]

    monkeypatch.setattr(draw, "make_sampler", make_sampler)
    monkeypatch.setattr(draw, "at_once", lambda sampler, drawing: 2)
    first = Counting({"image": 2, "rows": 1})
    drawing = Drawing(CAPTION, seed=7, count=5, variant="parallel", split={"image": 2, "rows": 1})
    found = list(draw.pictures(first, drawing, show=False))
    assert [drawn.number for drawn in found] == [0, 1, 2, 3, 4]
    assert [drawn.settings["seed"] for drawn in found] == [7, 8, 9, 10, 11]
    assert first.calls == [(7, 2), (9, 2)]
    assert first.asked == {"image": 2, "rows": 1}
    assert [(s.asked, s.calls) for s in made] == [({"image": 1, "rows": 1}, [(11, 1)])]


def test_without_arguments_it_says_how(capsys):
    assert main([]) == 2
    assert "usage: artist" in capsys.readouterr().out


def test_it_draws_and_says_where(drawn):
    folder, done = drawn
    assert done.stdout.startswith("star.png  128 x 128, seed 3")
    assert "4/4" in done.stderr  # the bar
    with Image.open(folder / "star.png") as image:
        assert image.size == (128, 128)
    assert [p.name for p in folder.iterdir()] == ["star.png"]  # and leaves nothing else


def test_the_png_says_how_it_was_drawn(drawn):
    with Image.open(drawn[0] / "star.png") as image:
        text = image.text
    first, second, third = text["parameters"].split("\n")
    assert first == CAPTION
    assert second == "Negative prompt: black"
    fields = dict(field.split(": ") for field in third.split(", "))
    assert fields["Steps"] == "4"
    assert fields["Sampler"] == "DDIM"
    assert fields["CFG scale"] == "7.5"
    assert fields["Seed"] == "3"
    assert fields["Size"] == "128x128"
    assert fields["Model"] == "shapes"
    assert len(fields["Model hash"]) == 10
    settings = json.loads(text["sd"])
    assert settings["num_inference_steps"] == 4
    # What was left to the model (what it draws best with) is there as it was used, and what no picture needs is not.
    assert (settings["guidance_scale"], settings["scheduler"], settings["height"]) == (7.5, "ddim", 128)
    assert settings["dtype"] == "float32"
    assert not settings.keys() & {"output", "force", "variant", "device"}


@pytest.mark.slow
def test_again_draws_the_same_and_options_change_it(drawn, tmp_path):
    star = drawn[0] / "star.png"
    done = artist("--again", star, "-o", "same.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    other = artist("--again", star, "--seed", 9, "-o", "other.png", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    pictures = [Image.open(p).tobytes() for p in (star, tmp_path / "same.png", tmp_path / "other.png")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_solver_by_another_program_s_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [CAPTION, "--scheduler", "DPM++ 2M Karras", "--steps", "2", "--quiet", "-o"]
    assert main([*words, "a.png"]) == 0
    texts = Image.open("a.png").text
    assert json.loads(texts["sd"])["scheduler"] == "dpmpp_2m_karras"
    assert "Sampler: DPM++ 2M, Schedule type: Karras," in texts["parameters"]
    assert main(["--again", "a.png", "--quiet", "-o", "b.png"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


@pytest.mark.slow
def test_several_pictures_are_numbered_and_take_the_next_seeds(drawn, tmp_path):
    done = artist(CAPTION, "--count", 2, "--steps", 4, "--seed", 2, "--negative", "black", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    second = tmp_path / "artist-002.png"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "artist-001.png", second]
    assert Image.open(second).tobytes() == Image.open(drawn[0] / "star.png").tobytes()  # seed 3
    done = artist(CAPTION, "--steps", 2, "--quiet", cwd=tmp_path)
    assert (tmp_path / "artist-003.png").exists()
    assert done.stderr == ""


def refused(args, capsys, *words):
    """The command refuses: exit code 2, one sentence with these words."""
    try:
        code = main([str(a) for a in args])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2, error
    sentence = error.strip().splitlines()[-1]
    assert sentence.startswith("artist: error: ")
    for word in words:
        assert word in sentence
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--steps", 0], "num_inference_steps"),
        (["--steps", 1001], "num_inference_steps"),
        (["--steps", "many"], "--steps"),
        (["--guidance", -1], "guidance_scale"),
        (["--guidance", "nan"], "guidance_scale"),
        (["--height", 100], "height must be a multiple of 8"),
        (["--width", 0], "width must be a multiple of 8"),
        (["--width", 80000], "width"),
        (["--eta", 2, "--scheduler", "ddim"], "eta"),
        (["--eta", 0.5, "--scheduler", "plms"], "ddim"),
        (["--scheduler", "eulr"], "pndm"),
        (["--count", 0], "--count"),
        (["--seed", -2], "seed"),
        (["--device", "quantum"], "--device cpu"),
        (["--dtype", "int8"], "--dtype"),
        (["--model", "no-such-file.ckpt"], "no-such-file.ckpt"),
        (["-o", "no/such/folder/x.png"], "no folder"),
        (["-o", "x.jpg"], "PNG"),
        (["--again", "nothing.png"], "nothing.png"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(options, word, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused([CAPTION, *options], capsys, word)
    assert list(tmp_path.iterdir()) == []


def test_no_prompt_is_refused(capsys):
    refused(["--steps", 3], capsys, "give a prompt")


def test_an_existing_file_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("star.png").write_text("mine")
    refused([CAPTION, "-o", "star.png", "--steps", 1], capsys, "--force")
    assert Path("star.png").read_text() == "mine"
    assert main([CAPTION, "-o", "star.png", "--steps", "1", "--force"]) == 0
    assert Image.open("star.png").size == (128, 128)


def test_a_picture_without_settings_cannot_be_drawn_again(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    refused(["--again", tmp_path / "plain.png"], capsys, "does not say how it was drawn")


@pytest.mark.slow
def test_unknown_words_get_a_warning_that_names_them(tmp_path):
    done = artist("a red astronaut riding a horse", "--steps", 1, cwd=tmp_path)
    assert done.returncode == 0
    (warning,) = [line for line in done.stderr.splitlines() if "warning" in line]
    for word in ("astronaut", "riding", "horse", "--model"):
        assert word in warning


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_at_once_and_keeps_finished_pictures(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "sd", CAPTION, "--count", "500", "--steps", "3"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A test run in a shell's background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith("artist-001.png")  # one is finished, the next begun
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    files = sorted(tmp_path.iterdir())
    assert files[0].name == "artist-001.png"
    for file in files:
        assert file.suffix == ".png"
        Image.open(file).load()  # whole


def test_convert_and_info(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "shapes", "mine.safetensors", "--dtype", "float16"]) == 0
    assert "mine.safetensors" in capsys.readouterr().out
    refused(["convert", "shapes", "mine.safetensors"], capsys, "exists")
    assert main(["info", "mine.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "float16" in out
    assert main([CAPTION, "--model", "mine.safetensors", "--steps", "2", "-o", "mine.png"]) == 0
    assert main([CAPTION, "--steps", "2", "-o", "builtin.png"]) == 0
    assert Image.open("mine.png").tobytes() == Image.open("builtin.png").tobytes()
    refused(["info", "nothing.ckpt"], capsys, "nothing.ckpt")


def test_pictures_in(tmp_path, monkeypatch, capsys):
    """Drawn from a picture, with a mask and beyond its edges; drawn again only with the same pictures at hand."""
    monkeypatch.chdir(tmp_path)
    quick = ["--steps", "2", "--quiet"]
    Image.new("RGB", (64, 64), "white").save("white.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    assert main(["a red star", "--image", "white.png", "--mask", "mask.png", "-o", "a.png", *quick]) == 0
    a = Image.open("a.png")
    assert a.size == (64, 64)
    assert a.crop((32, 0, 64, 64)).getextrema() == ((255, 255),) * 3
    settings = read_settings("a.png")
    assert (settings["image"], settings["mask"], settings["strength"]) == ("white.png", "mask.png", 0.8)
    assert main(["--again", "a.png", "-o", "b.png", *quick]) == 2
    assert "add --image white.png --mask mask.png" in capsys.readouterr().err
    again = ["--again", "a.png", "--image", "white.png", "--mask", "mask.png", "--quiet"]
    assert main([*again, "-o", "b.png"]) == 0
    assert Image.open("b.png").tobytes() == a.tobytes()
    Image.new("RGB", (64, 64), "red").save("white.png")
    assert main([*again, "-o", "c.png"]) == 0
    assert "another image than white.png" in capsys.readouterr().err
    assert main(["a red star", "--image", "mask.png", "--extend", "left=16,top=8", "-o", "d.png", *quick]) == 0
    assert Image.open("d.png").size == (80, 72)
    assert main(["a red star", "--height", "64", "--width", "64", "--hires", "1.5", "-o", "e.png", *quick]) == 0
    assert Image.open("e.png").size == (96, 96)
    capsys.readouterr()
    assert main(["a red star", "--variant", "lean", "--plan", "--hires", "2"]) == 0
    small, large = capsys.readouterr().out.split("The picture, enlarged:")
    assert "128 x 128" in small
    assert "256 x 256" in large
    Image.new("RGB", (2000, 1008), "red").save("white.png")
    with pytest.warns(UserWarning, match="2000 x 1008 pixels, and is drawn at that size"):
        drawing_of({"prompt": "a red star", "image": "white.png"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mask", "m.png"], "--mask is about a picture"),
        (["--strength", "0.5"], "--strength is about a picture"),
        (["--no-paste"], "--no-paste is about a picture"),
        (["--extend", "left=8"], "--extend is about a picture"),
        (["--image", "none.png"], "none.png cannot be read"),
        (["--image", "w.png", "--mask", "alpha"], "no transparency"),
        (["--image", "w.png", "--mask", "w.png", "--extend", "left=8"], "leave --mask out"),
        (["--image", "w.png", "--mask", "w.png", "--hires", "2"], "leave --mask and --extend out"),
        (["--image", "w.png", "--extend", "left=9000"], "--extend must be like left=128"),
        (["--image", "w.png", "--extend", "middle=8"], "--extend must be like left=128"),
        (["--image", "w.png", "--strength", "0"], "strength 0"),
        (["--image", "w.png", "--strength", "2"], "--strength must be a number above 0"),
        (["--hires", "1"], "--hires must be a number above 1"),
        (["--hires", "8", "--width", "2048", "--quiet"], "hires 8 makes a picture of 16384 x 1024 pixels"),
    ],
)
def test_pictures_that_cannot_be_used(tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "white").save("w.png")
    assert main(["a red star", "-o", "a.png", "--steps", "2", *options]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_is_drawn_over_itself(tmp_path, monkeypatch):
    """The image is read once: the second picture is drawn from it, not from the first."""
    monkeypatch.chdir(tmp_path)
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    picture.save("a-1.png")
    quick = ["--steps", "2", "--quiet", "--force"]
    assert main(["a red star", "--image", "a-1.png", "-o", "a.png", "--count", "2", *quick]) == 0
    picture.save("b.png")
    assert main(["a red star", "--image", "b.png", "-o", "c.png", "--seed", "1", *quick]) == 0
    assert Image.open("a-2.png").tobytes() == Image.open("c.png").tobytes()


def test_what_is_given_takes_the_place_of_what_a_picture_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "white").save("w.png")
    Image.new("L", (64, 64), 255).save("m.png")
    quick = ["--steps", "2", "--quiet", "--force"]
    assert main(["a red star", "--image", "w.png", "--extend", "right=32", "-o", "a.png", *quick]) == 0
    assert main(["--again", "a.png", "--image", "w.png", "--extend", "left=8", "-o", "b.png", *quick]) == 0
    assert Image.open("b.png").size == (72, 64)
    assert main(["--again", "a.png", "--image", "w.png", "--mask", "m.png", "-o", "c.png", *quick]) == 0
    assert Image.open("c.png").size == (64, 64)
    assert "Denoising strength" in Image.open("c.png").text["parameters"]


@pytest.mark.parametrize("prompt", ["a (red:1.3) star", "((red)) star", "a BREAK b"])
def test_a_prompt_that_looks_weighted_is_hinted_at(prompt):
    with pytest.warns(UserWarning, match="--prompt-style a1111 or comfy"):
        drawing_of({"prompt": prompt})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing_of({"prompt": prompt, "prompt_style": "plain"})
        drawing_of({"prompt": prompt, "prompt_style": "a1111"})
        drawing_of({"prompt": "a star (red) at 3:45"})


def test_style_and_skipped_layers_are_recorded_and_drawn_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "2", "--quiet", "--prompt-style", "a1111", "--clip-skip", "1"]
    assert main(["a (red:1.5) star BREAK a ring", "-o", "a.png", *options]) == 0
    settings = read_settings("a.png")
    assert (settings["prompt_style"], settings["clip_skip"]) == ("a1111", 1)
    assert "Clip skip: 2" in Image.open("a.png").info["parameters"]
    assert main(["--again", "a.png", "-o", "b.png", "--quiet"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    assert main(["--again", "a.png", "-o", "c.png", "--quiet", "--clip-skip", "0"]) == 0
    assert Image.open("a.png").tobytes() != Image.open("c.png").tobytes()
    capsys.readouterr()
    assert main(["a [red|blue] star", *options]) == 2
    assert "Alternation" in capsys.readouterr().err

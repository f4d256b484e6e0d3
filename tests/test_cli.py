"""The command `artist` as a newcomer would use and misuse it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd.cli import main

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


def test_help_needs_no_torch():
    code = """
import sys
from sd.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--scheduler" in done.stdout


def test_without_arguments_it_says_how(capsys):
    assert main([]) == 2
    assert "usage: artist" in capsys.readouterr().out


def test_it_draws_and_says_where(drawn):
    folder, done = drawn
    assert done.stdout.startswith("star.png  128 x 128, seed 3")
    assert "5/5" in done.stderr  # the bar: PNDM makes one call more than steps
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
    assert fields["Sampler"] == "PLMS"
    assert fields["CFG scale"] == "7.5"
    assert fields["Seed"] == "3"
    assert fields["Size"] == "128x128"
    assert fields["Model"] == "shapes"
    assert len(fields["Model hash"]) == 10
    assert json.loads(text["sd"])["num_inference_steps"] == 4


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
        (["--eta", 0.5], "ddim"),
        (["--scheduler", "euler"], "pndm"),
        (["--count", 0], "--count"),
        (["--seed", -1], "seed"),
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

"""Every message of the command is one sentence for somebody who knows no Python, whatever words it was given."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd.cli import main
from tests.layouts import compvis_tensors, write_ckpt

STAR = "a red star"
EVIL = "\x1b[31mred\x1b[0m\u202e\u200b\r\n"
LONG = "x" * 5000
PYTHON = re.compile(r"\w=[\w'\"(\[]|Traceback|torch\.|\[Errno|\bNone\b|\bTrue\b|\bFalse\b|__|<class|Error\b|\(\)")

WRONG = [
    *([STAR, f"--{name}", value] for name in ("steps", "height", "width", "count", "seed", "guidance", "eta")
      for value in ("x", "1e999", "-7", "nan", "", EVIL, LONG, "9" * 400)),
    *([STAR, f"--{name}", value] for name in ("device", "dtype", "scheduler", "variant", "split", "ranks")
      for value in ("x", "", EVIL, LONG, "-1", "cuda:99", "meta")),
    *([STAR, "--variant", "lean", "--memory", value]
      for value in ("x", "-1", "0", "9" * 300, "1e9", EVIL, "nan", "7 XB")),
    *([STAR, "--model", value]
      for value in ("nothing.ckpt", "a/../b", EVIL, LONG, "/dev/null", "/proc/self/mem", ".")),
    *([STAR, "--again", value] for value in ("nothing.png", EVIL, LONG, "/dev/zero", ".", "text.png", "other.png")),
    *([STAR, "-o", value]
      for value in ("no/folder/x.png", "x.jpg", "there.png", f"{LONG}.png", "/dev/null", "/proc/x.png", EVIL)),
    *([STAR, "--config", value]
      for value in ("nothing.json", "/dev/zero", "deep.json", "list.json", "odd.json", EVIL)),
    *([STAR, "--tokenizer", value] for value in ("nothing", EVIL, "text.png", LONG)),
    [STAR, "--seed", str(2**63 - 1), "--count", "2"],
    *([STAR, "--controlnet", value, "--control-image", "there.png"]
      for value in ("x", "a/../b", EVIL, LONG, "x:nan")),
    *([STAR, "--controlnet", "evil.ckpt", "--control-image", value] for value in ("x.png", "text.png", EVIL, LONG)),
    [STAR, "--controlnet", "evil.ckpt", "--control-image", "other.png"], [STAR, "--controlnet", "evil.ckpt"],
    [STAR, "--control-image", "other.png"], [STAR, "--canny"], [STAR, "--guess-mode"], [STAR, "--control-end", "x"],
    [STAR, "--controlnet", "evil.ckpt", "--control-image", "other.png", "--control-start", "nan"],
    [STAR, "--exact", "--variant", "lean"], [STAR, "--plan"], [STAR, "--memory", "1GB"], [STAR, "--stepz", "3"],
    [STAR, f"--{EVIL}"], [STAR, f"--{LONG}"], ["a", "red", "star"], [EVIL, LONG], ["list"], ["models"], ["inof"],
    ["version"], ["help", "x"], ["help", EVIL], ["study"], ["convert"], ["convert", "a.ckpt"], ["info"],
    ["info", "nothing"], ["info", EVIL], ["info", LONG], ["info", "text.png"], ["info", "."], ["info", "/dev/zero"],
    ["convert", "shapes", "x.bin"],
    ["convert", "shapes", "there.png"], ["convert", "evil.ckpt", "x.safetensors"], ["info", "evil.ckpt"],
    ["describe", "evil.ckpt"], ["describe", "shapes", "--height", "7"], ["describe", "--depth", "2"],
    ["compare", "nothing.ckpt"], ["compare", "shapes", "--only", "x"], ["compare", "--bound", "-1"],
    ["compare", "shapes", "shapes", "--only", "unet"], ["study", STAR, "-o", "no/folder/x.html"],
    ["study", STAR, "--trace", "report.html"],
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    Path("text.png").write_text("no picture")
    Path("there.png").write_bytes(b"somebody's")
    Path("deep.json").write_text("[" * 5000 + "]" * 5000)
    Path("list.json").write_text("[1]")
    Path("odd.json").write_text(json.dumps({"unet": {EVIL: LONG}}))
    info = PngInfo()
    info.add_itxt("sd", json.dumps({"prompt": ["x"], "scheduler": EVIL, "model": "../" + LONG}))
    Image.new("RGB", (8, 8)).save("other.png", pnginfo=info)
    write_ckpt(Path("evil.ckpt"), compvis_tensors(tiny) | {EVIL + LONG: torch.zeros(1)})
    return tmp_path


def said(arguments, capsys):
    try:
        code = main([str(word) for word in arguments])
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.mark.parametrize("k", range(4))
def test_what_is_wrong_is_one_plain_sentence(k, folder, capsys):
    before = sorted(folder.iterdir())
    wrong = []
    for arguments in WRONG[k::4]:
        code, out, error = said(arguments, capsys)
        lines = [line for line in error.splitlines() if line]
        message = lines[-1].removeprefix("artist: error: ") if lines else ""
        allowed = len(lines) == 1 and lines[0].startswith("artist: error: ") and not out
        shown = arguments[0] == "info" and code == 0  # what `load` would refuse is only described
        if shown:
            allowed = all(line.isprintable() and len(line) < 2000 for line in out.splitlines())
        elif code != 2 or not message.endswith(".") or not 20 < len(message) < 1020 or not message.isprintable():
            allowed = False
        if not shown and PYTHON.search(message.replace("image=2,guidance=2,rows=1", "")):
            allowed = False
        if not allowed:
            wrong.append(f"{[word[:40] for word in arguments]}: {code} {out[:200]!r} {error[:900]!r}")
    assert not wrong, "\n".join(wrong)
    assert sorted(folder.iterdir()) == before


def artist(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "sd", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        check=False,
        timeout=100,
    )


def test_a_terminal_that_knows_ascii_only(tmp_path):
    done = artist("ä star", "--steps", "1", "-o", "ü.png", cwd=tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ü.png").exists()
    assert done.stdout.isascii()
    assert artist("info", "shapes", cwd=tmp_path, PYTHONIOENCODING="ascii").returncode == 0


def test_a_closed_pipe_is_quiet(tmp_path):
    code = f"{sys.executable} -m sd describe | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode in (0, 141)
    assert done.stderr == b""


def test_help_fits_a_terminal_of_one_column(tmp_path):
    done = artist("--help", cwd=tmp_path, COLUMNS="1")
    assert done.returncode == 0
    assert b"--seed" in done.stdout


def test_variables_of_ranks_that_make_no_sense(tmp_path):
    for environment in ({"RANK": "-1", "WORLD_SIZE": "x"}, {"RANK": "5", "WORLD_SIZE": "2"}):
        done = artist(STAR, "--variant", "parallel", "--steps", "1", cwd=tmp_path, MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="1", **environment)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith(b"artist: error: ")
        assert done.stderr.count(b"\n") == 1


def test_what_newcomers_type_is_understood(folder, capsys):
    seeds = set()
    for more in (["--seed", "-1"], ["--seed", "random"], ["--scheduler", "PLMS"], ["--scheduler", "Ddim"],
                 ["--scheduler", "DDIMScheduler"], ["--variant", "lean", "--memory", "600"],
                 ["--variant", "lean", "--memory", "600 MB"], ["--variant", "lean", "--memory", "0.6g"]):  # fmt: skip
        code, out, error = said([STAR, "--steps", "2", "--quiet", *more], capsys)
        assert code == 0, error
        seeds.add(re.search(r"seed (\d+)", out)[1])
    assert len(seeds) == 3
    code, out, error = said([STAR, "--steps", "1", "--quiet", "-o", "new/folder/", "--count", "2"], capsys)
    assert code == 0, error
    assert sorted(p.name for p in Path("new/folder").iterdir()) == ["artist-001.png", "artist-002.png"]


def test_a_picture_downloads_nothing(folder, capsys):
    info = PngInfo()
    info.add_itxt("sd", json.dumps({"prompt": STAR, "model": "someone/model", "revision": "../../../../x"}))
    Image.new("RGB", (8, 8)).save("theirs.png", pnginfo=info)
    code, _, error = said(["--again", "theirs.png"], capsys)
    assert code == 2
    assert "someone/model" in error
    assert "--model" in error
    assert "--revision" not in error or ".." not in error.split("--revision")[0]


def test_no_memory_is_one_sentence(folder, capsys, monkeypatch):
    import sd.sampler

    def fails(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to"
        )

    monkeypatch.setattr(sd.sampler.SimpleSampler, "run", fails)
    code, _, error = said([STAR, "--quiet"], capsys)
    assert code == 2
    assert error.startswith("artist: error: There is not enough memory")
    assert "--variant lean" in error


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on Windows")
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGHUP", 0)])
def test_signals_end_the_command_as_ctrl_c_does(number, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "sd", STAR, "--steps", "900", "--count", "50", "-o", "out/"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stderr is not None
    seen = b""
    while b"step" not in seen:  # it draws
        seen += process.stderr.read1(1000)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.endswith(b"artist: stopped.\n")
    assert list(tmp_path.iterdir()) == []  # nor the folder that was made for nothing


@pytest.mark.slow
def test_two_runs_in_one_folder_keep_both_pictures(tmp_path):
    command = [sys.executable, "-m", "sd", STAR, "--steps", "1", "--quiet"]
    for _ in range(2):
        runs = [subprocess.Popen([*command, "--seed", str(k)], cwd=tmp_path) for k in range(2)]
        assert [run.wait(100) for run in runs] == [0, 0]
        time.sleep(0.1)
    assert len(list(tmp_path.glob("artist-*.png"))) == 4


def test_a_picture_whose_place_fails_in_the_end_is_saved_elsewhere(folder, capsys, monkeypatch):
    import sd.image

    real = sd.image.writing

    def fails(path, **options):
        if Path(path).name == "star.png" and Path(path).parent.name == "sub":
            raise OSError(f"{path} cannot be written: No space left on device; make room, or choose another place.")
        return real(path, **options)

    Path("sub").mkdir()
    monkeypatch.setattr(sd.image, "writing", fails)
    code, _, error = said([STAR, "--steps", "1", "--quiet", "-o", "sub/star.png"], capsys)
    assert code == 2
    where = re.search(r"is in (\S+\.png) instead\.", error)
    assert where, error
    assert Image.open(where[1]).size == (128, 128)


def test_absolute_paths_stay_out_of_pictures(folder, capsys):
    import sd

    sd.save(sd.load("shapes"), folder / "own.safetensors")
    code, _, error = said(
        [STAR, "--model", folder / "own.safetensors", "--steps", "1", "--quiet", "-o", "a.png"], capsys
    )
    assert code == 0, error
    with Image.open("a.png") as image:
        assert str(folder) not in json.dumps(image.text)
        assert "own" in image.text["parameters"]
    code, _, error = said(["--again", "a.png", "--quiet", "-o", "b.png"], capsys)
    assert code == 0, error
    assert list(Image.open("a.png").getdata()) == list(Image.open("b.png").getdata())

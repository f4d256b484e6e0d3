"""How many threads the command computes with: what other programs and a container's quota leave."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from sd.cli import main, threads
from sd.cli.threads import Moment, Neighbours, choose_threads, free_threads
from sd.image import read_settings


@pytest.fixture(autouse=True)
def _as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("usual", "busy", "limit", "expected"),
    [
        (8, 0.0, None, 8),
        (8, 0.4, None, 8),
        (8, 1.1, None, 7),
        (8, 7.9, None, 1),
        (8, 12.0, None, 1),  # never none
        (8, 0.0, 2.5, 2),
        (8, 0.0, 0.5, 1),
        (4, 1.0, None, 4),  # of hyperthreads torch uses half
        (8, 6.0, 4.0, 2),
    ],
)
def test_what_is_free(usual, busy, limit, expected, monkeypatch):
    monkeypatch.setattr(threads.launch, "cores", lambda: 8)
    assert free_threads(usual, busy, limit) == expected


def test_others_work_is_what_is_not_our_own(monkeypatch):
    moments = [Moment(0.0, 100.0, 5.0), Moment(2.0, 104.0, 8.0), Moment(2.1, 104.0, 8.0)]
    monkeypatch.setattr(threads, "moment", lambda: moments.pop(0))
    assert Neighbours().busy() == 0.5
    monkeypatch.setattr(threads, "moment", lambda: None)  # not Linux
    assert Neighbours().busy() == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_busy_program_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            time.sleep(0.3)
            neighbours = Neighbours()
            time.sleep(0.6)
            assert neighbours.busy() > 0.2  # a whole core, but for what else runs here
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000", None), ("150000 100000", 1.5), ("nonsense", None), ("1 0", None)]
)
def test_quota_of_a_container(text, expected, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(threads, "QUOTAS", (str(tmp_path / "cpu.max"), str(tmp_path / "no"), str(tmp_path / "no")))
    assert threads.quota() == expected


def test_quota_of_an_older_container(tmp_path, monkeypatch):
    (tmp_path / "quota").write_text("250000\n")
    (tmp_path / "period").write_text("100000\n")
    monkeypatch.setattr(threads, "QUOTAS", tuple(str(tmp_path / n) for n in ("no", "quota", "period")))
    assert threads.quota() == 2.5
    (tmp_path / "quota").write_text("-1\n")
    assert threads.quota() is None


def test_what_the_user_says_counts(monkeypatch):
    monkeypatch.setattr(threads.launch, "cores", lambda: 8)
    monkeypatch.setattr(Neighbours, "busy", lambda self: 6.0)
    monkeypatch.setattr(threads, "quota", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    number, why = choose_threads(None, Neighbours())
    assert (number, torch.get_num_threads()) == (2, 2)
    assert why == "other programs keep 6.0 of 8 cores busy, so 2 of 4 threads compute; --threads chooses."
    assert choose_threads(3, Neighbours()) == (3, None)
    assert choose_threads(99, Neighbours()) == (8, None)  # no more than there are cores
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose_threads(None, Neighbours()) == (4, None)


def test_the_picture_says_it_and_again_follows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--steps", "1", "--quiet", "--device", "cpu"]
    assert main(["a red star", "--threads", "1", "-o", "a.png", *quick]) == 0
    assert read_settings("a.png")["threads"] == 1
    torch.set_num_threads(2)
    assert main(["--again", "a.png", "-o", "b.png", *quick]) == 0
    assert torch.get_num_threads() == 1
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    assert main(["a red star", "--threads", "0", *quick]) == 2
    assert main(["a red star", "--threads", "2", "--variant", "parallel", *quick]) == 2
    assert "--threads only works with --variant simple or lean" in capsys.readouterr().err

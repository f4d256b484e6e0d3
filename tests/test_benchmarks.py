"""The benchmarks' scaffolding, on the small model: order of runs, failures, figures, plot. Nothing is timed here."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from benchmarks import controlnet, harness, peers, speed
from sd import cli
from tests.layouts import make_model, write_hub


@pytest.fixture(scope="module")
def how(tmp_path_factory):
    """A small model in both layouts, and how to measure it."""
    folder = tmp_path_factory.mktemp("weights")
    model = make_model()
    sd.save(model, folder / "full.safetensors")
    write_hub(folder / "hub", model)
    settings = {"file": str(folder / "full.safetensors"), "hub": str(folder / "hub"), "threads": 1, "calls": 2}
    return settings | {"steps": 3, "size": 64, "device": "cpu", "dtype": torch.float32, "context_dim": 64}


def test_jobs_are_taken_in_turn_and_kept():
    order, kept = [], []

    def job(name):
        def run():
            order.append(name)
            if name == "bad":
                raise harness.RunError("first line\nlast line")
            return {"times": {"call": [1.0]}}

        return run

    results = harness.in_turn({n: job(n) for n in ("a", "bad", "b")}, 2, lambda r: kept.append(json.dumps(r)))
    assert order == ["a", "bad", "b", "a", "b"]  # what fails is not tried again
    assert results["bad"] == [{"failed": "first line\nlast line"}]
    assert len(results["a"]) == len(results["b"]) == 2
    assert len(kept) == 5


def test_a_fresh_process_that_fails_says_why():
    with pytest.raises(harness.RunError, match="No module named"):
        harness.fresh("benchmarks.nothing")


WAITS = """
import json, subprocess, sys, time
if sys.argv[1] == "long":
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # holds no pipe of its parent
    child = subprocess.Popen(["sleep", "60"], **quiet)
    open(sys.argv[2], "w").write(str(child.pid))
    child.wait()
print(json.dumps({"times": {}}))
"""


@pytest.fixture
def waits(tmp_path, monkeypatch):
    (tmp_path / "waits.py").write_text(WAITS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "waits"


def test_waiting_for_the_lock_is_not_counted(waits, tmp_path):
    """The process, whose start is that of its limit, is started when whoever holds the lock has given it back."""
    fcntl = pytest.importorskip("fcntl")
    lock = open(tmp_path / "lock", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    given_back: list[float] = []
    timer = threading.Timer(0.5, lambda: (given_back.append(time.time()), lock.close()))
    timer.start()
    result = harness.fresh(waits, "short", lock=tmp_path / "lock", limit=60)
    timer.join()
    assert result["times"] == {}
    assert result["start"] >= given_back[0]


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended_with_its_children(waits, tmp_path):
    with pytest.raises(harness.RunError, match="not done within 3 s"):
        harness.fresh(waits, "long", str(tmp_path / "pid"), lock=tmp_path / "lock", limit=3)
    child = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{child}/stat")
    for _ in range(100):  # whoever takes in orphans may need a moment
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError(f"process {child} is left")
    harness.fresh(waits, "short", lock=tmp_path / "lock", limit=60)  # the lock was given back


def test_a_failing_reference_costs_only_the_errors(monkeypatch, tmp_path, capsys):
    def fails(*args, **options):
        raise harness.RunError("Killed")

    monkeypatch.setattr(harness, "fresh", fails)
    entry = {"peers": {"textbook": [{"times": {"call": [1.0]}}]}}
    speed.differences("unet", entry, {}, tmp_path, None)
    assert entry["peers"]["textbook"] == [{"times": {"call": [1.0]}}]
    assert "float64 reference failed: Killed" in capsys.readouterr().out


@pytest.mark.parametrize(("peer", "exact"), [("textbook", True), ("fast", False)])
def test_artist_is_told_the_dtype_and_how(how, peer, exact, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "main", lambda argv: asked.extend(argv) or 0)
    peers.draw(peer, how | {"out": str(tmp_path / "a.png"), "dtype": torch.bfloat16}, [])
    assert asked[asked.index("--dtype") + 1] == "bfloat16"
    assert ("--exact" in asked) == exact


@pytest.mark.parametrize("task", ["unet", "vae"])
def test_peers_compute_the_same(how, task, tmp_path):
    results = {}
    for peer in ("float64", "textbook", *speed.FAST[:2], "diffusers", "diffusers channels-last"):
        if peer.startswith("diffusers"):
            pytest.importorskip("diffusers")
        out = tmp_path / "out.npy"
        times = peers.one_call(task, peer, how | {"out": str(out)})["times"]
        assert len(times["call"]) == 2
        assert len(times["load"]) == len(times["first call"]) == 1
        results[peer] = np.load(out)
    exact = results.pop("float64")
    assert exact.dtype == np.float64
    for got in results.values():
        assert 0 < np.abs(got - exact).max() / np.abs(exact).max() < 1e-5


def test_a_step_with_a_control_net_is_the_same_in_all(tmp_path):
    pytest.importorskip("diffusers")
    controlnet.write_files(tmp_path, small=True)
    how = {"folder": str(tmp_path), "threads": 1, "size": 64, "calls": 2, "context_dim": 64}
    results = {}
    for peer in controlnet.PEERS:
        times = controlnet.one(peer, how | {"out": str(tmp_path / "out.npy")})["times"]
        assert {kind: len(samples) for kind, samples in times.items()} == {"without": 2, "with": 2}
        results[peer] = [{"times": {"without": [1.0], "with": [2.0 if peer == "diffusers" else 1.0]}}]
        results[peer][0]["out"] = np.load(tmp_path / "out.npy")
    expected = results["diffusers"][0]["out"]
    for runs in results.values():
        assert np.abs(runs[0].pop("out") - expected).max() < 1e-5 * np.abs(expected).max()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in controlnet.table(results).splitlines()]
    assert rows[2] == ["textbook", "1.00", "1.00", "1.00 x", "2.00 x", ""]


def test_the_picture_stops_after_the_first_call_if_told(how, tmp_path, monkeypatch):
    out, done, forward = tmp_path / "out.png", [], sd.UNet.forward
    monkeypatch.setattr(sd.UNet, "forward", lambda *args: (forward(*args), done.append(1))[0])
    first = peers.picture("first", "textbook", how | {"out": str(out)})
    assert len(first["marks"]) == 2
    assert done == [1]  # it was not only begun
    assert not out.exists()
    whole = peers.picture("picture", "textbook", how | {"out": str(out)})
    assert len(whole["marks"]) == 4 + 1  # PNDM's calls for 3 steps, and the end
    assert Image.open(out).size == (64, 64)


def test_table_and_plot(tmp_path):
    runs = {
        "textbook": [
            {
                "times": {"call": [2.0, 2.2], "first call": [3.0]},
                "load": 1.0,
                "peak": 5e9,
                "error": 1e-6,
                "norm": 4e-7,
            }
        ],
        "diffusers": [{"times": {"call": [4.4, 4.0], "first call": [5.0]}, "load": 1.0, "peak": 5e9, "error": 2e-6}],
        "diffusers channels-last": [
            {"times": {"call": [4.0], "first call": [5.0]}, "load": 1.0, "peak": 5e9, "error": 2e-6}
        ],
        "OpenVINO": [{"failed": "a\nbecause"}],
    }
    lines = speed.table("unet", {"peers": runs}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == [
        "textbook",
        "2.10 (2.00 to 2.20)",
        "1.90 x",
        "",
        "3.0",
        "5000",
        "1.0e-06, 4.0e-07",
    ]  # against the better format
    assert cells[5][:2] == ["OpenVINO", "failed"]
    assert "1.2 x" in cells[5][3]
    assert "because" in cells[5][4]
    panels = {"UNet": {peer: speed.samples("unet", r) for peer, r in runs.items() if "failed" not in r[0]}}
    harness.plot_bars(panels, tmp_path / "plot.png")
    pixels = np.asarray(Image.open(tmp_path / "plot.png"))
    bar = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in harness.COLOURS[:2]]
    widths = [int((pixels == colour).all(-1).sum(1).max()) for colour in bar]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.02)


def test_spread_and_json(tmp_path):
    assert harness.spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert harness.spread([1.0], 1) == "1.0"
    harness.write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert harness.machine(2)["threads"] == 2


def test_results_are_put_into_their_section(tmp_path, capsys):
    file = tmp_path / "RESULTS.md"
    file.write_text("# Results\n\n## Speed on A\n\nwhat was there\n\n## Speed on A, too\n\nstays\n")
    report = harness.Report(file, "Speed on A", {"cpu": "A", "openvino": None})
    report.say("| first |\n")
    report.say("second")
    text = file.read_text()
    assert text.index("cpu A.") < text.index("| first |\n\nsecond\n\n## Speed on A, too\n\nstays\n")
    assert "what was there" not in text
    assert "openvino" not in text
    harness.Report(file, "Speed on B", {}).say("new")
    assert file.read_text().startswith(text + "\n## Speed on B\n")
    harness.Report(None, "Speed on B", {}).say("said")
    assert capsys.readouterr().out.endswith("said\n")

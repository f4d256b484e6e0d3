"""`artist --variant parallel`: ranks that are started, and ranks that die, hang, raise, or disagree."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from sd import cli
from sd.parallel import launch
from tests.worlds import free_port

PROMPT = "a red star above a blue ring on a white background"
RANKS = [sys.executable, "-m", "sd", PROMPT, "--variant", "parallel", "--device", "cpu"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def gone(pids):
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def start(*options):
    return subprocess.Popen([*RANKS, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


def wait_for_steps(process):
    """Until the progress bar of rank 0 has moved; returns the ranks' process ids."""
    text = ""
    while not re.search(r" [1-9]\d*/", text):
        piece = process.stderr.read(20)
        assert piece, text
        text += piece
    return children(process.pid)


@pytest.mark.slow
def test_ranks_draw_the_picture(tmp_path):
    """Two pictures on three ranks: of the third it is said, if anything, that it has nothing to do."""
    options = ["--steps", "4", "--count", "2", "--seed", "3"]
    done = subprocess.run([*RANKS, *options, "--ranks", "3", "-o", tmp_path / "p.png"], capture_output=True, env=ENV)
    assert done.returncode == 0, done.stderr.decode()
    assert cli.main([PROMPT, *options, "-o", str(tmp_path / "s.png"), "--quiet", "--device", "cpu"]) == 0
    for k in (1, 2):
        assert abs(pixels(tmp_path / f"p-{k}.png") - pixels(tmp_path / f"s-{k}.png")).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_a_rank_that_dies_or_hangs_ends_the_job(tmp_path, what):
    split = ["--ranks", "2", "--split", "rows=2", "--steps", "1000"]
    process = start(*split, "-o", str(tmp_path / "p.png"))
    ranks = wait_for_steps(process)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 1
    last = error.splitlines()[-1]
    wanted = "Rank 1 failed.*SIGKILL" if what == "kill" else "Rank 1 has not answered"
    assert re.search(wanted, last), last
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert gone(ranks)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ranks_end_with_their_launcher():
    process = start("--ranks", "2", "--split", "rows=2", "--steps", "1000", "-o", os.devnull + ".png", "--plan")
    process.communicate(timeout=60)  # a plan starts no ranks
    process = start("--ranks", "2", "--split", "rows=2", "--steps", "1000", "--force", "-o", "/tmp")
    ranks = wait_for_steps(process)
    process.kill()
    process.wait()
    for _ in range(100):
        if gone(ranks):
            return
        time.sleep(0.1)
    raise AssertionError("ranks outlive their launcher")


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tmp_path):
    process = start("--ranks", "2", "--split", "rows=2", "--steps", "2000", "-o", str(tmp_path / "p.png"))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.count("error:") == 1
    assert "1 to 1000" in error


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two agents, each with one rank and its own loopback address."""
    options = ["--steps", "4", "--split", "rows=2", "-o", str(tmp_path / "p.png")]
    agent = "--nnodes 2 --nproc-per-node 1 --max-restarts 0 --rdzv-backend c10d --rdzv-id two --node-rank {} "
    agent += f"--local-addr 127.0.0.{{}} --rdzv-endpoint 127.0.0.1:{free_port()}"
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *agent.format(k, k + 1).split(), *RANKS[1:], *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENV,
        )
        for k in (0, 1)
    ]
    for agent in agents:
        output, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, output.decode()
    assert cli.main([PROMPT, "--steps", "4", "-o", str(tmp_path / "s.png"), "--quiet", "--device", "cpu"]) == 0
    assert abs(pixels(tmp_path / "p.png") - pixels(tmp_path / "s.png")).max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ranks", "2"], "--ranks only works with --variant parallel"),
        (["--variant", "parallel", "--ranks", "0"], "from 1 to 1024"),
        (["--variant", "parallel", "--split", "columns=2"], "like image=2"),
        (["--variant", "parallel", "--split", "rows=two"], "like image=2"),
        (["--variant", "parallel", "--split", "rows=2,rows=3"], "like image=2"),
        (["--variant", "parallel", "--split", "rows=2", "-o", "x.png"], "for 2 ranks, but there are 1: start 2"),
        (["--variant", "parallel", "--split", "image=2", "-o", "x.png"], "image 2, but here are 1"),
    ],
)
def test_options_that_do_not_fit(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([PROMPT, *options]) == 2
    assert words in capsys.readouterr().err


def test_the_cause_is_found_among_what_failed(tmp_path):
    class Failed:
        def __init__(self, exitcode, message, timestamp):
            self.exitcode, self.message, self.timestamp = exitcode, message, timestamp

    echo = Failed(1, {"message": "Another rank is gone, so this one stops (reset)."}, 1)
    killed = Failed(-9, "Signal 9 (SIGKILL) received by PID 1", 2)
    error = launch.failure({0: echo, 2: killed})
    assert "Rank 2" in str(error)
    assert "SIGKILL" in str(error)
    assert error.code == 1
    wrong = Failed(2, {"message": "steps must be from 1 to 1000."}, 3)
    assert str(launch.failure({0: echo, 1: wrong})) == "steps must be from 1 to 1000."
    assert launch.failure({1: wrong}).code == 2
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "error.json").write_text('{"message": {"message": "Rank 2 has not answered for 20 s."}}')
    assert str(launch.failure({2: killed}, tmp_path)) == "Rank 2 has not answered for 20 s."

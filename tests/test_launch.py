"""`artist --variant parallel`: ranks that are started, and ranks that die, hang, raise, or disagree."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
def test_ranks_end_with_their_launcher(tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "TMPDIR", str(tmp_path))  # a launcher that is killed cannot tidy up
    process = start("--ranks", "2", "--split", "rows=2", "--steps", "1000", "-o", os.devnull + ".png", "--plan")
    process.communicate(timeout=60)  # a plan starts no ranks
    process = start("--ranks", "2", "--split", "rows=2", "--steps", "1000", "-o", str(tmp_path / "p.png"))
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


def test_the_cause_is_found_among_what_failed():
    echo = launch.Ended(0, 1, "Another rank is gone, so this one stops (reset).")
    killed, wrong = launch.Ended(2, -9), launch.Ended(1, 2, "steps must be from 1 to 1000.")
    error = launch.failure([echo, killed])
    assert str(error) == "Rank 2 failed, so all were ended: it was killed by signal 9 (SIGKILL)."
    assert error.code == 1
    assert str(launch.failure([echo, wrong])) == "steps must be from 1 to 1000."
    assert launch.failure([wrong]).code == 2
    watched = launch.Ended(0, 1, "Rank 2 has not answered for 20 s, so all were ended.")
    assert str(launch.failure([killed, watched])) == watched.message
    assert str(launch.failure([launch.Ended(3, 7)])) == "Rank 3 failed, so all were ended: exit code 7"
    assert "signal 35" in str(launch.failure([launch.Ended(3, -35)]))  # a signal without a name


def sleeper(seconds, code):
    script = f"import time; time.sleep({seconds}); raise SystemExit({code})"
    return subprocess.Popen([sys.executable, "-S", "-c", script])


def test_a_cause_that_comes_after_its_echo_is_waited_for(tmp_path):
    """Rank 0 hears that rank 1 is gone, and ends before it."""
    children = [sleeper(0, 1), sleeper(0.5, 2)]
    launch.note_of(tmp_path, 0).write_text("Another rank is gone, so this one stops (reset).")
    assert launch.wait(children, tmp_path) == {0: 1, 1: 2}
    assert [child.poll() for child in children] == [1, 2]


def test_a_child_that_takes_no_notice_is_ended_by_force():
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
    child.stdout.readline()
    launch.end_all([child], seconds=0.1)
    assert child.returncode == -signal.SIGKILL
    child.stdout.close()


# ---- ranks are closed to others


FOREIGN = ["tqdm", "numpy", "sitecustomize", "usercustomize", "PIL", "gettext", "torch"]


def tree(pid):
    return [pid, *(p for child in children(pid) for p in tree(child))]


def listening(pids):
    """The (address, port) at which any of these processes accepts connections."""
    links = [f"/proc/{pid}/fd/{fd}" for pid in pids for fd in os.listdir(f"/proc/{pid}/fd")]
    sockets = {os.readlink(link) for link in links if os.path.islink(link)}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            (
                _,
                local,
                _,
                state,
                *_,
            ) = fields = line.split()
            if state == "0A" and f"socket:[{fields[9]}]" in sockets:
                address, port = local.split(":")
                raw = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
                found.add((socket.inet_ntop(family, raw), int(port, 16)))
    return found


def accepts(address, port):
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What is seen of two ranks that draw in a folder full of foreign modules, until Ctrl-C."""
    folder, temporary = tmp_path_factory.mktemp("foreign"), tmp_path_factory.mktemp("temporary")
    for name in FOREIGN:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write('{name}\\n')\n")
    env = {k: v for k, v in ENV.items() if k != "PYTHONPATH"} | {"TMPDIR": str(temporary)}
    env |= {"GLOO_SOCKET_IFNAME": "eth0", "MASTER_ADDR": "192.0.2.77", "MASTER_PORT": "1"}  # for work elsewhere
    options = ["--ranks", "2", "--split", "rows=2", "--steps", "1000", "-o", "p.png"]
    process = subprocess.Popen([*RANKS, *options], stderr=subprocess.PIPE, text=True, env=env, cwd=folder)
    result = SimpleNamespace()
    try:
        ranks = wait_for_steps(process)
        result.ports = listening(tree(process.pid))
        own = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
        result.open = [(a, port) for a in own for _, port in result.ports if accepts(a, port)]
        result.local = [port for address, port in result.ports if accepts(address, port)]
        result.private = [path.stat().st_mode & 0o777 for path in temporary.glob("artist-*")]  # beside torch's cache
        process.send_signal(signal.SIGINT)
        _, result.error = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    result.code, result.gone = process.returncode, gone(ranks)
    result.left = [*temporary.glob("artist-*"), *folder.glob("*.png*")]
    result.ran = (folder / "ran").read_text() if (folder / "ran").exists() else ""
    return result


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@LINUX
def test_no_port_is_open_to_others(seen):
    assert seen.local  # ranks do talk through sockets
    assert {address for address, _ in seen.ports} <= {"127.0.0.1", "::1"}
    assert not seen.open
    assert seen.private == [0o700]


@LINUX
def test_modules_in_the_current_folder_are_not_run(seen):
    assert seen.ran == ""


@LINUX
def test_ctrl_c_ends_all_ranks_and_leaves_nothing(seen):
    assert seen.code == 130
    assert seen.error.endswith("\nartist: stopped.\n")
    assert "Traceback" not in seen.error
    assert seen.gone
    assert not seen.left


def test_an_empty_entry_of_pythonpath_is_not_passed_on(monkeypatch, tmp_path):
    """It stands for the current folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/a", "", "/b", ""]))
    assert launch.environment(0, 2, tmp_path)["PYTHONPATH"] == os.pathsep.join(["/a", "/b"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    assert "PYTHONPATH" not in launch.environment(0, 2, tmp_path)


@pytest.mark.parametrize("safe", ["", "1"])
def test_a_rank_begins_with_the_same_sd_and_without_the_current_folder(tmp_path, safe):
    """With PYTHONSAFEPATH, and without, as Python 3.10 does not know it."""
    for name in ("sd", "importlib", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('foreign')")
    home = Path(launch.__file__).parents[1] / "__init__.py"
    done = subprocess.run(
        [sys.executable, "-c", launch.BEGIN, home, "draw", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONSAFEPATH": safe},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("artist ")


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({"RANK": "3"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 0),  # somebody's own variables: nobody says where to meet
        ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, 3),
        ({"RANK": "3", "WORLD_SIZE": "4", "SD_RANK": "/tmp"}, 3),
        ({"RANK": "three", "WORLD_SIZE": "4", "SD_RANK": "/tmp"}, 0),
        ({"RANK": "0", "WORLD_SIZE": "1", "SD_RANK": "/tmp"}, 0),
    ],
)
def test_a_rank_is_one_that_knows_where_to_meet(environment, number, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.rank() == number
    assert launch.is_rank() == (number > 0)

"""What the command says, and where it puts results: sentences without Python, and nothing that is lost."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from itertools import count

import pytest
import torch

from sd.cli import draw, failed, main
from sd.cli.options import CommandError
from sd.cli.output import free_names, picture_paths, save_result
from sd.cli.settings import drawing_of
from sd.cli.words import LINE, any_letters, hush, out_of_memory, say, sentence, unsupported
from sd.parallel import launch

PICTURE = b"picture"


# ---- sentences


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied", "x.png"), "x.png cannot be used: Permission denied."),
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory."),
        (ValueError("it is so ([Errno 13] Permission denied: 'x')."), "it is so (Permission denied: 'x')."),
        (ValueError("try dtype=torch.float32 (--dtype float32)."), "try --dtype float32."),
        (ValueError("give it as tokenizer= (--tokenizer)."), "give it as --tokenizer."),
        (ValueError("guidance_scale must be a number"), "--guidance (guidance_scale) must be a number."),
        (ValueError("height must be 8."), "--height must be 8."),
        (ValueError("two\nlines"), "two lines."),
    ],
)
def test_errors_are_said_in_the_words_of_the_command(error, says):
    assert sentence(error) == says


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_by_whatever_name(error, capsys, monkeypatch):
    monkeypatch.setattr(draw, "settle", lambda _: (_ for _ in ()).throw(error))
    assert main(["a red star"]) == 2
    assert capsys.readouterr().err.startswith("artist: error: There is not enough memory for this: draw a smaller")


def test_torchs_own_out_of_memory():
    """What torch really raises for more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    assert not out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


def test_numbers_that_a_device_has_not(capsys):
    assert failed(RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")) == 2
    assert "choose another --dtype" in capsys.readouterr().err
    assert not unsupported(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="ours"):  # a fault of ours keeps its traceback
        failed(RuntimeError("ours"))


def test_nothing_acts_on_the_terminal(capsys):
    say("artist: a\x1b[2Jb\r\u202e\nsecond\t" + "x" * 100_000)
    first, second, rest = capsys.readouterr().err.split("\n")
    assert first == "artist: a\\x1b[2Jb\\r\\u202e"
    assert len(second) < LINE + 10
    assert rest == ""


# ---- streams


def test_letters_that_a_terminal_has_not_are_escaped(monkeypatch):
    for errors in ("strict", "surrogateescape"):
        data = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, "ascii", errors))
        any_letters()
        print("★\udcff", flush=True)
        assert data.getvalue() == b"\\u2605\\udcff\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    any_letters()
    say("nobody hears")
    assert sys.stdout.getvalue() == ""


def test_a_closed_pipe_ends_quietly(monkeypatch, capsys):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["help", "info"]) == 141
    hush()  # of streams that are no files
    assert capsys.readouterr().err == ""


# ---- where results go


def save_to(path, force):
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists.")
    path.write_bytes(PICTURE)


def test_free_names_pass_over_links_that_lead_nowhere(tmp_path):
    (tmp_path / "artist-001.png").write_bytes(b"")
    (tmp_path / "artist-002.png").symlink_to("nothing")
    assert next(free_names(tmp_path)).name == "artist-003.png"


def test_a_number_that_is_taken_meanwhile_is_the_next(tmp_path):
    (path,), numbered = picture_paths(str(tmp_path), 1, force=False)
    assert numbered
    path.write_bytes(b"theirs")
    for force in (False, True):  # --force is for names that somebody chose
        found = save_result(save_to, path, "picture", force=force, numbered=True)
        assert found.read_bytes() == PICTURE
    assert path.read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_that_is_taken_meanwhile_costs_no_picture(tmp_path):
    (path,), _ = picture_paths(str(tmp_path / "a.png"), 1, force=False)
    path.write_bytes(b"theirs")
    with pytest.raises(CommandError, match=r"a\.png exists\. The picture is in .*artist-001\.png instead\."):
        save_result(save_to, path, "picture")
    assert (tmp_path / "artist-001.png").read_bytes() == PICTURE
    assert path.read_bytes() == b"theirs"


def test_the_current_folder_then_the_home_then_that_of_temporary_files(tmp_path, monkeypatch):
    there, *others = (tmp_path / name for name in ("there", "here", "home", "temporary"))
    for folder in (there, *others):
        folder.mkdir()
    monkeypatch.chdir(others[0])
    monkeypatch.setenv("HOME", str(others[1]))
    monkeypatch.setattr("tempfile.tempdir", str(others[2]))
    for bad in count(1):
        broken = [there, *others][:bad]

        def save(path, force, broken=broken):
            if path.parent in broken:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            save_to(path, force)

        with pytest.raises(CommandError) as caught:
            save_result(save, there / "a.png", "picture")
        if bad > 3:
            assert "The picture is lost" in str(caught.value)
            break
        assert (others[bad - 1] / "a.png").read_bytes() == PICTURE
        assert str(others[bad - 1] / "a.png") in str(caught.value)
        assert "No space left on device" in str(caught.value)


def test_a_folder_is_made_for_a_slash(tmp_path):
    paths, numbered = picture_paths(f"{tmp_path}/new/er/", 2, force=False)
    assert [p.name for p in paths] == ["artist-001.png", "artist-002.png"]
    assert numbered
    assert not list((tmp_path / "new/er").iterdir())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CommandError, match="cannot be made: "):
        picture_paths(f"{tmp_path}/file/", 1, force=False)


# ---- signals and ranks


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on Windows")
def test_the_first_signal_counts_and_handlers_go():
    def twice():
        with launch.ended_by_signals():
            try:
                os.kill(os.getpid(), signal.SIGHUP)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # while it is cleaned up

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(launch.Stopped) as caught:
            twice()
        assert caught.value.code == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with launch.ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_a_rank_writes_its_picture_before_a_signal_ends_it(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("SD_RANK", "/tmp")):
        monkeypatch.setenv(name, value)
    heard, done = [], threading.Event()
    other = threading.Thread(target=done.wait)  # as the watch of a rank, which could be given the signal
    other.start()
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("signal"))
    try:
        with launch.signals_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            heard.append("written")
        assert heard == ["written", "signal"]
    finally:
        signal.signal(signal.SIGTERM, before)
        done.set()
        other.join()


def test_ranks_take_the_seed_that_was_drawn_for_all(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SD_RANK", "MASTER_ADDR", launch.SEED):
        monkeypatch.delenv(name, raising=False)
    alone = {drawing_of({"prompt": "x", "seed": -1}).seed for _ in range(5)}
    assert len(alone) > 1
    assert all(0 <= seed < 2**32 for seed in alone)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("SD_RANK", "/tmp")):
        monkeypatch.setenv(name, value)
    with pytest.raises(CommandError, match="give a number to --seed"):  # of torchrun's ranks, each would have its own
        drawing_of({"prompt": "x", "seed": -1})
    monkeypatch.setenv(launch.SEED, "77")
    assert drawing_of({"prompt": "x", "seed": -1}).seed == 77


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "2"}, "RANK is '99"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "a\x1b"}, r"LOCAL_RANK is 'a"),
    ],
)
def test_ranks_that_cannot_be(environment, says, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    launch.check_environment()  # nobody's
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(launch.LaunchError, match=says) as caught:
        launch.check_environment()
    assert caught.value.code == 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    monkeypatch.delenv("MASTER_ADDR")
    launch.check_environment()  # somebody's own variables


def test_warnings_are_heard_beside_a_number_in_the_environment(monkeypatch, capsys):
    """Only the other ranks of one drawing keep quiet, and not whoever has such variables for something else."""
    import warnings

    def settle(_):
        warnings.warn("heard")
        raise CommandError("enough")

    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(draw, "settle", settle)
    assert main(["a red star"]) == 2
    assert "artist: warning: heard" in capsys.readouterr().err

"""What ranks say to each other, and how they watch one another."""

import os
import pickle
import re
import threading
from pathlib import Path

import pytest

import sd.parallel
from sd.parallel import pulse
from sd.parallel.ranks import RankError, agree, understood
from tests.layouts import make_model
from tests.worlds import in_world


def test_no_source_of_the_room_pickles():
    """Neither by name nor through the functions of torch.distributed that pickle for their callers."""
    sources = [path.read_text() for path in Path(sd.parallel.__file__).parent.glob("*.py")]
    assert len(sources) > 4
    words = r"\bimport pickle|\bpickle\.|_object(_list)?\(|torch\.(load|save)\(|elastic|multiprocessing"
    assert not [found for source in sources for found in re.findall(words, source)]


def without_pickle(rank):
    """Draw, agree and disagree where unpickling fails."""
    import torch.distributed.distributed_c10d as c10d

    def fail(*args, **kwargs):
        raise AssertionError("something was unpickled")

    model = make_model()
    model.encode_prompt("a")  # imports classes that are derived from an unpickler
    sampler = sd.ParallelSampler(model, {"rows": 2})
    pickle.loads = pickle.load = pickle.Unpickler = c10d._unpickler = fail
    sampler("a", num_inference_steps=1, height=64, width=64, output_type="pt")
    agree({"the size": 64, "the seed": 1})
    try:
        agree({"the size": 64, "the seed": f"{rank} ä" + "0" * 100})
    except RankError as error:
        return str(error)


def test_ranks_draw_and_compare_notes_without_unpickling():
    for message in in_world(2, without_pickle):
        assert message.startswith("The ranks disagree on the seed: rank 1 has 1 ä00")
        assert "rank 0 has 0 ä00" in message
        assert len(message) < 250


def late_difference(rank):
    try:
        agree({"the text": "a" * 5000 + str(rank)} | {f"more {k}": "\u20ac" * 100 for k in range(60)})
    except RankError as error:
        return str(error)


@pytest.mark.slow
def test_what_is_long_is_compared_in_full():
    """The first 60 characters are alike, and the whole does not fit into a message."""
    for message in in_world(2, connected, late_difference):
        assert message.startswith("The ranks disagree on")


def connected(rank, function):
    import torch

    from sd.parallel.ranks import connect

    connect(torch.device("cpu"))
    return function(rank)


@pytest.mark.parametrize("message", [b"", b"no", b"[1]", b"[[1, 2]]", b"\xff\x00", b"{}", b"[" * 10_000, b"null"])
def test_a_message_of_another_form_says_nothing(message):
    assert understood(message) == {}


@pytest.mark.parametrize("note", [b"1 2", b"-1 0 0", b"1 2 0 machine/-1", b"\xff\xfe", b"9" * 5000, b"1 2 3"])
def test_a_note_that_no_rank_writes_is_silence(note, tmp_path, monkeypatch):
    """It ends the rank that reads it after a while, and no other process, whatever number it names."""
    killed, said = [], []
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr(pulse.PULSE, "timeout", 0.4)
    notes = pulse.Notes(tmp_path)
    notes.set(1, note)
    pulse.watch_others(notes, 0, 2, threading.Event(), said.append)
    assert said == ["Rank 1 has not answered for 0 s, so all were ended."]
    assert not killed
    assert notes.get(0).endswith(b" 1")  # alive, and not drawing


@pytest.mark.parametrize("note", [b"", pulse.LEFT])
def test_a_rank_that_has_not_begun_or_is_done_is_not_silent(note, tmp_path, monkeypatch):
    said, done = [], threading.Event()
    monkeypatch.setattr(pulse.PULSE, "timeout", 0.2)
    notes = pulse.Notes(tmp_path)
    notes.set(1, note)
    threading.Timer(1.0, done.set).start()
    pulse.watch_others(notes, 0, 2, done, said.append)
    assert not said


def test_a_meeting_point_that_is_gone_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(pulse.PULSE, "on", True)
    pulse.watch_others(pulse.Notes(tmp_path / "gone"), 0, 2, threading.Event(), said.append)
    assert said == ["The ranks' meeting point does not answer: the rank or the launcher that held it is gone."]

"""Files are written whole or not at all, by one module alone; small ones are read within bounds."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

import sd
from sd import files
from sd.files import (
    DEPTH,
    SmallFileError,
    check_output,
    parse_json,
    printable,
    read_json,
    read_small,
    read_utf8,
    write_text,
    writing,
)

ROOM = Path(sd.__file__).parent

# Not for users, and gone at once: the folder that transformers reads a tokenizer from, what ranks say to each other
OWN_BUSINESS = {"compare/reference.py", "cli/words.py", "parallel/launch.py", "parallel/pulse.py"}
WRITERS = {"write_bytes", "mkstemp", "NamedTemporaryFile", "symlink", "link"}


def writers(path):
    """The calls in a file of source code that open a file for writing, or put one in place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if method else ""
        first = 0 if method and owner not in ("os", "io", "Image") else 1  # path.open(mode), open(path, mode)
        modes = [*node.args[first : first + 1], *(k.value for k in node.keywords if k.arg == "mode")]
        writes = any(set(str(getattr(mode, "value", "w"))) & set("wxa+") for mode in modes)
        if (
            (name in ("open", "fdopen") and writes)
            or name in WRITERS
            or (name == "write_text" and method)  # a path's; the function is ours, of sd.files
            or (name in ("replace", "rename") and owner == "os")
        ):
            yield f"{name}, line {node.lineno}"


def test_one_module_alone_writes_files():
    found = {p.relative_to(ROOM).as_posix(): list(writers(p)) for p in ROOM.rglob("*.py")}
    assert found.pop("files.py")  # and so they are seen
    assert {path: calls for path, calls in found.items() if calls and path not in OWN_BUSINESS} == {}


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.bin"
    with writing(path) as file:
        file.write(b"half")
        (part,) = tmp_path.iterdir()
        assert part.name.startswith(".sd-")
        assert len(part.name) == 17
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    write_text(tmp_path / "b", "x")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in "ab"]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("force", [False, True])
def test_after_a_failure_nothing_is_left(tmp_path, error, force):
    path = tmp_path / "a.bin"
    if force:
        path.write_bytes(b"before")

    def fail():
        with writing(path, force=force) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"] * force


def test_what_is_there_is_replaced_only_with_force(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(FileExistsError, match=r"a\.txt exists: choose another name"):
        write_text(path, "two")
    assert path.read_text() == "one"
    write_text(path, "two", force=True)
    assert path.read_text() == "two"


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_meanwhile_stays_the_others(tmp_path, monkeypatch, links):
    """On file systems without hard links too."""
    if not links:

        def link(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    path = tmp_path / "a.txt"
    write_text(tmp_path / "b.txt", "b")

    def write():
        with writing(path) as file:
            file.write(b"ours")
            path.write_text("theirs")

    with pytest.raises(FileExistsError, match="exists"):
        write()
    assert path.read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_without_hard_links_a_failure_leaves_no_empty_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"cannot be written: Input/output error"):
        write_text(tmp_path / "a.txt", "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["n" * 250 + ".png", "n" * 300])
def test_the_length_of_a_name_is_the_systems_business(tmp_path, name):
    if len(name) < 256:
        write_text(tmp_path / name, "x")
        assert [p.name for p in tmp_path.iterdir()] == [name]
    else:
        with pytest.raises(OSError, match="cannot be written"):
            write_text(tmp_path / name, "x")
        assert not list(tmp_path.iterdir())


def test_what_is_no_regular_file_is_not_written_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    for name, word in (("pipe", "not a regular file"), ("folder", "a folder"), ("null", "not a regular file")):
        with pytest.raises(OSError, match=f"cannot be written: it is {word}"):
            write_text(tmp_path / name, "x", force=True)
    with pytest.raises(OSError, match="cannot be written"):
        write_text(tmp_path / "no/such/folder", "x")
    with pytest.raises(OSError, match="cannot be written"):
        write_text("a\0b", "x")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_link_is_replaced_and_not_what_it_names(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "link", "ours")
    write_text(tmp_path / "link", "ours", force=True)
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "open", lambda *_: Path("/dev/full").open("wb"), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match=r"a\.txt cannot be written: No space left on device; make room"):
        write_text(tmp_path / "a.txt", "x" * 100_000)
    assert not list(tmp_path.iterdir())


def test_a_link_that_leads_nowhere_is_a_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "link", "x")
    with pytest.raises(ValueError, match="exists"):
        check_output(tmp_path / "link")
    check_output(tmp_path / "link", force=True)
    write_text(tmp_path / "link", "x", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["link"]
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_wait_for_the_disk(tmp_path, monkeypatch, code):
    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    if code == errno.EIO:  # a disk that fails
        with pytest.raises(OSError, match="Input/output error"):
            write_text(tmp_path / "a", "x")
        assert not list(tmp_path.iterdir())
    else:
        write_text(tmp_path / "a", "x")
        assert (tmp_path / "a").read_text() == "x"


# ---- what can be known before the work


def test_a_place_that_takes_a_file_is_left_as_it_was(tmp_path):
    (tmp_path / "there").write_text("x")
    for name in ("new", "n" * 255, "there"):
        check_output(tmp_path / name, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_what_cannot_be_written_is_known_before(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "there").write_text("x")
    for name, force, reason in (
        ("no/file", True, "there is no folder"),
        ("there/file", True, "there is no folder"),
        (".", True, "it is a folder"),
        ("pipe", True, "not a regular file"),
        ("null", True, "not a regular file"),
        ("there", False, "exists: choose another name"),
        ("n" * 256, False, "File name too long"),
        ("a\0b", False, "null"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            check_output(tmp_path / name, force=force)
        assert "[Errno" not in str(caught.value)


def test_a_folder_is_tried_and_not_believed(tmp_path, monkeypatch):
    """Some network drives, and whoever is root, hear of a read-only place only when they write."""

    def fail(path, *_):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", fail)
    assert os.access(tmp_path, os.W_OK)
    with pytest.raises(ValueError, match=r"takes no new file \(Read-only file system\)"):
        check_output(tmp_path / "a")


# ---- for people


def test_printable_shows_what_else_would_act():
    assert printable("ein großer ★ 日本 'x'") == "ein großer ★ 日本 'x'"
    foreign = "a\x1b[31m\r\n\t\x00\x7f\x9b\u202e\u2066\u200b\u200d\ufeff\u2028\u3164\ud800\U000e0041"
    for c in foreign[1:]:
        if not c.isascii() or not c.isprintable():
            assert c not in printable(foreign)
    assert printable(foreign).isprintable()
    assert printable("\x1b\u202e") == "\\x1b\\u202e"
    assert printable(7) == "7"
    assert printable("x" * 200) == "x" * 200


@pytest.mark.parametrize("letter", ["x", "\x1b", "\U000e0041"])
def test_printable_keeps_both_ends_of_what_is_long(letter):
    short = printable("begin" + letter * 1_000_000 + "end", 60)
    assert len(short) <= 65
    assert short.startswith("begin")
    assert short.endswith("end")
    assert " ... " in short


# ---- reading


def test_small_files_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, {"b": "ß"}]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": "ß"}]}
    assert json.loads(read_utf8(tmp_path / "a.json")) == json.loads(read_small(tmp_path / "a.json"))


def test_what_is_no_small_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # a socket's path must be short
    try:
        server.bind("socket")
    finally:
        os.chdir(here)
        server.close()
    (tmp_path / "large").write_bytes(b"x" * 101)
    for name, reason in (
        ("pipe", "it is not a regular file"),
        ("socket", "it is not a regular file"),
        (".", "it is not a regular file"),
        ("nothing", "it does not exist"),
        ("large", "it has more than 100 bytes"),
    ):
        with pytest.raises(SmallFileError, match=f"^The config .* cannot be read: {reason}.$") as caught:
            read_small(tmp_path / name, "The config", limit=100)
        assert caught.value.reason == reason
    with pytest.raises(SmallFileError, match="not a regular file"):
        read_small("/dev/zero")
    with pytest.raises(SmallFileError, match="cannot be read"):
        read_small("a\0b")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'"\xff"', "not text in UTF-8"),
        (b"[" * 100_000, "brackets"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "brackets"),
        (b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), "brackets"),
        (b"9" * 5000, "number"),
    ],
)
def test_json_that_is_none_or_too_deep(tmp_path, content, word):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SmallFileError, match=f"cannot be read: it .*{word}") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_brackets_up_to_the_limit_are_read():
    assert parse_json("[" * DEPTH + "]" * DEPTH) is not None
    with pytest.raises(ValueError, match="more than 3 brackets"):
        parse_json("[[[[]]]]", depth=3)


def test_a_few_damaged_files_of_every_kind():
    """A sample of `python -m tests.mutations`, which tries tens of thousands."""
    from tests.mutations import run

    assert run(160, seed=1_000_000) == []


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file, made = tmp_path / "a.bin", []
    file.write_bytes(b"one")
    monkeypatch.setattr(hashlib, "sha256", lambda *given, real=hashlib.sha256: made.append(1) or real(*given))
    first = [files.sha256_of(file) for _ in range(2)]
    assert len(made) == 1
    assert first == [hashlib.sha256(b"one").hexdigest()] * 2
    file.write_bytes(b"three")
    assert files.sha256_of(file) == hashlib.sha256(b"three").hexdigest()
    with pytest.raises(FileNotFoundError):
        files.sha256_of(tmp_path / "b.bin")


AHEAD = [({}, True), ({"variant": "lean"}, False), ({"model": "shapes"}, False)]


@pytest.mark.parametrize(("options", "ahead"), AHEAD)
def test_a_model_is_hashed_ahead_where_memory_is_not_counted(options, ahead, tmp_path, monkeypatch):
    from sd.cli import draw
    from sd.cli.settings import Drawing

    (tmp_path / "m.safetensors").write_bytes(b"weights")
    asked = threading.Event()
    monkeypatch.setattr(draw, "sha256_of", lambda path: asked.set())
    draw.hash_ahead(Drawing("a", **{"model": str(tmp_path / "m.safetensors"), **options}))
    assert asked.wait(5 if ahead else 0.1) == ahead

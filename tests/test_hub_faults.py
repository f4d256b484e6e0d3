"""A Hub that stalls, cuts, lies and asks for days of patience: one sentence each time, and soon.

The client is in this process: what it reads from the environment when it is imported is set in its place.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from sd.cli import main
from sd.weights import web
from sd.weights.hub import HubError, Repository, check_names, is_repository
from sd.weights.source import LoadError, find
from tests.hub_server import COMMIT, serve

PATIENCE = 0.4
LONG = b"x" * 300_000
PARTS = dict.fromkeys(["unet", "vae"], "diffusion_pytorch_model.safetensors") | {"text_encoder": "model.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A repository that has the right files; nobody looks into them here."""
    folder = tmp_path_factory.mktemp("served")
    for part, name in PARTS.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
        (folder / part / name).write_bytes(LONG + part.encode())
    return folder


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The server's class, whose `faults` a test sets; `cache` is the cache, which is empty at first."""
    from huggingface_hub import constants

    monkeypatch.setenv("SD_HUB_TIMEOUT", str(PATIENCE))
    with serve({"a/b": folder}, revisions=("main", COMMIT, "v1.0", "refs/pr/5", "feature/x")) as (address, served):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "deep/in/a/cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        served.cache = tmp_path / "deep/in/a/cache"
        yield served


def said(*calls, patience=PATIENCE):
    """The one sentence that each of the calls raises, in time."""
    for call in calls:
        start = time.monotonic()
        with pytest.raises(HubError) as caught:
            call()
        took = time.monotonic() - start
        message = str(caught.value)
        assert message.isprintable(), message
        assert message.endswith(".")
        assert len(message) < 600
        assert took < patience + 1.5, message
    return message


def everything(**options):
    return Repository("a/b", **options).all_files(None)


# ---- faults


def start(hub, status=200, **headers):
    hub.send_response(status)
    for name, value in headers.items():
        hub.send_header(name.replace("_", "-"), value)
    hub.end_headers()
    hub.wfile.flush()


def stall(hub):
    time.sleep(5 * PATIENCE)


def stall_inside(hub):
    start(hub, Content_Length=str(len(LONG)))
    hub.wfile.write(b"{" * 10)
    hub.wfile.flush()
    stall(hub)


def cut(hub):
    start(hub, Content_Length=str(len(LONG)))
    hub.wfile.write(b"{" * 1000)
    hub.close_connection = True


def close(hub):
    hub.close_connection = True


def drip(hub):
    start(hub, Content_Length="1000")
    for _ in range(50):
        hub.wfile.write(b" ")
        hub.wfile.flush()
        time.sleep(PATIENCE / 8)


def endless(hub):
    start(hub, Connection="close")
    hub.close_connection = True
    for _ in range(4000):
        hub.wfile.write(b" " * (1 << 20))


def circle(hub):
    hub.reply(302, Location=hub.path)


def nonsense(hub):
    hub.wfile.write(b"NONSENSE\x1b[31m\r\n\r\n")
    hub.close_connection = True


def answers(status, body=b"", **headers):
    return lambda hub: hub.reply(status, body, **headers)


FILES = [{"rfilename": f"{part}/{name}"} for part, stem in PARTS.items() for name in ("config.json", stem)]


def listing(**changes):
    return json.dumps({"id": "a/b", "sha": COMMIT, "siblings": FILES} | changes).encode()


def named(name):
    return listing(siblings=[*FILES, {"rfilename": name}])


LISTINGS = {
    "stalls": stall, "stalls inside": stall_inside, "is cut": cut, "closes": close, "drips": drip,
    "is endless": endless, "goes in a circle": circle, "is nonsense": nonsense, "redirects nowhere": answers(302),
    "redirects to a file": answers(302, Location="file:///etc/passwd"),
    "is busy": answers(429, Retry_After="100000"), "is away": answers(503, Retry_After="100000"),
    "fails": answers(500, b"\x1b[31m" * 1000), "is forbidden": answers(403), "is odd": answers(999),
    "has a long header": answers(200, listing(), X_A="a" * 200_000),
    "is short": answers(200, listing(), Content_Length="20"),
    "is empty": answers(200), "is no JSON": answers(200, b"<html>\x1b[31m"), "is a list": answers(200, b"[]"),
    "is null": answers(200, b"null"), "is a number": answers(200, b"1" * 10_000),
    "is bytes": answers(200, b"\xff\xfe"),
    "is deep": answers(200, b"[" * 200_000), "is huge": answers(200, b" " * (17 << 20)),
    "has no files": answers(200, listing(siblings=None)),
    "has a text for files": answers(200, listing(siblings="abc")),
    "has numbers for files": answers(200, listing(siblings=[1, 2])),
    "has a list for a name": answers(200, named([1])),
    "has too many files": answers(200, listing(siblings=[{"rfilename": "a"}] * 100_001)),
    "leads up": answers(200, named("../../x")), "leads away": answers(200, named("/etc/x")),
    "leads up inside": answers(200, named("unet/../../../x")), "has no commit": answers(200, listing(sha=None)),
    "has a commit that leads up": answers(200, listing(sha="../../../../x")),
    "has a number for a commit": answers(200, listing(sha=1)),
}  # fmt: skip


@pytest.mark.parametrize("fault", LISTINGS)
def test_a_listing_that(hub, fault):
    hub.faults["listing"] = LISTINGS[fault]
    message = said(everything)
    assert "a/b" in message
    words = {"is endless": "has more than 16,777,216 bytes", "is huge": "has more than 16,777,216 bytes"}
    if fault.startswith(("leads", "has", "is endless", "is huge")) and fault != "has a long header":
        assert "the Hub's answer cannot be used (its " in message
        assert words.get(fault, "listing") in message
    assert not hub.cache.exists()


@pytest.mark.parametrize("fault", ["is cut", "is endless", "goes in a circle"])
def test_an_older_client_which_uses_requests(hub, fault, monkeypatch):
    requests = pytest.importorskip("requests")
    monkeypatch.setattr("huggingface_hub.utils.get_session", requests.Session)
    assert len(Repository("a/b").files) == 6
    hub.faults["listing"] = LISTINGS[fault]
    assert "a/b is not in the cache" in said(everything)


def test_a_listing_with_odd_names_of_other_files_is_used(hub):
    names = ["a\x1bb", "a\\..\\b", "x" * 1000, "unet/config.json", "wörld/a b.txt"]
    hub.faults["listing"] = answers(200, listing(siblings=[{"rfilename": name} for name in names]))
    assert Repository("a/b").files == ["unet/config.json", "wörld/a b.txt"]


def about(hub, **changes):
    headers = {"ETag": '"abc"', "X_Repo_Commit": COMMIT} | changes
    hub.reply(200, LONG, **{name: value for name, value in headers.items() if value})


HEADS = {
    "stalls": stall, "closes": close, "goes in a circle": circle, "is nonsense": nonsense,
    "is busy": answers(429, Retry_After="100000"), "is away": answers(503, Retry_After="100000"),
    "is away until a date": answers(503, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"),
    "is missing": answers(404, X_Error_Code="EntryNotFound"), "has no headers": answers(200),
    "has no commit": lambda hub: about(hub, X_Repo_Commit=None),
    "has another commit": lambda hub: about(hub, X_Repo_Commit="../../../../x\x1b"),
    "has no ETag": lambda hub: about(hub, ETag=None),
    "has an ETag that leads up": lambda hub: about(hub, ETag='"../../../../../x"'),
    "has a size of its own": lambda hub: about(hub, Content_Length="-5"),
    "has a size of words": lambda hub: about(hub, Content_Length="many"),
    "is a huge config": lambda hub: about(hub, X_Linked_Size=str(1 << 40)),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADS)
def test_the_head_of_a_file_that(hub, fault, tmp_path):
    hub.faults["HEAD"] = HEADS[fault]
    message = said(everything)
    assert "a/b could not be downloaded" in message
    words = {"has another commit": "of commit '../../../../x\\x1b', not of", "has an ETag that leads up": "an ETag"}
    assert words.get(fault, "") in message
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and hub.cache not in p.parents]
    assert outside == []


GETS = {
    "stalls": stall, "stalls inside": stall_inside, "is cut": cut, "closes": close, "goes in a circle": circle,
    "is nonsense": nonsense, "is busy": answers(429, Retry_After="100000"),
    "is away": answers(503, Retry_After="100000"), "is missing": answers(404),
    "is shorter": answers(200, b"{"), "is longer": answers(200, LONG * 2), "is endless": endless,
}  # fmt: skip


@pytest.mark.parametrize("fault", GETS)
def test_a_file_that(hub, fault):
    hub.faults["GET"] = GETS[fault]
    assert "a/b could not be downloaded" in said(everything)
    assert not [p for p in hub.cache.rglob("*") if p.is_symlink()]  # nothing that looks as if it had come
    assert not (hub.cache / "models--a--b/refs/main").exists()
    if os.path.exists("/proc/self/fd"):
        end = time.monotonic() + 2
        while (partial := list(hub.cache.rglob("*.incomplete"))) and time.monotonic() < end:
            time.sleep(0.02)  # a thread that was just beginning still tidies up
        assert partial == []


@pytest.mark.parametrize("fault", ["is cut", "is endless", "is shorter", "is nonsense", "is deep"])
def test_a_header_that(hub, fault):
    repository = Repository("a/b")
    header = b"[" * 100_000
    length = len(header).to_bytes(8, "little")
    hub.faults["GET"] = (GETS | {"is deep": answers(200, length + header)})[fault]
    assert "could not be looked at" in said(lambda: repository.headers(None))


@pytest.mark.parametrize(
    "header",
    [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a": {"dtype": [], "shape": [1]}}', b'{"a\\u001b": {}}',
     b'{"a": {"dtype": "F32", "shape": [-1]}}', b'{"a": {"dtype": "F32", "shape": [1000000000, 1000000000]}}',
     b'{"a": {"dtype": "F32", "shape": [1.5]}}', b'{"a": {"dtype": "F32", "shape": [1, [1]]}}'],
)  # fmt: skip
def test_an_odd_header(hub, header):
    hub.faults["GET"] = answers(200, len(header).to_bytes(8, "little") + header)
    assert "could not be looked at" in said(lambda: Repository("a/b").headers(None))


@pytest.mark.parametrize("fault", ["stalls", "is forbidden", "has no files"])
def test_what_the_cache_has_is_used(hub, fault):
    path = everything()
    hub.faults["listing"] = LISTINGS[fault]
    assert everything() == path
    assert find_part(path) == LONG + b"unet"


def find_part(path):
    return (path / "unet/diffusion_pytorch_model.safetensors").read_bytes()


def test_after_a_fault_the_rest_is_fetched(hub, monkeypatch):
    hub.faults["GET"] = lambda hub: cut(hub) if "unet/diff" in hub.path else hub.answer()
    said(everything)
    hub.faults.clear()
    hub.fetched.clear()
    monkeypatch.setenv("SD_HUB_TIMEOUT", "10")  # the thread that was given up still has the file's lock for a second
    assert find_part(everything()) == LONG + b"unet"
    assert set(hub.fetched) == {"a/b/unet/diffusion_pytorch_model.safetensors"}  # the first try may still be at it


def test_what_was_deleted_from_the_cache_is_fetched_again(hub):
    link = everything() / "unet/diffusion_pytorch_model.safetensors"
    os.remove(os.path.realpath(link))
    assert not link.exists()
    hub.fetched.clear()
    assert find_part(everything()) == LONG + b"unet"
    assert hub.fetched == ["a/b/unet/diffusion_pytorch_model.safetensors"]


def test_a_file_that_does_not_fit_on_the_disk(hub, monkeypatch):
    monkeypatch.setattr("sd.weights.hub.free_space", lambda: 1000)
    assert re.search(r"safetensors has 300,\d+ bytes, and there is room for 1,000", said(everything))
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


# ---- patience


def test_the_hub_may_be_busy_for_a_moment(hub, monkeypatch):
    monkeypatch.setenv("SD_HUB_TIMEOUT", "10")
    busy = []

    def once(hub):
        hub.faults.clear()
        busy.append(hub.path)
        hub.reply(503)

    hub.faults["HEAD"] = once
    assert everything().name == COMMIT
    assert busy


def test_a_slow_file_is_no_stalled_one(hub, folder, monkeypatch):
    """It takes twice as long as the Hub may be silent."""
    monkeypatch.setenv("SD_HUB_TIMEOUT", "1")
    monkeypatch.setattr(web, "CHUNK", 12_500)

    def slow(hub):
        start(hub, Content_Length=str(len(LONG) + 4))
        data = (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()
        for i in range(0, len(data), 12_500):
            hub.wfile.write(data[i : i + 12_500])
            hub.wfile.flush()
            time.sleep(0.1)

    hub.faults["GET"] = lambda hub: slow(hub) if "unet/diff" in hub.path else hub.answer()
    before = time.monotonic()
    assert find_part(everything()) == LONG + b"unet"
    assert time.monotonic() - before > 2


@pytest.mark.parametrize(
    ("kind", "fault"), [("listing", stall), ("GET", stall), ("GET", answers(429, Retry_After="100000"))]
)
def test_after_a_fault_all_is_as_before(hub, fault, kind, capfd, caplog):
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    before = logger.level, constants.DOWNLOAD_CHUNK_SIZE
    hub.faults[kind] = fault
    said(everything)
    assert (logger.level, constants.DOWNLOAD_CHUNK_SIZE) == before
    assert [record for record in caplog.records if record.name.startswith("huggingface_hub")] == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["listing", "HEAD", "GET"])
def test_ctrl_c_is_heard_at_once(hub, kind, monkeypatch):
    monkeypatch.setenv("SD_HUB_TIMEOUT", "60")
    hub.faults[kind] = stall
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    before = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        everything()
    assert time.monotonic() - before < 1.5


@pytest.mark.parametrize("value", ["0", "-1", "abc", "nan", "inf", "1e9", "1 s", "\x1b"])
def test_a_timeout_that_is_none(hub, monkeypatch, value):
    monkeypatch.setenv("SD_HUB_TIMEOUT", value)
    message = said(everything)
    assert "SD_HUB_TIMEOUT is a number of seconds" in message
    assert hub.asked == []


def test_on_the_command_line(folder):
    """One line, and the process ends, though a thread of it was told to wait for a day."""

    def busy(hub):
        hub.reply(429, Retry_After="100000")

    with serve({"a/b": folder}, faults={"GET": busy}) as (address, _), contextlib.ExitStack() as stack:
        cache = stack.enter_context(pytest.MonkeyPatch.context())
        cache.setenv("HF_ENDPOINT", address)
        cache.setenv("HF_HOME", str(folder / "cache"))
        cache.setenv("SD_HUB_TIMEOUT", "1")
        done = subprocess.run(
            [sys.executable, "-m", "sd", "info", "a/b"], capture_output=True, text=True, timeout=20, check=False
        )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert " within 1 s, which is what SD_HUB_TIMEOUT allows" in done.stderr


# ---- names


BAD_REVISIONS = [
    "", "..", "../../../../x", "a/../b", "a/..", "/main", "main/", "a//b", "-x", ".x", "a/.b", "a/-b", "a\\b", "a\nb",
    "a\0b", "a\x1b[31m", "a b", "a:b", "a~1", "a^", "a?", "a*", "a[", "a..b", "a.lock", "a.", "x" * 300, "main\n",
    "%2e", 5, b"main", ["main"],
]  # fmt: skip


@pytest.mark.parametrize("revision", BAD_REVISIONS)
def test_a_revision_that_is_none(hub, revision, tmp_path):
    for call in (lambda: find("a/b", revision=revision), lambda: everything(revision=revision)):
        assert "revision= (--revision)" in said(call)
    assert hub.asked == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/5", "feature/x", COMMIT, None])
def test_a_revision_that_is_one(hub, revision, monkeypatch):
    from huggingface_hub import constants

    path = everything(revision=revision)
    assert path.is_dir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert everything(revision=revision) == path  # from the cache
    assert hub.asked == []


@pytest.mark.parametrize(
    "variant",
    ["", "..", "../x", "a/b", "/a", "-a", ".a", "a..b", "a\\b", "a\n", "a b", "a\x1b", "x" * 100, 16, b"fp16"],
)
def test_a_variant_that_is_none(hub, variant):
    assert "variant= (--hub-variant)" in said(lambda: find("a/b", variant=variant))
    assert hub.asked == []


@pytest.mark.parametrize("token", ["", "hf_secret\n", "hf_secret key", "hf_sécret", 5])
def test_a_token_that_is_none_is_not_told(hub, token):
    message = said(lambda: find("a/b", token=token))
    assert "token=" in message
    assert "cret" not in message
    assert hub.asked == []


@pytest.mark.parametrize("variant", ["fp16", "non_ema", "ema-only", "fp16.v2", None])
def test_a_variant_that_is_one(variant):
    check_names(None, variant)


@pytest.mark.parametrize(
    "repo",
    ["a/..", "../a", "a/b/c", "/a", "a/", "/a/b", "a//b", "-a/b", "a/-b", ".a/b", "a/.b", "a/b.", "a--b/c", "a/b..c",
     "a\\b/c", "a/b\n", "a\x1b/b", "a/b c", "ä/b", "a/b.git", "a/" + "b" * 200, "a/b?c", "a/%2e%2e", ""],
)  # fmt: skip
def test_a_repository_that_is_none(hub, repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_repository(repo)
    said(lambda: Repository(repo))
    with pytest.raises((LoadError, HubError)) as caught:
        find(repo)
    assert str(caught.value).isprintable()
    assert hub.asked == []


def test_names_on_the_command_line(hub, capsys):
    assert main(["info", "a/b", "--revision", "../../../../x"]) == 2
    assert "--revision" in capsys.readouterr().err
    assert main(["info", "a/b", "--hub-variant", "../x"]) == 2
    assert "--hub-variant" in capsys.readouterr().err
    assert hub.asked == []


def test_repositories_with_usual_names():
    for name in ("CompVis/stable-diffusion-v1-4", "a/b", "sd-legacy/stable-diffusion-v1-5", "o_o/m.1_x"):
        assert is_repository(name)

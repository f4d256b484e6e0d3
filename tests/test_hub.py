"""Repositories: huggingface_hub's real client against a small Hub on loopback, then without it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from tests.layouts import compvis_tensors, write_ckpt, write_hub, write_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIP = "openai/clip-vit-large-patch14"
WEIGHTS = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


class Hub(BaseHTTPRequestHandler):
    """The routes that the client asks. Gated files want the token "hf_right"."""

    protocol_version = "HTTP/1.1"
    folders: dict[str, Path]  # repository -> its files
    fetched: list[str]  # repository/file, for each whole file that was sent

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b'{"error": "no"}', X_Error_Code=code, X_Error_Message=f"test: {code}")

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        api = path[:2] == ["api", "models"]
        repo, rest = "/".join(path[2:4] if api else path[:2]), path[4:] if api else path[2:]
        if repo not in self.folders:
            return self.refuse(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        folder = self.folders[repo]
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if api:
            return self.listing(repo, rest, files)
        if repo == "a/gated" and self.headers.get("Authorization") != "Bearer hf_right":
            return self.refuse(403, "GatedRepo")
        name = "/".join(rest[2:])
        return self.file(f"{repo}/{name}", files[name]) if name in files else self.refuse(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def listing(self, repo: str, rest: list[str], files: dict[str, Path]) -> None:
        if rest[:1] == ["tree"]:
            content: object = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": "0" * 40} for n, p in files.items()
            ]
        else:
            content = {"id": repo, "sha": COMMIT, "tags": [], "siblings": [{"rfilename": n} for n in files]}
        self.reply(200, json.dumps(content).encode(), Content_Type="application/json")

    def file(self, name: str, path: Path) -> None:
        body = path.read_bytes()
        about = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT}
        if self.command == "GET" and "Range" in self.headers:
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            end = min(end, len(body) - 1)
            return self.reply(206, body[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(body)}", **about)
        if self.command == "GET":
            self.fetched.append(name)
        return self.reply(200, body, **about)


DRIVER = """
import hashlib, json, sys, sd
from sd.loader import tokenizer_texts
from sd.weights.source import find
for name, source, options in json.loads(sys.argv[1]):
    try:
        if name == "info":
            found = sd.info(source, **options)
            answer = {"parts": {p: f["tensors"] for p, f in found["parts"].items()}, "kind": found["kind"]}
        else:
            digest = hashlib.sha256()
            if name == "load":
                model = sd.load(source, **options)
                model.text.texts  # looked for now
                unet = model.unet.state_dict()
            else:  # all that concerns the Hub, without the seconds in which transformers is imported
                found = find(source, **options)
                unet = found.parts["unet"]
                tokenizer_texts(found, None, None)
            for key in sorted(unet):
                digest.update(unet[key].contiguous().numpy())
            answer = digest.hexdigest()
    except ValueError as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """Calls in a process of their own, for the client reads its settings when it is imported."""
    folder = tmp_path_factory.mktemp("hub")
    full = write_hub(folder / "tiny", tiny)
    for name in ("unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors", "v1.ckpt", "README.md"):
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(b"not needed")
    other = shutil.copytree(full, folder / "sd2")
    config = json.loads((other / "unet/config.json").read_text())
    config |= {"cross_attention_dim": 1024, "use_linear_projection": True}
    (other / "unet/config.json").write_text(json.dumps(config))
    loose = folder / "loose"
    loose.mkdir()
    (loose / "model.ckpt").write_bytes(b"x")
    checkpoint = write_ckpt(folder / "model.ckpt", compvis_tensors(tiny))
    fetched: list[str] = []
    folders = {"a/tiny": full, "a/gated": full, "a/sd2": other, "a/loose": loose}
    folders[CLIP] = write_tokenizer(folder / "clip")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folders": folders, "fetched": fetched}))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*calls, cache="cache", url=None, **env):
        fetched.clear()
        env |= {"HF_ENDPOINT": url or f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HOME": str(folder / cache), "HF_TOKEN": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(calls)],
            capture_output=True,
            text=True,
            env=os.environ | env,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    ask.fetched, ask.checkpoint, ask.folder = fetched, str(checkpoint), str(full)
    yield ask
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def online(hub):
    """What was answered, what was fetched; the cache is then as these calls left it."""
    calls = [
        ["load", hub.folder, {}],
        ["load", "a/tiny", {}],
        ["load", "a/tiny", {"revision": COMMIT}],
        ["load", hub.checkpoint, {}],
    ]
    return hub(*calls), sorted(hub.fetched)


def test_a_repository_gives_the_same_tensors(online):
    from_folder, from_hub, from_commit, from_checkpoint = online[0]
    assert len(from_folder) == 64, from_folder
    assert from_folder == from_hub == from_commit == from_checkpoint


def test_only_needed_files_are_fetched_and_once(online):
    got = [name.removeprefix("a/tiny/") for name in online[1] if name.startswith("a/tiny/")]
    assert [n for n in got if not n.endswith(("json", "txt"))] == WEIGHTS
    assert len(got) == len(set(got)) == 11


def test_the_tokenizer_of_clip_for_a_file_without(online):
    assert [n for n in online[1] if n.startswith(CLIP)] == [f"{CLIP}/merges.txt", f"{CLIP}/vocab.json"]


@pytest.mark.slow
def test_from_the_cache_alone(online, hub):
    calls = [["find", "a/tiny", {}], ["find", hub.checkpoint, {}], ["find", "a/gated", {}]]
    same, tokenizer_too, other = hub(*calls, HF_HUB_OFFLINE="1")
    assert same == tokenizer_too == online[0][0]
    assert other.startswith("HubError: a/gated is not in the cache and the Hub cannot be reached")
    assert hub.fetched == []


def test_out_of_reach(online, hub):
    calls = [["find", "a/tiny", {}], ["find", "a/none", {}]]
    cached, new = hub(*calls, url="http://127.0.0.1:9")  # where nobody listens
    assert cached == online[0][0]
    assert new.startswith("HubError: a/none is not in the cache and the Hub cannot be reached")


def test_no_tokenizer_to_be_had(hub):
    (answer,) = hub(["find", hub.checkpoint, {}], cache="empty", HF_HUB_OFFLINE="1")
    assert answer.startswith("LoadError: model.ckpt brings no tokenizer")
    for way in ("tokenizer=", CLIP, "converted file"):
        assert way in answer


@pytest.mark.slow
def test_refusals(hub):
    calls = [
        ["load", "a/none", {}],
        ["load", "a/gated", {}],
        ["load", "a/gated", {"token": "hf_wrong"}],
        ["load", "a/tiny", {"revision": "nope"}],
        ["load", "a/tiny", {"variant": "fp16"}],
        ["load", "a/sd2", {}],
        ["load", "a/loose", {}],
        ["info", "a/tiny", {}],
    ]
    *answers, facts = hub(*calls, cache="refusals")
    gated = "a/gated is gated: accept its licence at https://huggingface.co/a/gated, then log in with `hf auth"
    expected = ["There is no repository a/none on the Hub", gated, gated, "a/tiny has no revision 'nope'"]
    expected += ["a/tiny has no weights unet/diffusion_pytorch_model.fp16.safetensors", "it holds SD 2 weights"]
    expected += ["download model.ckpt and give its path"]
    for answer, part in zip(answers, expected, strict=True):
        assert part in answer
        assert "\n" not in answer
    # No weights came: other models are refused by their configs, and info fetches headers only.
    assert not [name for name in hub.fetched if name.endswith((".safetensors", ".bin", ".ckpt"))]
    assert (facts["kind"], set(facts["parts"])) == ("Stable Diffusion v1", {"unet", "vae", "text"})


@pytest.mark.slow
def test_a_token_opens_the_gate(online, hub):
    (answer,) = hub(["find", "a/gated", {"token": "hf_right"}], cache="gated")
    assert answer == online[0][0]

"""A small Hub on loopback, which can also be a bad one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The routes that the client asks. Gated files want the token "hf_right"."""

    protocol_version = "HTTP/1.1"
    folders: dict[str, Path]  # repository -> its files
    fetched: list[str]  # repository/file, for each whole file that was sent
    asked: list[str]  # every path
    revisions = ("main", COMMIT)
    faults: dict[str, Callable[[Hub], None]]  # what to do instead, for a "listing", a "HEAD" or a "GET" of a file

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
        self.asked.append(self.path)
        fault = self.faults.get("listing" if self.path.startswith("/api/") else self.command)
        with contextlib.suppress(ConnectionError):  # the client does not wait for all that a bad Hub sends
            fault(self) if fault else self.answer()

    def answer(self) -> None:
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        api = path[:2] == ["api", "models"]
        repo, rest = "/".join(path[2:4] if api else path[:2]), path[4:] if api else path[2:]
        if repo not in self.folders:
            return self.refuse(404, "RepoNotFound")
        if len(rest) > 1 and rest[1] not in self.revisions:
            return self.refuse(404, "RevisionNotFound")
        folder = self.folders[repo]
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if api:
            return self.listing(repo, files)
        if repo == "a/gated" and self.headers.get("Authorization") != "Bearer hf_right":
            return self.refuse(403, "GatedRepo")
        name = "/".join(rest[2:])
        return self.file(f"{repo}/{name}", files[name]) if name in files else self.refuse(404, "EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def listing(self, repo: str, files: dict[str, Path]) -> None:
        content = {"id": repo, "sha": COMMIT, "tags": [], "siblings": [{"rfilename": n} for n in files]}
        self.reply(200, json.dumps(content).encode(), Content_Type="application/json")

    def file(self, name: str, path: Path, **more: str) -> None:
        body = path.read_bytes()
        about = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT, **more}
        if self.command == "GET" and "Range" in self.headers:
            start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            end = min(end, len(body) - 1)
            return self.reply(206, body[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(body)}", **about)
        if self.command == "GET":
            self.fetched.append(name)
        return self.reply(200, body, **about)


@contextlib.contextmanager
def serve(folders: dict[str, Path], **more: object) -> Iterator[tuple[str, type[Hub]]]:
    """The address of a Hub that has these repositories, and the class with what it does and noted."""
    own = {"folders": folders, "fetched": [], "asked": [], "faults": {}, **more}
    kind = type("Served", (Hub,), own)
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.handle_error = lambda *_: None  # a client that hangs up is none of its business
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", kind
    finally:
        server.shutdown()
        server.server_close()

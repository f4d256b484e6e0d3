"""Calls to the Hub that come to an end, and whose failures are one sentence.

The client (huggingface_hub) waits for days where a server tells it to, and tries again dozens of times. So each of
its calls runs in a thread of its own, and somebody waits for that: as many seconds as the environment variable
SD_HUB_TIMEOUT says (30 if it is not set); for files, as long as more of them arrives within that time. A thread that
is given up ends with the process at the latest. It ends earlier if it receives something.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from ..files import shown
from .layout import HubError

SECONDS, LONGEST = 30.0, 86_400.0
OFFLINE = "HF_HUB_OFFLINE is set"
BUSY = (408, 429, 500, 502, 503, 504)
TOGETHER = 8  # files at a time
CHUNK = 1 << 18  # bytes that the client waits for before it writes them; its own 10 MB take minutes on a slow line
THREAD = "hub"  # the name of all threads that call the client
_lock = threading.Lock()
_calls = 0  # that are being waited for
_before: tuple[int, int | None] = (0, None)  # what the client's log level and chunk were before the first of them


class Stalled(Exception):  # noqa: N818
    """The Hub did not answer, or stopped sending."""


class GivenUp(Exception):  # noqa: N818
    """Ends a thread that nobody waits for any more."""


class Refusal(Exception):  # noqa: N818
    """The Hub answered, and not with what it was asked for: an HTTP status, and the headers of the answer."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(f"it answered {named(status)}")
        self.status, self.headers = status, headers


def seconds() -> float:
    """How long to wait for the Hub, by the environment variable SD_HUB_TIMEOUT. Raises HubError."""
    text = os.environ.get("SD_HUB_TIMEOUT", "").strip()
    try:
        value = float(text) if text else SECONDS
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST:
        raise HubError(
            f"The environment variable SD_HUB_TIMEOUT is a number of seconds, above 0 and at most {LONGEST:,.0f}, "
            f"not {shown(text)}: set it to 30, for example."
        )
    return value


def client_constants() -> Any:
    """The settings of the Hub's client. Raises HubError where an environment variable keeps it from starting."""
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise HubError(
            f"The Hub's client, huggingface_hub, cannot be used ({brief(str(error))}): check the environment "
            "variables whose names begin with HF_."
        ) from error
    return constants


# ---- waiting


class Progress:
    """What has arrived so far: bytes that the client's progress bars were told of, and bytes in its cache."""

    def __init__(self, in_cache: Callable[[], int]) -> None:
        self.told, self.over = 0, False
        self.in_cache = in_cache
        self.most = (0, in_cache())
        self.lock = threading.Lock()

    def tell(self, count: float | None) -> None:
        if self.over:
            raise GivenUp
        with self.lock:
            self.told += int(count or 0)

    def grew(self) -> bool:
        """Whether there is more than ever before; a download that always begins again does not count."""
        now = (self.told, self.in_cache())
        more = any(a > b for a, b in zip(now, self.most, strict=True))
        self.most = (max(now[0], self.most[0]), max(now[1], self.most[1]))
        return more

    def bar(self, most: float) -> type:
        """A progress bar for the client that tells of all that it shows, and refuses more than `most` bytes."""
        from huggingface_hub.utils import tqdm

        progress = self

        class Bar(tqdm):
            arrived = 0.0

            def update(self, n: float | None = 1) -> Any:
                progress.tell(n)
                self.arrived += n or 0
                if self.arrived > most:
                    raise ValueError("a file came with more bytes than the Hub had announced")
                return super().update(n)

        return Bar


def answer(call: Callable[[], Any]) -> Any:
    """What a call to the client returns or raises, or Stalled. It has `seconds` in all."""
    return answers([call])[0]


def answers(calls: Sequence[Callable[[], Any]], progress: Progress | None = None) -> list[Any]:
    """What several calls return, or what the first that fails raises; Stalled where they take too long.

    They have `seconds` in all. With `progress`, these begin anew whenever there is some.
    """
    patience = seconds()
    results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    todo = iter(enumerate(calls))
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            with _lock:
                number, call = next(todo, (-1, None))
            if call is None:
                return
            try:
                results.put((number, call(), None))
            except BaseException as error:  # raised again where somebody waits
                results.put((number, None, error))

    threads = [threading.Thread(target=work, name=THREAD, daemon=True) for _ in range(min(TOGETHER, len(calls)))]
    done: dict[int, Any] = {}
    stalled = False
    with quiet():
        try:
            for thread in threads:
                thread.start()
            end = time.monotonic() + patience
            while len(done) < len(calls):
                try:
                    number, result, error = results.get(timeout=min(0.1, patience / 5))
                except queue.Empty:
                    if progress and progress.grew():
                        end = time.monotonic() + patience
                    if time.monotonic() > end:
                        what = "nothing more arrived" if progress else "there was no answer"
                        stalled = True
                        raise Stalled(f"{what} within {patience:g} s, which is what SD_HUB_TIMEOUT allows") from None
                    continue
                if error is not None:
                    raise error
                done[number] = result
                if progress:
                    end = time.monotonic() + patience
        finally:
            over.set()
            if progress and len(done) < len(calls):
                progress.over = True
                for thread in [] if stalled else threads:  # who still receives something tidies up after itself
                    thread.join(0.3 / len(threads))
    return [done[number] for number in range(len(calls))]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the client's own words about retries, unless somebody asked for its debugging output.

    Also with smaller chunks than its own, so that progress on a slow line is seen. Both are as before afterwards.
    """
    global _calls, _before
    constants = client_constants()
    logger = logging.getLogger("huggingface_hub")
    with _lock:
        if _calls == 0:
            _before = logger.level, getattr(constants, "DOWNLOAD_CHUNK_SIZE", None)
            if logger.getEffectiveLevel() > logging.DEBUG:
                logger.setLevel(logging.CRITICAL + 1)
            if _before[1]:
                constants.DOWNLOAD_CHUNK_SIZE = min(CHUNK, _before[1])
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if _calls == 0:
                silence_threads()
                logger.setLevel(_before[0])
                if _before[1]:
                    constants.DOWNLOAD_CHUNK_SIZE = _before[1]


class Silent(logging.Filter):
    """Keeps back what our threads say, and nobody else."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != THREAD or record.levelno <= logging.DEBUG


def silence_threads() -> None:
    """For threads that were given up: they may still be trying when the client's log is open again."""
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if not isinstance(logger, logging.Logger) or not f"{name}.".startswith("huggingface_hub."):
            continue
        if not any(isinstance(f, Silent) for f in logger.filters):
            logger.addFilter(Silent())


# ---- reading


def read_url(url: str, token: Any, most: int, first: int | None = None) -> bytes:
    """The bytes at an address of the Hub: the `first` so many, or all, which must be at most `most`.

    By the client's session, with its settings, but never more than that is read. Raises Refusal, ValueError (the rest
    of a sentence), and what the client raises. To be called by `answer`.
    """
    from huggingface_hub.utils import build_hf_headers, get_session

    limit = most + 1 if first is None else first
    headers = {**build_hf_headers(token=token), "Accept-Encoding": "identity"}
    if first is not None:
        headers["Range"] = f"bytes=0-{first - 1}"
    session = get_session()
    if callable(getattr(session, "stream", None)):  # httpx
        answered = session.stream("GET", url, headers=headers, timeout=seconds(), follow_redirects=True)
    else:  # requests, before version 1 of the client
        answered = session.get(url, headers=headers, timeout=seconds(), stream=True)
    data = bytearray()
    with answered as response:
        if response.status_code not in (200, 206):
            raise Refusal(response.status_code, response.headers)
        for piece in response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(1 << 16):
            data += piece
            if len(data) >= limit:
                break
    if first is None and len(data) > most:
        raise ValueError(f"its answer has more than {most:,} bytes")
    return bytes(data[:limit])


def patiently(call: Callable[[], Any]) -> Any:
    """A call that is made again while the Hub says that it is busy, if its time allows that. For use in `answers`."""
    end, pause = time.monotonic() + seconds(), 1.0
    while True:
        try:
            return call()
        except Exception as error:
            refusal = refusal_of(error)
            if refusal is None or refusal.status not in BUSY:
                raise
            asked = str(refusal.headers.get("Retry-After", "")).strip()
            wait = max(pause, float(asked)) if asked.isdecimal() and len(asked) < 10 else math.inf if asked else pause
            if time.monotonic() + wait > end:
                raise
        time.sleep(wait)
        pause *= 2


# ---- what went wrong


def refusal_of(error: BaseException) -> Refusal | None:
    """The Hub's refusal in an error of ours or of the client's, or None for errors of other kinds."""
    if isinstance(error, Refusal):
        return error
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return Refusal(status, response.headers) if type(status) is int and status >= 300 else None


def cause_of(error: BaseException) -> str:
    """What went wrong, as a part of a sentence that can be printed."""
    if isinstance(error, HubError):
        return error.reason
    if isinstance(error, Stalled):
        return str(error)
    kind, text = type(error).__name__, str(error)
    if kind == "OfflineModeIsEnabled":
        return OFFLINE
    if kind == "TooManyRedirects":
        return "its redirects lead in a circle"
    if refusal := refusal_of(error):
        return str(refusal)
    if kind == "RemoteProtocolError" and "connect" in text:  # closed or disconnected
        return "it broke the connection off"
    if kind in ("RemoteProtocolError", "LocalProtocolError", "InvalidHeader"):
        return f"it does not keep to HTTP: {brief(text)}"
    if "Timeout" in kind:
        return "it did not answer in time"
    if "Consistency check failed" in text:
        return "a file came with another size than the Hub had announced"
    if kind == "LocalEntryNotFoundError" and error.__cause__ is not None:
        return cause_of(error.__cause__)
    return brief(text) or kind


def named(status: int) -> str:
    try:
        return f"{status} ({HTTPStatus(status).phrase})"
    except ValueError:
        return str(status)


def brief(text: str) -> str:
    """A message of somebody else in one line that can be printed, without an access token."""
    text = re.sub(r"(?i)\b(bearer\s+)[^\s'\"]+|\bhf_\w{8,}", r"\1...", " ".join(text.split()))
    text = "".join(c if c.isprintable() else "?" for c in text).rstrip(" .:;")
    return text if len(text) <= 150 else text[:147] + "..."

"""Repositories of the Hub: what is in them, and how the needed files are had (layout.py says which these are).

Everything that is asked for is checked first, and everything that comes is: names, sizes, types. No call takes longer
than SD_HUB_TIMEOUT allows (see web.py). Whatever goes wrong is a HubError, in one sentence.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from ..files import SmallFileError, parse_json, read_utf8, shown
from . import web
from .hub_cache import (
    COMMIT,
    drop_partial,
    files_size,
    folder_of,
    free_space,
    remember,
    snapshot,
    snapshot_in,
    snapshots_of,
)
from .layout import (
    FOLDERS,
    SMALL_FILES,
    HubError,
    OtherLayoutError,
    check_links,
    local_files,
    local_weights,
    merged,
    part_files,
    usual,
    variants_of,
    weight_files,
)

__all__ = ["CLIP", "HubError", "Repository", "cached_tokenizer", "check_names", "clip_tokenizer", "is_repository",
           "snapshot_in"]  # fmt: skip

CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer Stable Diffusion v1 uses
MOST = 16 << 20  # bytes of a listing, or of a header
NAMES = 100_000  # files of a repository
_WORD = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_WORD}/{_WORD}", re.ASCII)
_REVISION = re.compile(r"\w[\w.+@=#,-]*(?:/\w[\w.+@=#,-]*)*")  # fewer than git allows, and all that are in use
_VARIANT = re.compile(r"\w[\w-]*(?:\.[\w-]+)*", re.ASCII)
_ETAG = re.compile(r"\w[\w.+=-]{0,199}", re.ASCII)  # becomes the name of a file in the cache
_KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KINDS |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_KINDS |= {"I64": torch.int64, "I32": torch.int32}


# ---- what is asked for


def is_repository(text: str) -> bool:
    """Whether a text can be the name of a repository, such as CompVis/stable-diffusion-v1-4."""
    odd = ".." in text or "--" in text or text.endswith(".git")
    return _REPOSITORY.fullmatch(text) is not None and not odd


def check_names(revision: Any, variant: Any, token: Any = None) -> None:
    """Raise HubError unless these can be a revision, a variant and a token; before anything is asked or written."""
    if revision is not None:
        sound = isinstance(revision, str) and _REVISION.fullmatch(revision) and len(revision) <= 200
        parts = revision.split("/") if sound else []
        if not sound or any(".." in part or part.endswith((".", ".lock")) for part in parts):
            raise HubError(
                "revision= (--revision) is the name of a branch, tag or commit, such as main, v1.0 or refs/pr/5, not "
                f"{shown(revision)}."
            )
    if variant is not None and not (isinstance(variant, str) and _VARIANT.fullmatch(variant) and len(variant) <= 64):
        raise HubError(
            "variant= (--hub-variant) is a word from the names of a repository's files, such as fp16 or non_ema, not "
            f"{shown(variant)}."
        )
    if not (token is None or isinstance(token, bool | str)):
        raise HubError(
            f"token= is an access token of the Hub, as text, or True or False, not a {type(token).__name__}."
        )
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):  # not shown: it is a secret
        raise HubError("token= has characters that no access token of the Hub has: copy it again, without spaces.")


# ---- a repository


class Repository:
    """A repository at one of its commits; or, where the Hub cannot be reached, what the cache has of it.

    name      such as CompVis/stable-diffusion-v1-4
    files     the names of its files
    folder    where they are, or will be, in the cache of the Hub's client
    offline   "the Hub cannot be reached (...)", or "" if it can; and what to do about that as `remedy`

    Raises HubError: missing, private, no such revision, or out of reach and not in the cache.
    """

    def __init__(self, name: str, *, revision: str | None = None, token: Any = None) -> None:
        check_names(revision, None, token)
        if not is_repository(name):
            raise HubError(f"{shown(name)} is no name of a repository: expected one such as {CLIP}.")
        self.name, self.revision, self.token = name, revision, token
        self.offline = self.reason = self.remedy = ""
        try:
            self.commit, self.files = self._listing()
            self.folder = folder_of(name) / "snapshots" / self.commit
        except HubError:  # what the Hub says, as it says it; or a setting of ours that cannot be used
            raise
        except Exception as error:  # out of reach, of one of many kinds: then what the cache holds
            self.reason = web.cause_of(error)
            self.remedy = "check the connection and try again later"
            if self.reason == web.OFFLINE:
                self.remedy = "unset HF_HUB_OFFLINE"
            what = "the Hub's answer cannot be used" if isinstance(error, ValueError) else "the Hub cannot be reached"
            if refusal := web.refusal_of(error):
                what = "the Hub failed"
                if refusal.status == 403:
                    self.remedy = "log in with `hf auth login`, pass token="
            self.offline = f"{what} ({self.reason})"
            self.folder = self._cached()
            self.commit, self.files = self.folder.name, local_files(self.folder)

    def _listing(self) -> tuple[str, list[str]]:
        """The commit that the revision is at, and the names of all files. Raises HubError for a definite no."""
        at = f"/revision/{quote(self.revision, safe='')}" if self.revision else ""
        url = f"{web.client_constants().ENDPOINT}/api/models/{self.name}{at}"
        try:
            return read_listing(web.answer(partial(web.read_url, url, self.token, MOST)))
        except Exception as error:
            if sentence := self._no(error, listing=True):
                raise HubError(sentence) from error
            raise

    def _no(self, error: BaseException, *, listing: bool = False) -> str | None:
        """What an answer of the Hub means that is no failure: the repository cannot be had. Else None."""
        refusal = web.refusal_of(error)
        if refusal is None or refusal.status not in (401, 403, 404):
            return None
        code, message = (str(refusal.headers.get(f"X-Error-{what}", "")) for what in ("Code", "Message"))
        if code == "GatedRepo":
            return (
                f"{self.name} is gated: accept its licence at https://huggingface.co/{self.name}, "
                "then log in with `hf auth login`, or pass token=."
            )
        if code == "RevisionNotFound":
            return f"{self.name} has no revision {self.revision or 'main'!r}: see its branches and tags on the Hub."
        if "credentials" in message.lower():
            return f"The Hub does not accept the access token: log in again with `hf auth login` to use {self.name}."
        if refusal.status == 403:
            forbidden = f"The Hub forbids access to {self.name}: log in with `hf auth login`, or pass token=."
            return None if listing else forbidden  # the cache may have what is forbidden now
        if refusal.status == 404 and code != "RepoNotFound" and not listing:  # a file is missing
            return None
        return (
            f"There is no repository {self.name} on the Hub, or it is private: check the name, "
            "or log in with `hf auth login`."
        )

    def _cached(self) -> Path:
        if path := snapshot(self.name, self.revision):
            return path
        known = snapshots_of(folder_of(self.name))
        if not known:
            raise HubError(
                f"{self.name} is not in the cache and {self.offline}: {self.remedy}, or give a local file or folder.",
                self.reason,
            )
        first = next(iter(known))
        raise HubError(
            f"{self.name} is in the cache only at revision {', '.join(known)}, not at {self.revision or 'main'}, and "
            f'{self.offline}: ask for revision="{first}" (--revision {first}), or {self.remedy}.',
            self.reason,
        )

    def small_files(self) -> Path:
        """The folder, with all needed files but the weights: enough to refuse other models before gigabytes come."""
        self._fetch(self._small())
        return self.folder

    def all_files(self, variant: str | None) -> Path:
        """The folder, with all needed files. Nothing is fetched twice."""
        if self.offline:
            there = [path.relative_to(self.folder).as_posix() for path in self.folder.glob("*/*")]
            for part in FOLDERS:
                if not any(variants_of(there, part)):
                    self._fetch([usual(part, variant or "")])  # says that it is lacking
            try:
                local_weights(self.folder, variant, f"{self.name} in the cache")
            except HubError as error:
                raise HubError(f"{error.reason}, and {self.offline} to fetch more.", self.reason) from error
        else:
            weights = weight_files(self.files, variant, self.name)
            self._fetch([*self._small(), *(file for files in weights.values() for file in files)])
        return self.folder

    def vae(self, variant: str | None) -> Path:
        """The folder, with a VAE alone and its config: at the top, or in vae/. Raises HubError."""
        where = f"{self.name} in the cache" if self.offline else self.name
        inner = next((f for f in ("", "vae") if f"{f}/config.json".lstrip("/") in self.files), None)
        if inner is None:
            hint = f", and {self.offline}" if self.offline else ""
            raise HubError(f"{where} has no VAE (neither config.json nor vae/config.json){hint}: give another.")
        files = part_files(self.files, "vae", inner, variant, where)
        self._fetch([f"{inner}/config.json".lstrip("/"), *files])
        return self.folder

    def top_config(self) -> Path:
        """The folder, with the config.json at its top: of a ControlNet, and the like. Raises HubError."""
        if "config.json" not in self.files:
            alone = sorted(f for f in self.files if f.endswith((".pth", ".safetensors")) and "/" not in f)
            hint = f"download {alone[0]} and give its path" if alone else "choose another repository"
            where = f"{self.name} in the cache" if self.offline else self.name
            offline = f", and {self.offline}" if self.offline else ""
            raise HubError(f"{where} has no config.json at its top{offline}: {hint}.")
        self._fetch(["config.json"])
        return self.folder

    def top_weights(self, variant: str | None, look: bool = False) -> dict[str, dict[str, Tensor]]:
        """Have the weights at the top in the folder. Raises HubError.

        With `look` nothing is fetched where headers tell: then each file's tensors on the meta device are given.
        """
        where = f"{self.name} in the cache" if self.offline else self.name
        files = part_files(self.files, "unet", "", variant, where)
        if look and not self.offline and all(file.endswith(".safetensors") for file in files):
            return {file: self._tensors(file) for file in files}
        self._fetch(files)
        return {}

    def headers(self, variant: str | None) -> dict[str, dict[str, Tensor]] | None:
        """The tensors of each part on the meta device; None where that needs a download (.bin), or the Hub."""
        if self.offline:
            return None
        chosen = weight_files(self.files, variant, self.name)
        if not all(file.endswith(".safetensors") for files in chosen.values() for file in files):
            return None
        return {
            part: merged({file: self._tensors(file) for file in files}, self.name) for part, files in chosen.items()
        }

    def texts(self, names: Iterable[str]) -> dict[str, str]:
        """The texts of small files."""
        wanted = list(names)
        self._fetch(wanted)
        return {name: read_utf8(self.folder / name) for name in wanted}

    def _small(self) -> list[str]:
        if self.offline:
            check_links(self.folder, SMALL_FILES, f"{self.name} in the cache")
        wanted = [file for file in SMALL_FILES if file in self.files]
        if "unet/config.json" not in wanted:
            if self.offline:
                self._fetch(["unet/config.json"])  # says what is lacking
            alone = sorted(f for f in self.files if f.endswith((".ckpt", ".safetensors")) and "/" not in f)
            hint = f"download {alone[0]} and give its path" if alone else "choose another repository"
            raise OtherLayoutError(
                f"{self.name} is not in the layout of diffusers (it has no unet/config.json): {hint}."
            )
        if "tokenizer/vocab.json" in wanted:  # then the larger file that says the same is not needed
            wanted = [file for file in wanted if file != "tokenizer/tokenizer.json"]
        return wanted

    def _fetch(self, names: list[str]) -> None:
        """Have these files in the folder. Raises HubError."""
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing and self.offline:
            raise HubError(
                f"{self.name} in the cache lacks {missing[0]}, and {self.offline}: {self.remedy}, so that it can be "
                "fetched.",
                self.reason,
            )
        progress = web.Progress(partial(files_size, self.name))
        with self._told("could not be downloaded", "try again; what is there is kept"):
            try:
                web.answers([partial(self._fetch_one, name, progress) for name in missing], progress)
            except BaseException:  # Ctrl-C, too
                drop_partial(self.name)
                raise
            lost = next((name for name in missing if not (self.folder / name).is_file()), None)
            if lost:
                raise ValueError(f"{lost} did not arrive")
        if not self.offline:
            remember(self.name, self.revision or "main", self.commit)

    def _fetch_one(self, name: str, progress: web.Progress) -> None:
        """One file into the cache, by the client, once its headers are known to be sound. For use in `answers`."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        url = hf_hub_url(self.name, name, revision=self.commit)
        about = web.patiently(partial(get_hf_file_metadata, url, token=self.token, timeout=web.seconds()))
        if about.commit_hash != self.commit:
            raise ValueError(f"the Hub has {name} of commit {shown(about.commit_hash)}, not of {self.commit}")
        if not isinstance(about.etag, str) or not _ETAG.fullmatch(about.etag):  # it could lead out of the cache
            raise ValueError(f"the Hub has an ETag for {name} that cannot be used, {shown(about.etag)}")
        most = 2 * about.size + (1 << 24) if about.size else math.inf  # some protocols send more than the file has
        if name.endswith((".json", ".txt")):
            most = min(most, MOST)
            if (about.size or 0) > MOST:
                raise ValueError(f"{name} has {about.size:,} bytes, and at most {MOST:,} are read of such a file")
        if (about.size or 0) > (free := free_space()):
            raise ValueError(f"{name} has {about.size:,} bytes, and there is room for {free:,} on the cache's disk")
        progress.tell(1)
        more: dict[str, Any] = {}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # in newer versions
            more["tqdm_class"] = progress.bar(most)
        hf_hub_download(self.name, name, revision=self.commit, token=self.token, etag_timeout=web.seconds(), **more)

    def _tensors(self, file: str) -> dict[str, Tensor]:
        """The tensors of a .safetensors file, on the meta device: only its header is fetched."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.name, file, revision=self.commit)
        with self._told(f"has {file}, which could not be looked at", "try again"):
            data = web.answer(partial(web.read_url, url, self.token, MOST, 1 << 17))
            size = 8 + int.from_bytes(data[:8], "little")
            if len(data) < 8 or size > MOST:
                raise ValueError("it is no safetensors file")
            if size > len(data):
                data = web.answer(partial(web.read_url, url, self.token, MOST, size))
            if size > len(data):
                raise ValueError("its header was cut off")
            return tensors_of_header(data[8:size])

    @contextlib.contextmanager
    def _told(self, what: str, remedy: str) -> Iterator[None]:
        """What fails in the block is a HubError: by what the Hub said, else what failed and why."""
        try:
            yield
        except HubError:
            raise
        except Exception as error:
            cause = web.cause_of(error)
            raise HubError(self._no(error) or f"{self.name} {what} ({cause}): {remedy}.", cause) from error


# ---- what comes


def read_listing(data: bytes) -> tuple[str, list[str]]:
    """The commit and the names of the files in what the Hub says of a repository.

    Names that no needed file has are left out. Raises ValueError, the rest of a sentence.
    """
    content = parse_json(data)
    siblings = content.get("siblings") if isinstance(content, dict) else None
    if not isinstance(siblings, list):
        raise ValueError("its answer is no listing of a repository")
    commit = content.get("sha")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):  # it becomes the name of a folder
        raise ValueError(f"its listing has {shown(commit)} for a commit")
    if len(siblings) > NAMES:
        raise ValueError(f"its listing has more than {NAMES:,} files")
    names = []
    for entry in siblings:
        name = entry.get("rfilename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"its listing has a file with the name {shown(name)}")
        if name.isprintable() and "\\" not in name and len(name) < 500:
            names.append(name)
    return commit, names


def tensors_of_header(data: bytes) -> dict[str, Tensor]:
    """The tensors, on the meta device, of a safetensors header. Raises ValueError, the rest of a sentence."""
    header = parse_json(data)
    if not isinstance(header, dict):
        raise ValueError("it is no safetensors file")
    header.pop("__metadata__", None)
    tensors = {}
    shape: Any
    kind: Any
    for name, entry in header.items():
        shape, kind = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        sound = isinstance(kind, str) and isinstance(shape, list) and len(shape) <= 8 and name.isprintable()
        if not sound or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape) or math.prod(shape) >= 1 << 50:
            raise ValueError(f"its header has no sound entry for {shown(name)}")
        tensors[name] = torch.empty(shape, dtype=_KINDS.get(kind, torch.uint8), device="meta")
    return tensors


# ---- the tokenizer of CLIP


def cached_tokenizer() -> dict[str, str] | None:
    """The texts of CLIP's vocab.json and merges.txt from the Hub's cache, if they are there: they never change."""
    folder = snapshot(CLIP, None)
    try:
        return {name: read_utf8(folder / name) for name in ("vocab.json", "merges.txt")} if folder else None
    except SmallFileError:  # missing or damaged: fetched again
        return None


def clip_tokenizer(token: Any = None) -> dict[str, str]:
    """The texts of CLIP's vocab.json and merges.txt from the Hub. Raises HubError, whose `reason` says why not."""
    try:
        return Repository(CLIP, token=token).texts(["vocab.json", "merges.txt"])
    except SmallFileError as error:
        raise HubError(str(error), error.reason) from error

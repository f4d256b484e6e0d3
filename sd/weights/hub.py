"""The Hub's layout: which files of a folder or repository are needed, and how they are had.

unet/, vae/       config.json, diffusion_pytorch_model[.fp16].safetensors or .bin
text_encoder/     config.json, model[.fp16].safetensors or pytorch_model[.fp16].bin
tokenizer/        vocab.json, merges.txt; or tokenizer.json alone, by transformers 5
scheduler/        scheduler_config.json
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import SmallFileError, read_utf8

CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer Stable Diffusion v1 uses
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
SMALL = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/added_tokens.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "scheduler/scheduler_config.json",
)


class HubError(ValueError):
    """A repository or folder that is missing, closed, out of reach or incomplete; one sentence."""


def weight_files(files: Collection[str], variant: str | None, where: str) -> dict[str, str]:
    """The weights of each part: of the variant asked for, safetensors before bin.

    Raises HubError where a part has none, naming the variants that there are.
    """
    chosen = {}
    for part, folder in FOLDERS.items():
        stems = ["model", "pytorch_model"] if part == "text" else ["diffusion_pytorch_model"]
        mark = f".{variant}" if variant else ""
        candidates = [f"{folder}/{s}{mark}.{end}" for end in ("safetensors", "bin") for s in stems]
        found = next((c for c in candidates if c in files), None)
        if found is None:
            pattern = re.compile(rf"{folder}/(?:{'|'.join(stems)})(?:\.(\w+))?\.(?:safetensors|bin)")
            others = sorted({m[1] or "none" for f in files if (m := pattern.fullmatch(f))})
            hint = f"it has the variants {', '.join(others)}" if others else "expected the layout of diffusers"
            raise HubError(
                f"{where} has no weights {candidates[0]}: {hint}; choose another variant or another source."
            )
        chosen[part] = found
    return chosen


def local_files(folder: Path) -> list[str]:
    """Files of a folder of the Hub's layout, as the Hub would list them."""
    return [p.relative_to(folder).as_posix() for p in folder.glob("*/*")] + [p.name for p in folder.glob("*")]


def download(
    repo: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: Any = None,
    weights: bool = True,
) -> Path:
    """The needed files of a repository, in huggingface_hub's cache; nothing is fetched twice.

    Without `weights`, only the small files: enough to refuse other models before gigabytes have come. With
    HF_HUB_OFFLINE, or no network, from the cache alone.
    Raises HubError: missing, gated, offline and not cached, or no such revision.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        try:
            files = listing(repo, revision, token)
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.GatedRepoError):
            raise
        except Exception as error:  # offline, of one of many kinds: then what the cache holds
            folder = cached(repo, revision)
            if folder is None:
                raise HubError(
                    f"{repo} is not in the cache and the Hub cannot be reached ({_brief(error)}): "
                    "connect, unset HF_HUB_OFFLINE, or give a local file or folder."
                ) from error
            if weights:
                weight_files(local_files(folder), variant, f"{repo} in the cache")
            return folder
        wanted = [f for f in SMALL if f in files]
        if "unet/config.json" not in wanted:
            alone = [f for f in files if f.endswith((".ckpt", ".safetensors")) and "/" not in f]
            hint = f"download {alone[0]} and give its path" if alone else "choose another repository"
            raise HubError(f"{repo} is not in the layout of diffusers (it has no unet/config.json): {hint}.")
        if "tokenizer/vocab.json" in wanted:  # then the larger file that says the same is not needed
            wanted = [f for f in wanted if f != "tokenizer/tokenizer.json"]
        if weights:
            wanted += weight_files(files, variant, repo).values()
        return Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=wanted))
    except hub.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, "
            "then log in with `hf auth login`, or pass token=."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r}: see its branches and tags on the Hub.") from error
    except hub.RepositoryNotFoundError as error:
        raise HubError(
            f"There is no repository {repo} on the Hub, or it is private: check the name, "
            "or log in with `hf auth login`."
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise HubError(
            f"{repo} could not be downloaded ({_brief(error)}): try again; what is there is kept."
        ) from error


def listing(repo: str, revision: str | None, token: Any) -> list[str]:
    """The names of a repository's files. (list_repo_files tries for 20 s where there is no network.)"""
    from huggingface_hub import HfApi

    return [file.rfilename for file in HfApi(token=token).repo_info(repo, revision=revision).siblings or []]


def cached(repo: str, revision: str | None) -> Path | None:
    """The folder in the cache that holds what was fetched of a repository, if that is anything.

    Not by snapshot_download: offline it wants all files of the repository, where we fetch those we need.
    """
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, "unet/config.json", revision=revision)
    return Path(path).parents[1] if isinstance(path, str) else None


def look(repo: str, variant: str | None, revision: str | None, token: Any) -> dict[str, dict[str, Tensor]] | None:
    """The tensors of each part on the meta device, or None where that needs a download (.bin), or offline."""
    try:
        files = listing(repo, revision, token)
    except Exception:  # the cache will do, or `download` says what is wrong
        return None
    chosen = weight_files(files, variant, repo)
    if not all(file.endswith(".safetensors") for file in chosen.values()):
        return None
    return {part: remote_tensors(repo, file, revision, token) for part, file in chosen.items()}


def remote_tensors(repo: str, file: str, revision: str | None, token: Any) -> dict[str, Tensor]:
    """The tensors of a .safetensors file on the Hub, on the meta device: only its header is fetched."""
    from huggingface_hub import HfApi

    try:
        header = HfApi(token=token).parse_safetensors_file_metadata(repo, file, revision=revision)
    except Exception as error:  # the client's and the network's errors are of many kinds
        raise HubError(f"{file} of {repo} could not be looked at ({_brief(error)}): try again.") from error
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    kinds |= {"I64": torch.int64, "I32": torch.int32}
    return {
        name: torch.empty(entry.shape, dtype=kinds.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in header.tensors.items()
    }


def cached_tokenizer() -> dict[str, str] | None:
    """The texts of CLIP's vocab.json and merges.txt from the Hub's cache, if they are there: they never change."""
    from huggingface_hub import try_to_load_from_cache

    paths = {name: try_to_load_from_cache(CLIP, name) for name in ("vocab.json", "merges.txt")}
    if not all(isinstance(path, str) for path in paths.values()):
        return None
    try:
        return {name: read_utf8(str(path)) for name, path in paths.items()}
    except SmallFileError:  # damaged: fetched again
        return None


def clip_tokenizer(token: Any = None) -> dict[str, str]:
    """The texts of CLIP's vocab.json and merges.txt from the Hub. Raises HubError."""
    from huggingface_hub import hf_hub_download

    try:
        return {name: read_utf8(hf_hub_download(CLIP, name, token=token)) for name in ("vocab.json", "merges.txt")}
    except Exception as error:  # the client's and the network's errors are of many kinds
        raise HubError(_brief(error)) from error


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 150 else text[:147] + "..."

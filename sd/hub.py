"""The Hub's layout: which files of a folder or repository are needed, and how they are had.

unet/, vae/       config.json, diffusion_pytorch_model[.fp16].safetensors or .bin
text_encoder/     config.json, model[.fp16].safetensors or pytorch_model[.fp16].bin
tokenizer/        vocab.json, merges.txt
scheduler/        scheduler_config.json
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

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

    Without `weights`, only the small files. With HF_HUB_OFFLINE, or no network, from the cache alone.
    Raises HubError: missing, gated, offline and not cached, or no such revision.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    try:
        try:
            files = HfApi(token=token).list_repo_files(repo, revision=revision)
        except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.GatedRepoError):
            raise
        except Exception as error:  # offline, of one of many kinds: then what the cache holds
            try:
                folder = snapshot_download(repo, revision=revision, token=token, local_files_only=True)
            except Exception:
                raise HubError(
                    f"{repo} is not in the cache and the Hub cannot be reached ({_brief(error)}): "
                    "connect, unset HF_HUB_OFFLINE, or give a local file or folder."
                ) from error
            files = local_files(Path(folder))
            if weights:
                weight_files(files, variant, f"{repo} in the cache")
            return Path(folder)
        wanted = [f for f in SMALL if f in files]
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


def clip_tokenizer(token: Any = None) -> dict[str, str]:
    """The texts of CLIP's vocab.json and merges.txt, from the Hub or its cache. Raises HubError."""
    from huggingface_hub import hf_hub_download

    try:
        return {
            name: Path(hf_hub_download(CLIP, name, token=token)).read_text(encoding="utf-8")
            for name in ("vocab.json", "merges.txt")
        }
    except Exception as error:  # the client's and the network's errors are of many kinds
        raise HubError(_brief(error)) from error


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 150 else text[:147] + "..."

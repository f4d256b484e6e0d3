"""The Hub's layout: which files of a folder or repository are needed.

unet/, vae/       config.json, diffusion_pytorch_model[.fp16].safetensors or .bin
text_encoder/     config.json, model[.fp16].safetensors or pytorch_model[.fp16].bin
tokenizer/        vocab.json, merges.txt; or tokenizer.json alone, by transformers 5
scheduler/        scheduler_config.json

Weights may be split over several files, shards: model-00001-of-00002.safetensors, with a variant
model.fp16-00001-of-00002.safetensors, by older tools model-00001-of-00002.fp16.safetensors. The index beside them
says no more than their names and their headers do, so it is not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from ..files import PlainError, shown

T = TypeVar("T")

FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
STEMS = {part: ("model", "pytorch_model") if part == "text" else ("diffusion_pytorch_model",) for part in FOLDERS}
ENDINGS = ("safetensors", "bin")  # the first is preferred
SMALL_FILES = (
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
_WEIGHTS = re.compile(
    r"(?P<stem>model|pytorch_model|diffusion_pytorch_model)(\.(?P<variant>\w[\w.-]*?))?"
    r"(-(?P<number>\d{1,5})-of-(?P<total>\d{1,5})(\.(?P<late_variant>\w[\w.-]*))?)?\.(?P<ending>safetensors|bin)"
)


class HubError(PlainError):
    """A repository or folder that is missing, closed, out of reach or incomplete; one sentence.

    `reason` is what is wrong alone, for a sentence of somebody else.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message.rstrip(".")


class OtherLayoutError(HubError):
    """A repository that is there, and holds no model of the layout of diffusers."""


# ---- which files hold the weights


def weight_files(files: Collection[str], variant: str | None, where: str) -> dict[str, list[str]]:
    """The files of each part's weights: several if they are split, safetensors before bin.

    A part that does not have the variant is taken without it, as long as another part has it: repositories have some
    variants for the UNet alone. Raises HubError, which names the variants that there are, or the shard that is not.
    """
    wanted = variant or ""
    found = {part: variants_of(files, part) for part in FOLDERS}
    if wanted and not any(wanted in part for both in found.values() for part in both):
        there = sorted({name for choices, _ in found.values() for name in choices if name})
        hint = f"its variants are {', '.join(there)}" if there else "it has no variants"
        raise HubError(
            f"{where} has no weights {usual('unet', wanted)}, nor the variant {wanted} of another part: {hint}; name "
            "another as variant= (--hub-variant), or leave it out."
        )
    chosen = {}
    for part, (choices, incomplete) in found.items():
        name = wanted if wanted in choices or wanted in incomplete else ""
        if name in choices:
            chosen[part] = choices[name]
        elif name in incomplete:
            raise HubError(
                f"{where} lacks {incomplete[name]}, one of the files that the weights of {FOLDERS[part]} are split "
                "over: add it, or download all of them again."
            )
        elif choices:
            others = [set(c) for c, _ in found.values() if "" not in c]
            usable = min(set.intersection(*others) or choices)  # a variant of each part that needs one
            raise HubError(
                f"{where} has no weights {usual(part)}, only those of a variant ({', '.join(sorted(choices))}): ask "
                f'for it with variant="{usable}" (--hub-variant {usable}).'
            )
        else:
            index = next((f for f in files if f.startswith(f"{FOLDERS[part]}/") and f.endswith(".index.json")), None)
            hint = (
                f"{index} is there, but not the files that it names" if index else "expected the layout of diffusers"
            )
            raise HubError(f"{where} has no weights {usual(part)}: {hint}; give another folder or repository.")
    return chosen


def part_files(files: Collection[str], part: str, folder: str, variant: str | None, where: str) -> list[str]:
    """The files of the weights of one part alone, in a folder, or at the top where that is "". Raises HubError."""
    choices, incomplete = variants_of(files, part, folder)
    wanted = variant or ""
    if wanted in choices:
        return choices[wanted]
    if wanted in incomplete:
        raise HubError(
            f"{where} lacks {incomplete[wanted]}, one of the files that the weights are split over: add it."
        )
    there = ", ".join(sorted(filter(None, choices)))
    hint = f"its variants are {there}; name one of them" if there else "give another folder or repository"
    raise HubError(f"{where} has no weights {usual(part, wanted, folder)}: {hint}.")


def usual(part: str, variant: str = "", folder: str | None = None) -> str:
    """The file in which most repositories have a part."""
    folder = FOLDERS[part] if folder is None else folder
    return f"{folder}/{STEMS[part][0]}{'.' + variant if variant else ''}.safetensors".lstrip("/")


def variants_of(
    files: Collection[str], part: str, folder: str | None = None
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """For each variant of a part the best files; and for each that is there in part only, a file that it lacks.

    The variant without a name is "". folder: where they are, "" at the top; the part's own if not given.
    """
    folder = f"{FOLDERS[part] if folder is None else folder}/".lstrip("/")
    sets: dict[tuple[str, int, int, int], dict[int, str]] = {}  # each is a whole, if no number is missing
    for file in sorted(files):
        match = _WEIGHTS.fullmatch(file.removeprefix(folder)) if file.startswith(folder) else None
        if match is None or match["stem"] not in STEMS[part] or (match["variant"] and match["late_variant"]):
            continue
        number, total = int(match["number"] or 0), int(match["total"] or 0)
        if (total == 0) != (match["total"] is None):  # "-of-00000"
            continue
        rank = ENDINGS.index(match["ending"]), STEMS[part].index(match["stem"])
        sets.setdefault((match["variant"] or match["late_variant"] or "", *rank, total), {})[number] = file
    complete: dict[str, list[str]] = {}
    incomplete: dict[str, str] = {}
    for (variant, _, _, total), shards in sorted(sets.items()):  # safetensors first, and one file before several
        numbers = range(1, total + 1) if total else range(1)
        missing = next((number for number in numbers if number not in shards), None)
        if missing is None:
            complete.setdefault(variant, [shards[number] for number in numbers])
        else:
            there = next(iter(shards.values()))
            incomplete.setdefault(variant, re.sub(r"-\d+-of-", f"-{missing:05}-of-", there))
    return complete, incomplete


def merged(opened: Mapping[str, Mapping[str, T]], where: str) -> dict[str, T]:
    """The tensors of a part from all of its files. Raises HubError for a tensor that is in two of them."""
    result: dict[str, T] = {}
    home: dict[str, str] = {}
    for file, tensors in opened.items():
        if twice := next((name for name in tensors if name in result), None):
            raise HubError(
                f"{where} has the tensor {shown(twice)} twice, in {home[twice]} and in {file}: these files do not "
                "belong together; download them again."
            )
        result |= tensors
        home |= dict.fromkeys(tensors, file)
    return result


# ---- a folder


def local_files(folder: Path) -> list[str]:
    """Files of a folder of the Hub's layout, as the Hub would list them."""
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    return [p.relative_to(folder).as_posix() for p in paths if p.is_file()]


def local_weights(folder: Path, variant: str | None, where: str) -> dict[str, list[str]]:
    """`weight_files` of a folder. Raises HubError, also for a link in the cache whose file is gone."""
    check_links(folder, SMALL_FILES, where)
    try:
        return weight_files(local_files(folder), variant, where)
    except HubError:
        links = [p.relative_to(folder).as_posix() for p in folder.glob("*/*") if p.is_symlink()]
        check_links(folder, [link for link in links if _WEIGHTS.fullmatch(link.partition("/")[2])], where)
        raise


def check_links(folder: Path, files: Iterable[str], where: str) -> None:
    """Raise HubError if one of these files is a link to a file that has been deleted, as after tidying the cache."""
    for file in files:
        path = folder / file
        if path.is_symlink() and not path.exists():
            raise HubError(
                f"{where} has lost {file}, which is a link to a file that is gone: if it is a repository in the "
                "Hub's cache, ask for it by its name while connected, and the file is fetched again; else put the "
                f"file back ({folder})."
            )

"""Where a tokenizer comes from: a folder, the Hub's cache, an installed package of CLIP, or a download."""

from __future__ import annotations

import gzip
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import read_json, read_small, read_utf8
from . import hub

PACKAGES = ("open_clip", "clip")  # that bring CLIP's vocabulary; its file is read, they are not imported
PACKED = "bpe_simple_vocab_16e6.txt.gz"
MOST = 16 << 20  # bytes of it, unpacked; it has 3.2 MB
MERGES = 49152 - 256 - 2  # that CLIP uses of it


def bytes_to_letters() -> list[str]:
    """The 256 characters by which CLIP's tokenizer writes bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def read_tokenizer(folder: Path) -> dict[str, str] | None:
    """The texts of vocab.json and merges.txt in a folder, or None. Raises ValueError.

    transformers 5 saves a tokenizer.json in their place, which has both inside.
    """
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if all(file.is_file() for file in files):
        return {file.name: read_utf8(file) for file in files}
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        model = read_json(folder / "tokenizer.json")["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        vocab = json.dumps(model["vocab"], ensure_ascii=False)
    except (KeyError, TypeError) as error:
        raise ValueError(f"tokenizer.json holds no vocabulary and merges ({error!r})") from None
    return {"vocab.json": vocab, "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


def from_package() -> dict[str, str] | None:
    """CLIP's vocabulary from an installed package, as vocab.json and merges.txt; None without one.

    As SimpleTokenizer of openai/CLIP makes its vocabulary: bytes, bytes at the end of a word, merges, two marks.
    """
    for name in PACKAGES:
        try:
            spec = find_spec(name)
            for folder in (spec.submodule_search_locations if spec else None) or ():
                if (path := Path(folder, PACKED)).is_file():
                    return unpacked(read_small(path))
        except (OSError, EOFError, ValueError):  # of another make: look further
            continue
    return None


def unpacked(data: bytes) -> dict[str, str]:
    """The file that openai/CLIP and open_clip bring, as vocab.json and merges.txt. Raises OSError, ValueError."""
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        text = file.read(MOST + 1)
    lines = text.decode().split("\n")[1 : MERGES + 1]
    if len(text) > MOST or len(lines) < MERGES or not all(len(line.split()) == 2 for line in lines):
        raise ValueError("it is not CLIP's vocabulary")
    letters = bytes_to_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(line.split()) for line in lines)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    return {"vocab.json": vocab, "merges.txt": "\n".join(["#version: 0.2", *lines, ""])}


def clip_texts(name: str, token: Any = None) -> dict[str, str]:
    """CLIP's tokenizer for the source `name`, which brings none. Raises HubError, which says the ways in."""
    try:
        return hub.cached_tokenizer() or from_package() or hub.clip_tokenizer(token)
    except hub.HubError as error:
        raise hub.HubError(
            f"{name} brings no tokenizer, and CLIP's is neither in the Hub's cache nor in a package, nor could it be "
            f"had from the Hub ({error.reason}): give a folder with vocab.json and merges.txt as tokenizer= "
            "(--tokenizer), install open_clip_torch (pip install 'artificial-artist[clip]'), connect once so that "
            f"{hub.CLIP} is cached, or use a converted file or a repository, which have their own."
        ) from None

"""Where a tokenizer comes from: a folder, the Hub's cache, an installed package of CLIP, or a download."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from ..files import parse_json, read_json, read_small, read_utf8
from ..text import Texts
from . import hub
from .configs import LoadError

if TYPE_CHECKING:
    from .source import Source

PACKAGES = ("open_clip", "clip")  # that bring CLIP's vocabulary; its file is read, they are not imported
PACKED = "bpe_simple_vocab_16e6.txt.gz"
MOST = 16 << 20  # bytes of it, unpacked; it has 3.2 MB
MERGES = 49152 - 256 - 2  # that CLIP uses of it
ADDED = "added_tokens.json"  # of a tokenizer: the words that it has beside its vocabulary
MOST_ADDED, LONGEST_ADDED = 10_000, 1000  # such words, and characters in one
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of such a word, as transformers calls them
OWN = ("<|startoftext|>", "<|endoftext|>")  # marks that CLIPTokenizer has in any case


def bytes_to_letters() -> list[str]:
    """The 256 characters by which CLIP's tokenizer writes bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def read_tokenizer(folder: Path) -> dict[str, str] | None:
    """The texts of vocab.json and merges.txt in a folder, and of the words beside them; or None. Raises ValueError.

    transformers 5 saves a tokenizer.json in their place, which has all inside.
    """
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if all(file.is_file() for file in files):
        texts = {file.name: read_utf8(file) for file in files}
    elif (folder / "tokenizer.json").is_file():
        texts = vocabulary_of(folder / "tokenizer.json")
    else:
        return None
    words = added_words(folder)
    if any(word | MARK != word or word["content"] not in OWN for word in words):
        texts[ADDED] = json.dumps(words, ensure_ascii=False)
    return texts


def vocabulary_of(file: Path) -> dict[str, str]:
    """vocab.json and merges.txt as they stand in a tokenizer.json. Raises ValueError."""
    try:
        model = read_json(file)["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        vocab = json.dumps(model["vocab"], ensure_ascii=False)
    except (KeyError, TypeError) as error:
        raise ValueError(f"tokenizer.json holds no vocabulary and merges ({error!r})") from None
    return {"vocab.json": vocab, "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


def padding_of(folder: Path, texts: Mapping[str, str]) -> int | None:
    """The token that a tokenizer fills texts up with, where it is not the end of the text: "!", of SD 2, is 0.

    As from_pretrained of transformers reads it: tokenizer_config.json says it, else special_tokens_map.json.
    Raises ValueError.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = read_json(folder / name) if (folder / name).is_file() else None
        token = said.get("pad_token") if isinstance(said, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            number = parse_json(texts["vocab.json"]).get(token) if isinstance(token, str) else None
            if token != OWN[1] and type(number) is not int:
                raise ValueError(f"it fills texts up with {short(token)}, which is not in its vocabulary")
            return None if token == OWN[1] else number
    return None


# ---- words beside the vocabulary

PLAIN: dict[str, Any] = dict.fromkeys(FLAGS[:3], False)
MARK = PLAIN | {"normalized": False, "special": True}


def added_words(folder: Path) -> list[dict[str, Any]]:
    """The words that the tokenizer in a folder has beside its vocabulary, by id; each has "id", "content", `FLAGS`.

    As `from_pretrained` of transformers: "added_tokens_decoder" of tokenizer_config.json says all, where it is there;
    else it is added_tokens.json, which tells no flags, and then "added_tokens" of tokenizer.json. Raises ValueError.
    """

    def content(name: str, key: str | None = None) -> Any:
        kind = list if key == "added_tokens" else dict
        if not (folder / name).is_file():
            return kind()
        found = read_json(folder / name)
        found = found.get(key) or kind() if key and isinstance(found, dict) else found
        if not isinstance(found, kind):
            raise ValueError(f"{name} holds no {'list' if kind is list else 'table'} of words that can be added")
        return found

    config = content("tokenizer_config.json")
    if "added_tokens_decoder" in config:
        listed = content("tokenizer_config.json", "added_tokens_decoder")
        words = [{**table_of(word), "id": number_of(number)} for number, word in listed.items()]
    else:
        special = set(OWN)
        listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")  # its older name
        for names in (listed, content("special_tokens_map.json").get("extra_special_tokens")):
            for name in names if isinstance(names, list) else ():
                name = name.get("content") if isinstance(name, dict) else name
                special |= {name} if isinstance(name, str) else set()
        words = [{"content": text, "id": i, "special": text in special} for text, i in content(ADDED).items()]
        words += [table_of(word) for word in content("tokenizer.json", "added_tokens")]
    by_id = {}
    for word in words:
        word = {**PLAIN, "special": False, **word}
        word.setdefault("normalized", not word["special"])
        word = {key: word.get(key) for key in ("id", "content", *FLAGS)}
        check_word(word)
        by_id[word["id"]] = word
    return [by_id[number] for number in sorted(by_id)]


def table_of(word: Any) -> dict[str, Any]:
    return word if isinstance(word, dict) else {"content": word, "special": None}  # which `check_word` refuses


def number_of(text: str) -> Any:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


def check_word(word: Any) -> None:
    """Raise ValueError, the rest of a sentence, unless this has the form of a word that is added to a vocabulary."""
    if isinstance(word, dict) and word.keys() == {"id", "content", *FLAGS}:
        text = word["content"]
        sound = type(word["id"]) is int and isinstance(text, str) and 0 < len(text) <= LONGEST_ADDED
        if sound and all(type(word[flag]) is bool for flag in FLAGS) and not re.search("[\ud800-\udfff]", text):
            return
    raise ValueError(f"it adds {short(word)}, where a word with its id and flags is expected")


def check_added(vocab_size: int, texts: Mapping[str, str]) -> None:
    """Raise ValueError, the rest of a sentence, unless the words that are added fit vocabulary and encoder.

    `texts` are those of a tokenizer that is otherwise sound; added_tokens.json is a list as "added_tokens" in a
    tokenizer.json.
    """
    if ADDED not in texts:
        return
    try:
        words = parse_json(texts[ADDED])
    except ValueError as error:
        raise ValueError(f"{ADDED} cannot be read ({error})") from None
    if not isinstance(words, list) or len(words) > MOST_ADDED:
        raise ValueError(f"{ADDED} is no list of at most {MOST_ADDED:,} words")
    numbers: dict[str, int] = json.loads(texts["vocab.json"])
    owners = {number: token for token, number in numbers.items()}
    for word in words:
        check_word(word)
        text, number = word["content"], word["id"]
        if not 0 <= number < vocab_size:
            raise ValueError(
                f"it adds {short(text)} as token {number}, but the text encoder knows {vocab_size} tokens"
            )
        if owners.setdefault(number, text) != text:
            raise ValueError(f"it adds {short(text)} as token {number}, which is {short(owners[number])}")
        if numbers.setdefault(text, number) != number:
            raise ValueError(f"it adds {short(text)} as token {number}, which is token {numbers[text]} already")


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


def find_texts(found: Source, folder: str | os.PathLike[str] | None, token: Any) -> Texts | Callable[[], Texts]:
    """The texts of a tokenizer: of the folder given, else the source's; else how to get CLIP's."""
    if folder is not None:
        try:
            if texts := read_tokenizer(Path(folder)):
                return texts
            reason = "no vocabulary is there"
        except ValueError as error:
            reason = str(error)
        raise LoadError(
            f"The tokenizer folder {folder} cannot be read ({reason}): give one with vocab.json and "
            "merges.txt, or tokenizer.json, as tokenizer= (--tokenizer)."
        )
    return found.tokenizer or partial(clip_texts, found.name, token)


def tokenizer_texts(found: Source, folder: str | os.PathLike[str] | None, token: Any) -> Texts:
    """The same, found at once. Raises LoadError where there is no tokenizer."""
    texts = find_texts(found, folder, token)
    try:
        return texts() if callable(texts) else texts
    except hub.HubError as error:
        raise LoadError(str(error)) from None

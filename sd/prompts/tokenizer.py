"""CLIP's tokenizer: from a text to numbers, by byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

The steps are those of transformers' CLIPTokenizer, put together here from the package `tokenizers`, on which that is
built: importing transformers takes seconds, this takes a hundredth of one. A test compares the numbers of many texts.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from ..text import Texts

START, END = "<|startoftext|>", "<|endoftext|>"  # the end of text is also what fills up to 77 tokens

# A mark, an English ending, a word, a digit, or a run of other signs; what is between is left out.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def check_tokenizer(vocab_size: int, vocab: str, merges: str) -> None:
    """Raise ValueError, the rest of a sentence, unless these files are a tokenizer for an encoder of that size.

    The tokenizer itself is made later, and says less clearly what is wrong.
    """
    try:
        ids = json.loads(vocab)
        sane = isinstance(ids, dict) and all(type(i) is int and i >= 0 for i in ids.values())
    except (ValueError, RecursionError):
        sane = False
    if not sane or START not in ids or END not in ids:
        raise ValueError(f"vocab.json is no vocabulary of CLIP (tokens and numbers, {START} and {END})")
    if max(ids.values()) >= vocab_size:
        raise ValueError(
            f"the tokenizer numbers tokens up to {max(ids.values())}, the text encoder knows {vocab_size}"
        )
    for merge in merges.split("\n")[1:]:
        pair = merge.split(" ")
        if merge.strip() and (len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys()):
            raise ValueError(f"merges.txt does not belong to vocab.json ({merge[:40]!r})")


def sound_tokenizer(vocab_size: int, texts: Texts) -> Texts:
    """The texts of a tokenizer for an encoder of that size. Raises ValueError, the rest of a sentence, for others."""
    vocab, merges = texts["vocab.json"], texts["merges.txt"]
    # Tokenizers skip the first line, some of them whatever it says; and some stumble over lines of spaces.
    merges = merges if merges.startswith("#version") else f"#version: 0.2\n{merges}"
    merges = "".join(f"{line}\n" for line in merges.split("\n") if line.strip())
    check_tokenizer(vocab_size, vocab, merges)
    return {**texts, "merges.txt": merges}


class Tokenizer:
    """Of the texts of vocab.json and merges.txt, and of added_tokens.json, the words that it has beside these.

    An added word of several tokens (vectors) has them in a row: "<cat>" stands for "<cat>", "<cat>_1", "<cat>_2", as
    far as these are added, too. That is how diffusers writes them down (`maybe_convert_prompt`).

    It never changes, so several threads may use it.
    """

    def __init__(self, texts: Texts):
        from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
        from tokenizers import Tokenizer as Pipeline

        words = {word["content"]: word for word in json.loads(texts.get("added_tokens.json", "[]"))}
        numbers: dict[str, int] = json.loads(texts["vocab.json"])
        numbers |= {content: word["id"] for content, word in words.items()}  # else they would get the next ones
        merges = [tuple(line.split(" ")) for line in texts["merges.txt"].split("\n")[1:] if line]
        result: Any = Pipeline(
            models.BPE(
                vocab=numbers,
                merges=merges,  # type: ignore[arg-type]
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=END,
            )
        )
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        result.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
        result.pre_tokenizer = pre_tokenizers.Sequence([split, as_letters])
        start, end = ((mark, numbers[mark]) for mark in (START, END))
        result.post_processor = processors.RobertaProcessing(end, start, False, False)
        result.decoder = decoders.ByteLevel()
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for word in sorted(words.values(), key=lambda word: word["id"]):
            result.add_tokens([AddedToken(word["content"], **{flag: word[flag] for flag in flags})])
        for mark in (START, END):
            if mark not in words:
                result.add_special_tokens([AddedToken(mark, normalized=False, special=True)])
        self._pipeline = result
        self._added = set(result.get_added_tokens_decoder())
        self._rows: dict[int, list[int]] = {}  # the first token of an added word -> all of them
        for content, word in words.items():
            row = [word["id"]]
            while more := words.get(f"{content}_{len(row)}"):
                row.append(more["id"])
            self._rows[word["id"]] = row
        self._next = {a: b for row in self._rows.values() for a, b in pairwise(row)}
        self._names = {result.normalizer.normalize_str(content): word["id"] for content, word in words.items()}

    def ids(self, text: str) -> list[int]:
        """START, the tokens of the words, END."""
        return [number for group in self.groups(text) for number in group]

    def groups(self, text: str) -> list[list[int]]:
        """The same; the tokens of an added word of several are one group, and every other token is a group alone."""
        return [self._rows.get(number, [number]) for number in self._pipeline.encode(text).ids]

    def goes_on(self, ids: list[int]) -> list[bool]:
        """Whether the next of these tokens is one more of the same added word; False for the last."""
        return [self._next.get(number) == after for number, after in zip(ids, [*ids[1:], -1], strict=False)]

    def added(self, name: str) -> list[int] | None:
        """The tokens of an added word, written in capitals or not; None where there is no such word."""
        return self._rows.get(self._names.get(self._pipeline.normalizer.normalize_str(name), -1))

    def text_of(self, ids: list[int]) -> str:
        """The text that these tokens stand for, as far as tokens tell: in lower case, with other spaces."""
        ids = [number for before, number in zip([-1, *ids], ids, strict=False) if self._next.get(before) != number]
        return self._pipeline.decode(ids, skip_special_tokens=False).replace("</w>", " ").strip()

    def spellings(self, ids: list[int]) -> list[str]:
        """Each token as it is written in the vocabulary: "star</w>"."""
        return [self._pipeline.id_to_token(i) for i in ids]

    def ends(self, ids: list[int]) -> list[bool]:
        """Whether each token is the last one of a word: by its spelling, or as the last of a word that is added."""
        return [
            not more and (number in self._added or self._pipeline.id_to_token(number).endswith("</w>"))
            for number, more in zip(ids, self.goes_on(ids), strict=True)
        ]

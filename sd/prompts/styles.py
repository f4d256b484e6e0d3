"""Prompts with weights, of any length, in the dialects that people write: from a text to chunks of tokens.

    a1111   (a) is 1.1, [a] 1 / 1.1, (a:1.3) as it says; nested ones multiply; a backslash before a bracket makes it a
            letter, BREAK begins a chunk (modules/prompt_parser.py and sd_hijack_clip.py of stable-diffusion-webui)
    comfy   the same without [a] and BREAK; a number replaces what is around it (comfy/sd1_clip.py of ComfyUI)
    compel  a++ is 1.21, (a)1.3 as it says: compel.py

A chunk has 75 tokens between its start and its end, filled up with ends. Each is encoded alone. The tokens of an
added word of several (textual inversion) are never in two chunks.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .compel import Faded, compel_chunks
from .tokenizer import Tokenizer

STYLES = ("plain", "a1111", "comfy", "compel")
INSIDE = 75  # tokens of a chunk between start and end
MOST_CHUNKS = 64  # of a prompt: 4,800 tokens
MOST_NESTED = 100  # brackets one in the other
MOST_WEIGHT = 1000
BACK = 20  # tokens before the end of a chunk among which a comma ends it, in a1111
LARGE = 8  # tokens of a part that may be cut at the end of a chunk, in comfy

Weighted = list[tuple[str, float]]  # parts of a text, and their weights
Token = tuple[int, float]
BREAK = "BREAK"


@dataclass(frozen=True)
class Chunk:
    """Of a prompt: as many token numbers as the model reads, start and end among them, and their weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    faded: tuple[Faded, ...] = ()  # in compel


def chunks_of(text: str, style: str, tokenizer: Tokenizer, padding: int | None = None) -> list[Chunk]:
    """The chunks of a prompt in a style that has weights; one at least. Raises ValueError, in one sentence.

    padding: the token that fills a chunk up behind its end; None: the end.
    """
    if deepest(text) > MOST_NESTED:
        raise ValueError(f"A prompt must not nest more than {MOST_NESTED} brackets: take some out.")
    if word := next((group for group in tokenizer.groups(text) if len(group) > INSIDE), None):
        raise ValueError(
            f"The word {tokenizer.text_of(word)[:60]!r} has {len(word)} vectors, and a chunk has room for "
            f"{INSIDE}: leave it out, or take the prompt style plain."
        )
    if style == "compel":
        chunks = compel_chunks(text, tokenizer, INSIDE)
    else:
        plain = a1111_chunks(text, tokenizer) if style == "a1111" else comfy_chunks(text, tokenizer)
        chunks = [(part, ()) for part in plain]
    weights = (weight for part, _ in chunks for _, weight in part)
    if large := next((weight for weight in weights if not -MOST_WEIGHT <= weight <= MOST_WEIGHT), None):
        raise ValueError(f"A weight in the prompt is {large:g}: all must be from -{MOST_WEIGHT} to {MOST_WEIGHT}.")
    if len(chunks) > MOST_CHUNKS:
        raise ValueError(
            f"A prompt must have at most {MOST_CHUNKS} chunks of {INSIDE} tokens, not {len(chunks)}: shorten it."
        )
    start, end = tokenizer.ids("")
    fill = end if padding is None else padding
    return [
        Chunk(
            (start, *(i for i, _ in part), end, *[fill] * (INSIDE - len(part))),
            (1.0, *(weight for _, weight in part), *[1.0] * (INSIDE - len(part) + 1)),
            faded,
        )
        for part, faded in chunks
    ]


def deepest(text: str) -> int:
    """How many brackets are open at once at the most."""
    depth = most = 0
    for letter in text:
        depth = max(depth + (letter in "([") - (letter in ")]"), 0)
        most = max(most, depth)
    return most


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def weight_of(number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"The weight {number[:40]!r} in the prompt is no number: write one such as (word:1.2).")
    return weight


# ---- AUTOMATIC1111's

_MARKS = re.compile(
    r"\\[()\[\]\\]|\\"  # a letter by its backslash; a lone backslash, which vanishes
    r"|[(\[\])]"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)"
    r"|[^\\()\[\]:]+|:"
)
_INSIDE = r"(?:[^\[\]]|\[[^\[\]]*\])*"  # of square brackets, with at most one pair in them
_ELSEWHERE = {  # syntax of AUTOMATIC1111 that is not followed here -> how it is called
    rf"(?<!\\)\[{_INSIDE}:\s*[\d.]+\s*\]": "Prompt editing, [from:to:when],",
    rf"(?<!\\)\[{_INSIDE}\|{_INSIDE}\]": "Alternation, [one|other],",
    r"\bAND\b": "AND between prompts",
    r"<(?:lora|lyco|hypernet):[^<>]*>": "A network in the prompt, such as <lora:name:1>,",
}


def parse_a1111(text: str) -> Weighted:
    """Parts of a prompt with their weights; BREAK stands for itself, with a weight of -1. Raises ValueError."""
    for pattern, name in _ELSEWHERE.items():
        if found := re.search(pattern, text):
            raise ValueError(f"{name} is not followed here: take {found.group()[:60]!r} out of the prompt.")
    parts: list[list] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}  # where brackets that are still open began

    def multiply(start: int, factor: float) -> None:
        for part in parts[start:]:
            part[1] *= factor

    for mark in _MARKS.finditer(text):
        word, number = mark.group(), mark.group("weight")
        if word.startswith("\\"):
            parts.append([word[1:], 1.0])
        elif word in open_at:
            open_at[word].append(len(parts))
        elif number is not None and open_at["("]:
            multiply(open_at["("].pop(), weight_of(number))
        elif word == ")" and open_at["("]:
            multiply(open_at["("].pop(), 1.1)
        elif word == "]" and open_at["["]:
            multiply(open_at["["].pop(), 1 / 1.1)
        else:
            for k, piece in enumerate(re.split(r"\s*\bBREAK\b\s*", word)):
                parts += [[BREAK, -1.0]] if k else []
                parts.append([piece, 1.0])
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):  # what was never closed reaches to the end
        for start in open_at[bracket]:
            multiply(start, factor)
    merged: list[list] = []
    for part in parts:
        if merged and merged[-1][1] == part[1]:
            merged[-1][0] += part[0]
        else:
            merged.append(part)
    return [(piece, weight) for piece, weight in merged] or [("", 1.0)]


def a1111_chunks(text: str, tokenizer: Tokenizer) -> list[list[Token]]:
    """Where the last comma is near the end of a chunk, what follows it begins the next one."""
    comma = tokenizer.ids(",")[1:-1]
    chunks: list[list[Token]] = []
    now: list[Token] = []
    after_comma = 0  # of this chunk; 0: it has none
    for piece, weight in parse_a1111(text):
        if piece == BREAK and weight == -1:
            chunks.append(now)
            now, after_comma = [], 0
            continue
        for group in tokenizer.groups(piece)[1:-1]:
            if group == comma:
                after_comma = len(now) + 1
            elif len(now) == INSIDE and after_comma and len(now) - (after_comma - 1) <= BACK:
                chunks.append(now[:after_comma])
                now, after_comma = now[after_comma:], 0
            if len(now) + len(group) > INSIDE:
                chunks.append(now)
                now, after_comma = [], 0
            now += [(number, weight) for number in group]
    return [*chunks, now] if now or not chunks else chunks


# ---- ComfyUI's


def parse_comfy(text: str, weight: float = 1.0) -> Weighted:
    """Parts of a prompt with their weights. Raises ValueError for a weight that is not finite."""
    escaped = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    return [(part.replace("\0\1", ")").replace("\0\2", "("), w) for part, w in _weighted(escaped, weight)]


def _weighted(text: str, weight: float) -> Weighted:
    result: Weighted = []
    for part in _top_level(text):
        if not (len(part) > 1 and part[0] == "(" and part[-1] == ")"):
            result.append((part, weight))
            continue
        inside, factor = part[1:-1], weight * 1.1
        before, colon, number = inside.rpartition(":")
        if colon and before and is_number(number):
            factor, inside = weight_of(number), before
        result += _weighted(inside, factor)
    return result


def _top_level(text: str) -> list[str]:
    """The text cut at its outermost brackets, which stay on what is inside them."""
    parts, now, depth = [], "", 0
    for letter in text:
        if letter == "(":
            if depth == 0 and now:
                parts.append(now)
                now = ""
            now += letter
            depth += 1
        elif letter == ")":
            depth -= 1
            now += letter
            if depth == 0:
                parts.append(now)
                now = ""
        else:
            now += letter
    return [*parts, now] if now else parts


_EMBEDDING = re.compile(r"(?:^|(?<=[ \n]))embedding:(\S+)")


def comfy_parts(piece: str, tokenizer: Tokenizer) -> list[list[list[int]]]:
    """What lies between the embeddings of a piece, and these: groups of tokens. Raises ValueError.

    An added word may be written as embedding:NAME, with or without the ending of its file, as ComfyUI wants it.
    """
    parts = []
    for k, text in enumerate(_EMBEDDING.split(piece)):
        if k % 2 == 0:
            parts.append(tokenizer.groups(text)[1:-1])
            continue
        name = text.rstrip(",")
        short = re.sub(r"\.(pt|bin|safetensors)$", "", name)
        spelled = [f"{mark}{each}" for mark in ("embedding:", "") for each in (name, short)]
        word = next((found for each in spelled if (found := tokenizer.added(each))), None)
        if word is None:
            raise ValueError(
                f"The prompt has {f'embedding:{name}'[:60]!r}, and there is no such word: give its file with "
                "sd.textual_inversion (--embedding)."
            )
        parts += [[word], tokenizer.groups(text[len(name) :])[1:-1]]
    return parts


def comfy_chunks(text: str, tokenizer: Tokenizer) -> list[list[Token]]:
    """A part of one weight is kept together at the end of a chunk, unless it is long."""
    chunks: list[list[Token]] = []
    now: list[Token] = []
    for piece, weight in parse_comfy(text):
        for groups in comfy_parts(piece, tokenizer):
            size = sum(map(len, groups))
            large = size >= LARGE
            for group in groups:
                wanted = len(group) if large else size
                if len(now) + wanted > INSIDE:
                    chunks.append(now)
                    now = []
                now += [(number, weight) for number in group]
                size -= len(group)
    return [*chunks, now]

"""Prompts in the dialect of compel, which users of diffusers write: from a text to weighted parts, and to chunks.

    word++   (some words)++   "some words"++    1.1 for each plus; 0.9 for each minus
    (some words)1.3           "some words"1.3   a number, after brackets or quotes; nested weights multiply
    word.attend(1.3)                            the same in other words, and for a single word, too
    \\+  \\(  \\"                                  letters, and no syntax; only brackets and quotes lose the backslash

The grammar is that of prompt_parser.py of compel 2.5, the cutting and the masks that of its embeddings_provider.py.
What cannot be read as syntax is text up to the next space: "a.b++" weighs nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import groupby

from .tokenizer import Tokenizer

PLUS, MINUS = 1.1, 0.9
LEAST = 1e-5  # in place of smaller weights, for which the share of the encoding without the words would be infinite
ENDS = (r"\.</w>", r"[.,;:]</w>", r".*</w>")  # where a chunk may end, best first: a sentence, a phrase, a word

_SPACE, _SYNTAX = r" \t\r\n\v\f", r"()\",.+=-"  # other spaces than these are letters
_SPACES = re.compile(f"[{_SPACE}]*")
_WORD = re.compile(rf"(?:\\[{_SYNTAX}]|[+-](?![{_SPACE}{_SYNTAX}]|\Z)|[^{_SPACE}{_SYNTAX}])+")
_FREE = re.compile(f"[^{_SPACE}]+")
_QUOTED = re.compile(r'"((?:\\"|[^"\n\r])*)"')
_SIGNS = r"\++|-+"
_NUMBER = r"\d+\.\d*|\.\d+|[0-9]+"
_AFTER_WORD = re.compile(f"({_SIGNS})")
_AFTER_GROUP = re.compile(f"({_SIGNS}|{_NUMBER})")
_ATTEND = re.compile(rf"[{_SPACE}]*\.attend[{_SPACE}]*\([{_SPACE}]*({_SIGNS}|{_NUMBER})[{_SPACE}]*\)")
_ELSEWHERE = {  # syntax of compel that is not followed here -> how it is called
    r"(?<!\\)\.swap\s*\(": "Swapping words, a.swap(b),",
    r"(?<!\\)\.blend\s*\(": 'A blend of prompts, ("a", "b").blend(1, 1),',
    r"(?<!\\)\.(?:and|add)\s*\(": 'A conjunction of prompts, ("a", "b").and(),',
    r"\b(?:with|use)Lora\s*\(": "A network in the prompt, withLora(name, 1),",
}

Tree = list[str | tuple[float, "Tree"]]  # words, and what has a weight


@dataclass(frozen=True)
class Faded:
    """Tokens of a chunk with a weight below 1, from `start` to before `end`.

    So much of the chunk, `share`, is its encoding when no token sees these.
    """

    start: int
    end: int
    share: float


Part = tuple[list[tuple[int, float]], tuple[Faded, ...]]  # tokens with their weights, and what is faded


# ---- from a text to weighted parts


def parse_compel(text: str) -> list[tuple[str, float]]:
    """Parts of a prompt with their weights; neighbours of one weight are one part. Raises ValueError."""
    for pattern, name in _ELSEWHERE.items():
        if found := re.search(pattern, text):
            raise ValueError(f"{name} is not followed here: take {found.group()[:60]!r} out of the prompt.")
    leaves = _leaves(_Reader(re.sub(r",(\S)", r", \1", text)).whole(), 1.0)
    parts = [([piece for piece, _ in part], weight) for weight, part in groupby(leaves, lambda leaf: leaf[1])]
    return [(_joined(pieces), weight) for pieces, weight in parts] or [("", 1.0)]


def _joined(pieces: list[str]) -> str:
    return pieces[0] if len(pieces) == 1 else re.sub(r"\\+(?=[()\"])", "", " ".join(pieces))


def _leaves(tree: Tree, scale: float) -> list[tuple[str, float]]:
    result = []
    for node in tree:
        if isinstance(node, str):
            result.append((_letters(_letters(node)), scale))  # twice, as there: it matters to "\\\\("
        else:
            result += _leaves(node[1], scale * node[0])
    return result


def _letters(text: str) -> str:
    return text.replace("\\(", "(").replace("\\)", ")").replace('\\"', '"')


def _weight(by: str) -> float:
    """Of "++", "-" or "1.3"."""
    if by[0] in "+-":
        return (PLUS if by[0] == "+" else MINUS) ** min(len(by), 1000)
    return float(by)


class _Reader:
    """Reads one text. A method is given a place in it, and says what is there and where that ends; None: nothing."""

    def __init__(self, text: str):
        self.text = text
        self._groups: dict[int, tuple[Tree, int] | None] = {}  # for these are tried more than once

    def whole(self) -> Tree:
        """All of the text: what is no syntax is a word."""
        tree: Tree = []
        at = self.after_space(0)
        while at < len(self.text):
            found = self.weighted(at) or self.group(at)
            if found is None:
                word = _FREE.match(self.text, at)
                assert word is not None
                found = [word.group()], word.end()
            tree += found[0]
            at = self.after_space(found[1])
        return tree

    def inside(self, at: int) -> tuple[Tree, int]:
        """As much as there may be in brackets and quotes: a sign that weighs nothing may not."""
        tree: Tree = []
        at = self.after_space(at)
        while at < len(self.text):
            found = self.weighted(at) or self.group(at) or self.word(at)
            if found is None and self.text[at] in ",.":
                found = [self.text[at]], at + 1
            if found is None:
                break
            tree += found[0]
            at = self.after_space(found[1])
        return tree, at

    def weighted(self, at: int) -> tuple[Tree, int] | None:
        group = self.group(at)
        target = group or self.word(at)
        if target is None:
            return None
        tree, end = target
        by = _ATTEND.match(self.text, end) or (_AFTER_GROUP if group else _AFTER_WORD).match(self.text, end)
        return ([(_weight(by[1]), tree)], by.end()) if by else None

    def word(self, at: int) -> tuple[Tree, int] | None:
        word = _WORD.match(self.text, at)
        return ([word.group()], word.end()) if word else None

    def group(self, at: int) -> tuple[Tree, int] | None:
        """In brackets or quotes."""
        if at not in self._groups:
            self._groups[at] = {"(": self._brackets, '"': self._quotes}.get(self.text[at], lambda _: None)(at)
        return self._groups[at]

    def _brackets(self, at: int) -> tuple[Tree, int] | None:
        tree, end = self.inside(at + 1)
        return (tree, end + 1) if self.text[end : end + 1] == ")" else None

    def _quotes(self, at: int) -> tuple[Tree, int] | None:
        quoted = _QUOTED.match(self.text, at)
        if quoted is None:
            return None
        text = re.sub(r"\\[tnr]", " ", quoted[1]).replace('\\"', '"').replace('"', '\\"')  # no quotes in quotes
        tree, end = _Reader(text).inside(0)
        return ((tree or [""]), quoted.end()) if end == len(text) else None

    def after_space(self, at: int) -> int:
        space = _SPACES.match(self.text, at)
        return space.end() if space else at


# ---- from parts to chunks


def compel_chunks(text: str, tokenizer: Tokenizer, inside: int) -> list[Part]:
    """Tokens with their weights, at most `inside` a chunk, and what is faded in it.

    Where more follow, a chunk ends after its last sentence, else after its last phrase, else after its last word.
    """
    tokens: list[tuple[int, float]] = []
    faded: list[tuple[int, int, float]] = []  # from a token, to before another, by how much
    for piece, weight in parse_compel(text):
        ids = tokenizer.ids(piece)[1:-1]
        if weight < 1 and ids:
            faded.append((len(tokens), len(tokens) + len(ids), math.tan((1 - max(weight, LEAST)) * math.pi / 2)))
        tokens += [(number, weight) for number in ids]
    more = tokenizer.goes_on([number for number, _ in tokens])
    whole = 1 + sum(strength for *_, strength in faded)
    chunks: list[Part] = []
    start = 0
    while not chunks or start < len(tokens):
        now = tokens[start : start + inside]
        if start + inside < len(tokens):
            now = now[: _cut(tokenizer.spellings([number for number, _ in now]), more[start : start + inside])]
        end = start + len(now)
        here = [
            # One that goes on in the next chunk hides what fills up this one as well, but for the last of it.
            Faded(max(first - start, 0) + 1, inside + 1 if last > end else last - start + 1, strength / whole)
            for first, last, strength in faded
            if first < end and last > start
        ]
        chunks.append((now, tuple(here)))
        start = end
    return chunks


def _cut(spellings: list[str], more: list[bool]) -> int:
    """How many of these tokens stay together, when others follow. more: after which no added word must be cut."""
    allowed = [(k, spelling) for k, spelling in enumerate(spellings, 1) if not more[k - 1]]
    for pattern in ENDS:
        if found := [k for k, spelling in allowed if re.fullmatch(pattern, spelling, re.DOTALL)]:
            return found[-1]
    return allowed[-1][0]

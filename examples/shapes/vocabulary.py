"""The tokenizer of the world of shapes: CLIP's own byte-pair encoding over the words of its captions."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

from scenes import COLOURS, RELATIONS, SHAPES

WORDS = sorted(
    {"a", "an", "on", "background", "large", "small", *COLOURS, *SHAPES}
    | {word for relation in RELATIONS for word in relation.split()}
)


def byte_alphabet() -> list[str]:
    """The printable stand-ins for the 256 bytes, in CLIP's order (bytes_to_unicode of openai/CLIP)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(256 - len(kept))]


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding, learned until every word is one token (Sennrich et al. 2015, arXiv:1508.07909)."""
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(s) > 1 for s in spellings):
        pairs = Counter(pair for s in spellings for pair in pairwise(s))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for s in spellings:
            i = 0
            while i < len(s) - 1:
                if (s[i], s[i + 1]) == best:
                    s[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def tokenizer_files() -> dict[str, str]:
    """The texts of vocab.json and merges.txt, in CLIP's form. The end of text is the last id, as in CLIP."""
    letters = byte_alphabet()
    merges = byte_pair_merges(WORDS)
    tokens = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n",
    }

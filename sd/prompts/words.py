"""The words of a prompt, and where their tokens stand among the 77."""

from __future__ import annotations

from .encoder import TextEncoder


def token_ids(text: TextEncoder, prompt: str) -> list[int]:
    """The tokens of a prompt with start and end, cut as the encoder cuts it, not filled up."""
    return text.cut(text.ids(prompt))


def words_of(text: TextEncoder, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt in order, each with the positions of its tokens: [("a", [1]), ("red", [2]), ...]."""
    result: list[tuple[str, list[int]]] = []
    word: list[int] = []
    ids = token_ids(text, prompt)[:-1]
    ends = text.tokenizer.ends(ids)
    for i in range(1, len(ids)):  # after the start
        word.append(i)
        if ends[i] or i == len(ids) - 1:
            result.append((text.tokenizer.text_of([ids[k] for k in word]), word))
            word = []
    return result


def find_word(text: TextEncoder, prompt: str, word: str, occurrence: int | None = None) -> list[int]:
    """Where the tokens of a word, or of several that follow each other, stand among the 77 of a prompt.

    occurrence: which one, from 0, where it is there more than once; all of them if not given.
    Raises ValueError where the prompt does not have it, or not so often.
    """
    ids, wanted = token_ids(text, prompt)[1:-1], text.ids(word, "word")[1:-1]
    ends = text.tokenizer.ends(ids)
    found = [
        list(range(i + 1, i + 1 + len(wanted)))
        for i in range(len(ids))
        if wanted and ids[i : i + len(wanted)] == wanted and (i == 0 or ends[i - 1])
    ]
    if not found or (occurrence is not None and not 0 <= occurrence < len(found)):
        often = f"{word!r} {len(found)} times (count them from 0)" if found else f"no {word!r}"
        raise ValueError(f"The prompt {prompt!r} has {often}: give a word of it as it is written there.")
    return [i for places in found for i in places] if occurrence is None else found[occurrence]

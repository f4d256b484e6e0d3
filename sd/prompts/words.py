"""The words of a prompt, and where their tokens stand among the 77 of each of its chunks."""

from __future__ import annotations

from .encoder import TextEncoder


def tokens_inside(text: TextEncoder, prompt: str, style: str = "plain") -> list[tuple[int, int]]:
    """The tokens of the words that the model reads, as (position, number): without starts and ends."""
    found, end = [], text.ids("")[-1]
    for k, chunk in enumerate(text.chunks(prompt, style)):
        length, behind = len(chunk.ids), (end, chunk.ids[-1])  # SD 2 fills up with another token
        inside = length - 1
        while inside > 1 and chunk.ids[inside - 1] in behind:
            inside -= 1
        found += [(k * length + i, chunk.ids[i]) for i in range(1, inside)]
    return found


def words_of(text: TextEncoder, prompt: str, style: str = "plain") -> list[tuple[str, list[int]]]:
    """The words of a prompt in order, each with the positions of its tokens: [("a", [1]), ("red", [2]), ...]."""
    result: list[tuple[str, list[int]]] = []
    word: list[tuple[int, int]] = []
    tokens = tokens_inside(text, prompt, style)
    ends = text.tokenizer.ends([number for _, number in tokens])
    for i, token in enumerate(tokens):
        word.append(token)
        if ends[i] or i == len(tokens) - 1:
            result.append((text.tokenizer.text_of([number for _, number in word]), [place for place, _ in word]))
            word = []
    return result


def find_word(
    text: TextEncoder, prompt: str, word: str, occurrence: int | None = None, style: str = "plain"
) -> list[int]:
    """Where the tokens of a word, or of several that follow each other, stand: 0 is the start of the first chunk.

    occurrence: which one, from 0, where it is there more than once; all of them if not given.
    Raises ValueError where the prompt does not have it, or not so often.
    """
    wanted, tokens = text.ids(word, "word")[1:-1], tokens_inside(text, prompt, style)
    places, numbers = [place for place, _ in tokens], [number for _, number in tokens]
    ends = text.tokenizer.ends(numbers)
    found = [
        places[i : i + len(wanted)]
        for i in range(len(numbers))
        if wanted and numbers[i : i + len(wanted)] == wanted and (i == 0 or ends[i - 1])
    ]
    if not found or (occurrence is not None and not 0 <= occurrence < len(found)):
        often = f"{word!r} {len(found)} times (count them from 0)" if found else f"no {word!r}"
        raise ValueError(f"The prompt {prompt!r} has {often}: give a word of it as it is written there.")
    return [i for places in found for i in places] if occurrence is None else found[occurrence]

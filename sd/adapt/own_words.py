"""`textual_inversion`: a model that knows a word more, whose meaning comes from a file (arXiv:2208.01618).

A word of several vectors is several tokens in a row, "<cat>", "<cat>_1", "<cat>_2", as diffusers writes them down.
So a saved model has its tokenizer and its embedding in plain forms.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import shown
from ..model import StableDiffusion
from ..prompts.encoder import TextEncoder
from ..prompts.tokenizer import END, START
from ..text import CLIPText, Texts
from ..weights.checkpoint import read
from ..weights.configs import LoadError
from ..weights.embeddings import Word, bundles_words, read_words
from ..weights.tokenizer import ADDED, PLAIN, check_added
from ..weights.unread import patches_of, sharing, target


class LongerEmbedding(nn.Embedding):
    """An embedding whose table is in two pieces: `weight` (n, C), which another model may share, and `more` (k, C).

    For state_dict, load_state_dict and `sd.save` it is one table (n + k, C) called weight.
    """

    pieces = ("weight", "more")

    def __init__(self, weight: Tensor, more: Tensor):
        number, width = weight.shape
        super().__init__(number, width, _weight=weight.detach(), _freeze=True)
        self.weight = weight  # the same parameter, so that it is read once for both
        self.more = nn.Parameter(more, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., C)"""
        return self.rows(ids, self.weight.dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The same in another dtype than the table's."""
        known = len(self.weight)
        rows = F.embedding(ids.clamp(max=known - 1), self.weight).to(dtype)
        more = F.embedding((ids - known).clamp(min=0), self.more).to(dtype)
        return torch.where((ids < known)[..., None], rows, more)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        table = torch.cat([self.weight, self.more])
        destination[f"{prefix}weight"] = table if keep_vars else table.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        table, sizes = state_dict.get(f"{prefix}weight"), [len(self.weight), len(self.more)]
        if table is not None and len(table) == sum(sizes):
            state_dict = state_dict | {
                f"{prefix}{name}": t for name, t in zip(self.pieces, table.split(sizes), strict=True)
            }
        super()._load_from_state_dict(state_dict, prefix, *rest)


def textual_inversion(
    model: StableDiffusion, path: str | os.PathLike[str], *, word: str | None = None
) -> StableDiffusion:
    """A model that knows the words of a textual inversion file; `model` stays as it is, and shares its weights.

    path   of AUTOMATIC1111 (.pt with string_to_param), of diffusers ({word: vectors}), a .safetensors file with
           emb_params, or a LoRA file that brings words (bundle_emb)
    word   what to call it in prompts; if not given, as the file says, and as the file is called, without its ending

    A word may have up to 75 vectors, which are so many tokens in a row, and are never in two chunks of a prompt. A
    word that begins or ends with a letter is found as a whole word only; capitals do not matter. The tokenizer is
    looked for now.

    Raises LoadError, a ValueError, for files of SDXL and of no known form, vectors of another width or that are not
    finite, and a word that there is already.
    """
    words = read_words(path)
    if word is not None:
        if len(words) > 1:
            raise LoadError(
                f"{path} has {len(words)} words, which cannot all be called {shown(word)}: leave word= out."
            )
        words = [Word(word, words[0].vectors)]
    width = model.text.config.hidden_size
    for each in words:
        if each.vectors.shape[1] != width:
            raise LoadError(
                f"{path} has vectors of {each.vectors.shape[1]} numbers for the word {shown(each.name)}, and the "
                f"text encoder of this model has {width}: give an embedding that was made for a model of this kind."
            )
    texts, first = dict(model.text.texts), model.text.config.vocab_size
    added = Added(texts, first, str(path))
    for each in words:
        added.add(each)
    longer = longer_text(model.text.model, torch.cat(added.rows))
    known = model.text.known_words
    if known is not None:  # the letters of these words are no strangers to the model now
        known = known | {part for name in added.names for part in re.findall("[a-z]+", name.lower())}
    texts[ADDED] = json.dumps(added.entries, ensure_ascii=False)
    try:
        check_added(longer.config.vocab_size, texts)
    except ValueError as error:
        raise LoadError(f"{path} has a word that cannot be added: {error}; call it otherwise with word=.") from None
    return model.with_parts(model.unet, model.vae, TextEncoder(longer, texts, known))


def with_words_of_lora(model: StableDiffusion) -> StableDiffusion:
    """A model to which `sd.lora` has just added a LoRA, with the words that its file brings (bundle_emb), if any."""
    path = model.adapters[-1].file.path
    return textual_inversion(model, path) if bundles_words(read(path).tensors) else model


def longer_text(model: CLIPText, more: Tensor) -> CLIPText:
    """A text encoder that shares all weights with `model`, and has these rows (k, C) more in its embedding."""

    def lengthen(copied: CLIPText) -> None:
        before = copied.embeddings.token_embedding
        rows = more if target(model) else more.to(before.weight)  # an unread model is converted when it is read
        if isinstance(before, LongerEmbedding):
            rows = torch.cat([before.more.detach(), rows])
        copied.embeddings.token_embedding = LongerEmbedding(before.weight, rows).eval()
        copied.config = replace(model.config, vocab_size=model.config.vocab_size + len(more))

    return sharing(model, patches_of(model), lengthen)


class Added:
    """The words beside a vocabulary: `entries` as in added_tokens.json; `rows` and `names` of the new ones."""

    def __init__(self, texts: Texts, first: int, path: str):
        self.vocabulary: dict[str, int] = json.loads(texts["vocab.json"])
        self.entries: list[dict[str, Any]] = json.loads(texts.get(ADDED, "[]"))
        self.first, self.path = first, path
        self.rows: list[Tensor] = []
        self.names: list[str] = []

    def add(self, word: Word) -> None:
        """With the other names that the word may have. Raises LoadError for a word that is there already."""
        self.add_named(word.name, word.vectors)
        for other in word.also:
            plain = plainly(other)
            if not plain or plain == plainly(word.name):
                continue
            if f"{plain}</w>" in self.vocabulary:  # prompts are full of it, and do not mean this
                other = f"embedding:{other}"  # as one may write it in ComfyUI's style
            try:
                self.add_named(other, word.vectors)
            except LoadError:
                warnings.warn(
                    f"{self.path} is called {shown(word.name)} in prompts, not {shown(other)}: that is another word.",
                    stacklevel=4,
                )

    def add_named(self, name: str, vectors: Tensor) -> None:
        plain, taken = plainly(name), {plainly(entry["content"]) for entry in self.entries}
        if not plain or plain in (START, END):
            raise LoadError(f"{self.path} gives no word that could stand in a prompt: give it one with word=.")
        # One token more than there are vectors: it would be read as the next of them.
        if clash := next((t for i in range(len(vectors) + 1) if (t := numbered(plain, i)) in taken), None):
            raise LoadError(
                f"{self.path} needs the word {shown(clash)}, and there is an embedding of that word already: leave "
                "one of them out."
            )
        base, _, number = plain.rpartition("_")
        if base in taken and number.isdecimal() and (number == "1" or numbered(base, int(number[:9]) - 1) in taken):
            raise LoadError(
                f"{self.path} has the word {shown(name)}, which would be read as one more vector of the word "
                f"{shown(base)}, which is there already: leave one of them out."
            )
        content = " ".join(name.split())
        if (
            content in self.vocabulary
        ):  # longer tokens of a vocabulary have no capitals, and to write them is the same
            content = content.upper()
        if content in self.vocabulary:
            raise LoadError(
                f"{self.path} has the word {shown(name)}, which is a letter or a sign of its own: call it otherwise, "
                "by word= or by another name of the file."
            )
        whole = bool(re.search(r"^\w|\w$", content))
        flags = PLAIN | {"normalized": True, "special": False, "single_word": whole}
        for i, row in enumerate(vectors):
            self.entries.append({"id": self.first + len(self.rows), "content": numbered(content, i), **flags})
            self.rows.append(row[None])
        self.names.append(content)


def numbered(word: str, i: int) -> str:
    """The i-th token of a word, as diffusers calls it."""
    return f"{word}_{i}" if i else word


def plainly(word: str) -> str:
    """A word as the tokenizer compares it: in small letters."""
    return " ".join(unicodedata.normalize("NFC", word).split()).lower()

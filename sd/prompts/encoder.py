"""From prompts to embeddings: a tokenizer and a text encoder together."""

from __future__ import annotations

import copy
import re
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from reprlib import repr as short  # of a prompt of megabytes, too

import torch
from torch import Tensor

from ..text import CLIPText, TextConfig, Texts, own_names
from .tokenizer import Tokenizer, sound_tokenizer

LONGEST = 100_000  # characters of a prompt, of which the model reads some hundreds

_MAKING = threading.RLock()


class TextEncoder:
    """Prompts to embeddings.

    model        from tokens to embeddings
    texts        those of CLIP's vocab.json and merges.txt, by these names, and of added_tokens.json where there are
                 words beside these: a list as "added_tokens" in a tokenizer.json, checked by `sd.weights.tokenizer`;
                 or a function that gives them, called when a text is first encoded
    known_words  all words that the model was trained on, if they are few: others get a warning

    Several threads may use one encoder. Raises ValueError where the texts are no tokenizer of this model.
    """

    def __init__(
        self,
        model: CLIPText,
        texts: Texts | Callable[[], Texts],
        known_words: Collection[str] | None = None,
    ):
        self.model, self.config = model, model.config
        self.known_words = frozenset(known_words) if known_words is not None else None
        self._find = texts if callable(texts) else None
        self._texts = None if callable(texts) else sound_tokenizer(self.config.vocab_size, texts)
        self._tokenizer: Tokenizer | None = None

    def with_model(self, model: CLIPText) -> TextEncoder:
        """This tokenizer, before another model of the same sizes: a copy of `model` that streams weights, say."""
        with _MAKING:
            result = copy.copy(self)
        result.model = model
        return result

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TextEncoder:
        """An encoder of the same sizes, tokenizer and words, with these weights."""
        return self.with_model(text_model(self.config, tensors))

    @property
    def texts(self) -> Texts:
        """Those of the tokenizer, by file. Raises ValueError where they cannot be found, or do not fit."""
        with _MAKING:
            if self._texts is None:
                assert self._find is not None
                texts = self._find()
                try:
                    self._texts = sound_tokenizer(self.config.vocab_size, texts)
                except ValueError as error:
                    remedy = "give another as tokenizer= (--tokenizer)"
                    raise ValueError(f"The tokenizer does not fit the text encoder: {error}; {remedy}.") from None
            return self._texts

    @property
    def tokenizer(self) -> Tokenizer:
        """Made when it is first used."""
        with _MAKING:  # two threads may encode first
            if self._tokenizer is None:
                self._tokenizer = Tokenizer(self.texts)
            return self._tokenizer

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under our names, where and in what they are computed with."""
        return self.model.state_dict()

    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """One prompt or several -> (B, 77, C): the last hidden state after the final LayerNorm.

        As StableDiffusionPipeline.encode_prompt of diffusers: each prompt is filled up or cut to 77 tokens,
        and no attention mask is used. Warns (UserWarning) of what is cut off, with the words, and of words
        that are not among `known_words`. Raises ValueError for what is not text.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError(f"A prompt must be a text, or a list of texts, not {short(prompts)}.")
        length = self.config.max_position_embeddings
        rows = []
        for text in texts:
            ids = self.ids(text)
            self._warn(text, ids)
            rows.append(self.cut(ids) + ids[-1:] * (length - len(ids)))
        return self.model(torch.tensor(rows))

    def ids(self, text: str, what: str = "prompt") -> list[int]:
        """The tokens of a text: START, those of the words, END; neither cut nor filled up. Raises ValueError."""
        if not isinstance(text, str):
            raise ValueError(f"A {what} must be a text, not {short(text)}.")
        if len(text) > LONGEST:
            raise ValueError(f"A {what} must have at most {LONGEST:,} characters, not {len(text):,}: shorten it.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"A {what} must be valid Unicode, not {short(text)}.") from error
        return self.tokenizer.ids(text)

    def cut(self, ids: list[int]) -> list[int]:
        """As many of these as the model reads, the last one END."""
        return ids[:-1][: self.config.max_position_embeddings - 1] + ids[-1:]

    def _warn(self, text: str, ids: list[int]) -> None:
        length = self.config.max_position_embeddings
        if len(ids) > length:
            dropped = self.tokenizer.text_of(ids[length - 1 : -1])[:1000]
            warnings.warn(f'The prompt is cut after {length - 2} tokens; dropped: "{dropped}".', stacklevel=4)
        if self.known_words is not None:
            words = dict.fromkeys(re.findall("[a-z]+", text.lower()))  # each once, in order
            unknown = [f'"{word}"' for word in words if word not in self.known_words]
            if unknown:
                warnings.warn(
                    f"This model was not trained on {', '.join(unknown)[:1000]} and will not draw that as you "
                    "mean it; choose one that was with --model (in Python: sd.load), such as --model sd-v1-4.ckpt.",
                    stacklevel=4,
                )


def text_model(config: TextConfig, tensors: Mapping[str, Tensor]) -> CLIPText:
    """A text encoder of these tensors, which it shares; the names of either age of transformers are understood."""
    with torch.device("meta"):
        model = CLIPText(config)
    model.load_state_dict(own_names(tensors), strict=True, assign=True)
    return model.eval().requires_grad_(False)

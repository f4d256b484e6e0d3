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
from .arguments import common_length
from .styles import STYLES, Chunk, chunks_of
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

    def encode(
        self, prompts: str | Sequence[str], prompt_style: str = "plain", clip_skip: int | None = None
    ) -> Tensor:
        """One prompt or several -> (B, 77k, C): the last hidden state after the final LayerNorm.

        prompt_style  "plain", as StableDiffusionPipeline.encode_prompt of diffusers: each prompt is filled up or cut
                      to 77 tokens, and no attention mask is used. "a1111", "comfy", "compel": with weights, in
                      chunks of 77 (styles.py); a prompt of fewer chunks than another is repeated, which attention
                      does not see
        clip_skip     so many of the last layers are left out; 1 is what AUTOMATIC1111 calls 2

        Warns (UserWarning) of what is cut off, with the words, and of words that are not among `known_words`. Raises
        ValueError for what is not text, and for a style and a number of layers that there are not.
        """
        skip = checked_skip(clip_skip, self.config.num_hidden_layers)
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError(f"A prompt must be a text, or a list of texts, not {short(prompts)}.")
        parts = [self.chunks(text, prompt_style) for text in texts]
        for text in texts:
            if prompt_style == "plain":
                self._warn_of_what_is_cut(text)
            self._warn_of_unknown_words(text)
        each = [chunk for chunks in parts for chunk in chunks]
        z = self.model(torch.tensor([chunk.ids for chunk in each]), skip)  # (all chunks, 77, C)
        if prompt_style != "plain":
            z = self._with_faded(z, each, skip)
            weights = torch.tensor([chunk.weights for chunk in each], dtype=torch.float64)[..., None].to(z)
            empty = None if prompt_style == "a1111" else self.model(torch.tensor([self.chunks("")[0].ids]), skip)
            z = weighted(z, weights, empty)
        return of_one_length([part.flatten(0, 1)[None] for part in z.split([len(chunks) for chunks in parts])])

    def _with_faded(self, z: Tensor, chunks: Sequence[Chunk], skip: int) -> Tensor:
        """Chunks (N, 77, C) moved towards their encodings in which no token sees those that are faded."""
        todo = [(k, faded) for k, chunk in enumerate(chunks) for faded in chunk.faded]
        result = list(z)
        for first in range(0, len(todo), len(chunks)):  # as many at once as before: it takes no more memory
            part = todo[first : first + len(chunks)]
            rows = torch.tensor([chunks[k].ids for k, _ in part])
            heard = torch.ones_like(rows, dtype=torch.bool)
            for row, (_, faded) in zip(heard, part, strict=True):
                row[faded.start : faded.end] = False
            for (k, faded), without in zip(part, self.model(rows, skip, heard), strict=True):
                result[k] = result[k] + faded.share * (without - z[k])
        return torch.stack(result)

    def chunks(self, text: str, prompt_style: str = "plain") -> list[Chunk]:
        """The tokens of a text as the model reads them, in chunks of 77; one where the style is plain.

        Raises ValueError for what is no text, or cannot be read in that style.
        """
        if prompt_style not in STYLES:
            known = f"{', '.join(STYLES[:-1])} or {STYLES[-1]}"
            raise ValueError(f"prompt_style must be {known}, not {short(prompt_style)}.")
        ids = self.ids(text)
        if prompt_style != "plain":
            return chunks_of(text, prompt_style, self.tokenizer, self.config.padding)
        length = self.config.max_position_embeddings
        fill = ids[-1] if self.config.padding is None else self.config.padding
        return [Chunk((*self.cut(ids), *[fill] * (length - len(ids))), (1.0,) * length)]

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

    def _warn_of_what_is_cut(self, text: str) -> None:
        ids, length = self.ids(text), self.config.max_position_embeddings
        if len(ids) > length:
            dropped = self.tokenizer.text_of(ids[length - 1 : -1])[:1000]
            warnings.warn(f'The prompt is cut after {length - 2} tokens; dropped: "{dropped}".', stacklevel=4)

    def _warn_of_unknown_words(self, text: str) -> None:
        if self.known_words is not None:
            words = dict.fromkeys(re.findall("[a-z]+", text.lower().replace("embedding:", "")))  # each once, in order
            unknown = [f'"{word}"' for word in words if word not in self.known_words]
            if unknown:
                warnings.warn(
                    f"This model was not trained on {', '.join(unknown)[:1000]} and will not draw that as you "
                    "mean it; choose one that was with --model (in Python: sd.load), such as --model sd-v1-4.ckpt.",
                    stacklevel=4,
                )


def checked_skip(clip_skip: int | None, layers: int) -> int:
    """Raise ValueError unless at least one layer is left."""
    if clip_skip is None:
        return 0
    if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip < layers:
        raise ValueError(f"clip_skip must be a whole number from 0 to {layers - 1}, not {clip_skip!r}.")
    return clip_skip


def weighted(z: Tensor, weights: Tensor, empty: Tensor | None) -> Tensor:
    """Chunks (N, 77, C) with the weights of their tokens (N, 77, 1).

    As AUTOMATIC1111: multiplied, and scaled so that the mean of each chunk is as before. With `empty`, the chunk of
    no words, as ComfyUI and compel: its distance from that is multiplied.
    """
    if empty is not None:
        return torch.where(weights == 1, z, (z - empty) * weights + empty)
    result = z * weights
    return result * (z.mean((1, 2), keepdim=True) / result.mean((1, 2), keepdim=True))


def of_one_length(contexts: Sequence[Tensor]) -> Tensor:
    """Contexts (B, 77k, C) of several lengths, one below the other: each repeated up to a length that all divide.

    That is exact: a softmax over twice the same keys gives each half of the weight, and the same sum of values.
    """
    length = common_length([context.shape[1] for context in contexts])
    return torch.cat([context.repeat(1, length // context.shape[1], 1) for context in contexts])


def text_model(config: TextConfig, tensors: Mapping[str, Tensor]) -> CLIPText:
    """A text encoder of these tensors, which it shares; the names of either age of transformers are understood."""
    with torch.device("meta"):
        model = CLIPText(config)
    model.load_state_dict(own_names(tensors), strict=True, assign=True)
    return model.eval().requires_grad_(False)

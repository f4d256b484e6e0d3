"""Who listens to whom in a text: the text encoder's own self-attention, for one prompt.

Computed, as `attention_maps` does, from the very queries and keys that the encoder's layers attend with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..model import StableDiffusion
from ..prompts.encoder import checked_skip
from ..prompts.words import find_word, words_of
from .around import around_attention, attentions, probabilities
from .calls import model_of
from .maps import Index, indices


class TextAttention:
    """What `text_attention` found.

    layers   names of the encoder's attentions, as `edit` knows them: "text.encoder.layers.0.self_attn"
    """

    def __init__(self, model: StableDiffusion, prompt: str, style: str, maps: dict[str, Tensor]):
        self._model, self._prompt, self._style = model, prompt, style
        self._maps = maps  # layer -> (chunks, heads, 77, 77)

    @property
    def layers(self) -> list[str]:
        return list(self._maps)

    def words(self) -> list[tuple[str, list[int]]]:
        """The words of the prompt in order, each with the positions of its tokens; 0 is the start of the text."""
        return words_of(self._model.text, self._prompt, self._style)

    def probabilities(self, layer: str, *, head: Index = None) -> Tensor:
        """(chunks, 77, 77): the mean over the heads chosen, of one layer by its full name.

        A row is a token that listens, and sums to 1; a column is one that is heard. None hears those after it.
        """
        maps = self._maps[self._select(layer)[0]]
        try:
            return maps[:, slice(None) if head is None else indices(head)].mean(1)
        except IndexError:
            raise ValueError(f"There are heads 0 to {maps.shape[1] - 1} in {layer}, not {head}.") from None

    def word(self, word: str, *, layer: str = "*", head: Index = None, occurrence: int | None = None) -> Tensor:
        """(77k,): how much of the attention of a word, or of several in a row, goes to each token; its sum is 1.

        layer        a pattern over names; the mean over all layers that it matches
        head         a number or several; the mean over them, or over all
        occurrence   which one, from 0, where the prompt has the word more than once; all of them if not given

        Chunks are encoded alone, so all of it goes to tokens of the word's own. Raises ValueError where the prompt
        has no such word, and for a layer and a head that there are not.
        """
        places = find_word(self._model.text, self._prompt, word, occurrence, self._style)
        chosen = [self.probabilities(name, head=head) for name in self._select(layer)]
        rows = torch.block_diag(*torch.stack(chosen).mean(0))  # (77k, 77k)
        return rows[places].mean(0)

    def _select(self, pattern: str) -> list[str]:
        if found := [name for name in self._maps if fnmatchcase(name, pattern)]:
            return found
        raise ValueError(f"No layer {pattern!r} of the text encoder was called: there are {', '.join(self._maps)}.")


@torch.no_grad()
def text_attention(
    model: Any, prompt: str, *, prompt_style: str = "plain", clip_skip: int | None = None
) -> TextAttention:
    """Encode a prompt, and keep the probabilities of the text encoder's self-attention.

        heard = text_attention(model, "a red star above a blue ring")
        heard.word("ring")[heard.words()[1][1]].sum()  # how much "ring" listens to "red"

    model         from `sd.load`, or a sampler
    prompt        one text; what else there is of a call does not reach the text encoder
    prompt_style, clip_skip   as of a sampler. Of "compel" these are the maps in which all words are heard

    Within `edit`, the maps are of what is edited. Float32, or float64 where the model is; for Stable Diffusion v1
    3.4 MB a chunk. Raises ValueError as `encode_prompt` does.
    """
    model = model_of(model)
    text, maps = model.text, {}
    skip = checked_skip(clip_skip, text.config.num_hidden_layers)
    tokens = torch.tensor([chunk.ids for chunk in text.chunks(prompt, prompt_style)])

    def keeper(name: str) -> Callable[[Tensor, Tensor], None]:
        def look(q: Tensor, k: Tensor) -> None:
            dtype = torch.promote_types(q.dtype, torch.float32)
            maps[name] = probabilities(q.to(dtype), k.to(dtype), causal=True)

        return look

    model.check_file()
    with ExitStack() as stack:
        for name, module in attentions(text.model):
            stack.enter_context(around_attention(module, look=keeper(f"text.{name}")))
        text.model(tokens, skip)
    return TextAttention(model, prompt, prompt_style, maps)

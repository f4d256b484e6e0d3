"""Tokenizer and CLIP text encoder: transformers' own, imported on first use.

Stable Diffusion v1 reads the last hidden state of CLIP ViT-L/14's text model (arXiv:2103.00020), after the
final LayerNorm, of 77 tokens, with no mask over the padding.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TOKENIZER_FILES = ("vocab.json", "merges.txt")


def make_tokenizer(files: Mapping[str, str]) -> Any:
    """transformers' CLIPTokenizer from the texts of vocab.json and merges.txt."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in TOKENIZER_FILES]
        for path in paths:
            path.write_text(files[path.name], encoding="utf-8")
        return CLIPTokenizer(*map(str, paths))


def make_clip(config: Mapping[str, Any]) -> nn.Module:
    """transformers' CLIPTextModel on the meta device: its weights come later, by assignment."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**config))
    for module in model.modules():
        if "position_ids" in module._buffers:  # in no checkpoint, so it is made here
            length = module._buffers["position_ids"].shape[-1]
            module._buffers["position_ids"] = torch.arange(length).expand(1, -1)
    return model


class TextEncoder(nn.Module):
    """Texts to embeddings. `tokenizer_files` are kept, so that the model can be saved with them.

    `known_words`, where given, are the words that the model was trained on; others get a warning.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer_files: Mapping[str, str],
        known_words: Iterable[str] | None = None,
    ):
        super().__init__()
        self.clip = clip
        self.tokenizer_files = dict(tokenizer_files)
        self.tokenizer = make_tokenizer(tokenizer_files)
        self.known_words = None if known_words is None else frozenset(known_words)

    @property
    def config(self) -> Any:
        return self.clip.config

    def encode(self, prompts: str | list[str]) -> Tensor:
        """Texts -> (B, 77, C), on the encoder's device and in its dtype.

        Warns of what is cut because a text has more than 77 tokens, and of words that a model with
        `known_words` was never shown. Raises ValueError for what is no text.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"A prompt must be a text, not {prompts!r}.")
        if not prompts:
            raise ValueError("There is no prompt: give a list of one or more texts.")
        device = next(self.clip.parameters()).device
        for prompt in prompts:
            self._warn_of_unknown_words(prompt)
        return self.clip(self.tokens(list(prompts)).to(device), attention_mask=None)[0]

    def tokens(self, prompts: list[str]) -> Tensor:
        """Texts -> (B, 77) token ids: start, text, end, and the end again as padding."""
        length = self.config.max_position_embeddings
        logger = logging.getLogger("transformers.tokenization_utils_base")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it says less well what the warning below says
        try:
            for ids in self.tokenizer(prompts, truncation=False).input_ids:
                if len(ids) > length:
                    dropped = self.tokenizer.decode(ids[length - 1 : -1])
                    warnings.warn(
                        f"The prompt has {len(ids)} tokens and the model reads {length}: dropped {dropped!r}."
                    )
        finally:
            logger.setLevel(level)
        return self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def _warn_of_unknown_words(self, prompt: str) -> None:
        if self.known_words is None:
            return
        words = dict.fromkeys(re.findall(r"[^\W_]+", prompt.lower()))  # in order, each once
        unknown = [word for word in words if word not in self.known_words]
        if unknown:
            warnings.warn(
                f"The built-in model does not know {', '.join(map(repr, unknown))}: it knows "
                "coloured shapes only; for anything else give --model (in Python: sd.load) real weights."
            )

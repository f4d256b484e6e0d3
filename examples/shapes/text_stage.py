"""The first stage: a text encoder that tells, from the end of a caption, every fact of its scene."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fitting import Run, fit
from scenes import CENTRES, COLOURS, SHAPES, Scene, random_scene
from stepping import Batch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from vocabulary import WORDS, tokenizer_files

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


def random_caption(scene: Scene, rng: random.Random) -> tuple[str, bool, bool]:
    """A caption of the scene in one of its forms, and whether it tells the size and the background."""
    size, background = rng.random() > 0.06, rng.random() > 0.06
    return scene.caption(rng.random() < 0.5, size, background), size, background


class Text(nn.Module):
    """CLIP's text encoder, small, and the linear heads it is trained with."""

    def __init__(self, folder: Path):
        super().__init__()
        for file, content in tokenizer_files().items():
            (folder / file).write_text(content, encoding="utf-8")
        self.tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        end = self.tokenizer.eos_token_id
        config = CLIPTextConfig(**TEXT, vocab_size=end + 1, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
        self.clip = CLIPTextModel(config)
        # Background, size, and what is at each of the five places: 0 stands for "nothing" or "not said".
        self.classes = [1 + len(COLOURS), 3] + len(CENTRES) * [1 + len(COLOURS), 1 + len(SHAPES)]
        self.heads = nn.Linear(TEXT["hidden_size"], sum(self.classes))

        # Every word of the world is one token, so a caption's tokens are those of its words: 50 times as fast.
        self.ids = {word: self.tokenizer(word).input_ids[1:-1] for word in WORDS}
        assert all(len(ids) == 1 for ids in self.ids.values())

    def tokens(self, captions: list[str]) -> Tensor:
        """(B, 77): what the tokenizer says, for captions of the world's words."""
        end = self.tokenizer.eos_token_id
        result = np.full((len(captions), 77), end)
        for row, caption in zip(result, captions, strict=True):
            ids = [end - 1, *(self.ids[word][0] for word in caption.split())]
            row[: len(ids)] = ids
        return torch.from_numpy(result)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip(tokens).last_hidden_state  # (B, 77, 128)

    def loss(self, tokens: Tensor, facts: Tensor, places: Tensor) -> Tensor:
        """Cross-entropy of all facts (B, 12), read at `places` (B, 4), ends of the text: the padding is as well."""
        hidden = self(tokens)
        read = self.heads(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))
        losses = (
            F.cross_entropy(logits.flatten(0, 1).float(), facts[:, i].repeat_interleave(4))
            for i, logits in enumerate(read.split(self.classes, dim=-1))
        )
        return sum(losses) / len(self.classes)


def facts_of(scene: Scene, size_said: bool, background_said: bool) -> list[int]:
    """The scene as class numbers, in the order of `Text.classes`."""
    size = {"small": 1, "large": 2}.get(scene.objects[0].size or "", 0)
    facts = [1 + list(COLOURS).index(scene.background) if background_said else 0, size if size_said else 0]
    at = {o.place: o for o in scene.objects}
    for place in CENTRES:
        o = at.get(place)
        facts += [1 + list(COLOURS).index(o.colour), 1 + SHAPES.index(o.shape)] if o else [0, 0]
    return facts


def train_text(text: Text, run: Run, recipe: Mapping[str, Any], without: Collection[tuple[str, str]]) -> None:
    def batch_of(step: int) -> Batch:
        rng = random.Random(step)
        captions, facts = [""] * 4, [[0] * len(text.classes)] * 4
        for _ in range(recipe["batch"] - 4):
            scene = random_scene(rng, 0.75, without)
            caption, size, background = random_caption(scene, rng)
            captions.append(caption)
            facts.append(facts_of(scene, size, background))
        tokens = text.tokens(captions)
        ends = (tokens == text.tokenizer.eos_token_id).float()
        places = torch.multinomial(ends, 4, replacement=True)
        return tokens.to(run.device), torch.tensor(facts, device=run.device), places.to(run.device)

    fit("text", text, batch_of, text.loss, replace(run, graphs=False), recipe)

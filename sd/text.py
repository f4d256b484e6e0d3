"""CLIP's text encoder: from tokens to embeddings (Radford et al. 2021, arXiv:2103.00020).

Names of modules are those of CompVis files, without `cond_stage_model.transformer.text_model.`; they are
transformers' names. How a text becomes tokens is in prompts/tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Texts = Mapping[str, str]  # of a tokenizer: "vocab.json", "merges.txt", and "added_tokens.json" where it adds words


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a CLIP text encoder; the defaults are Stable Diffusion v1's (names as in transformers)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"  # CLIP's own; "gelu" in OpenCLIP
    layer_norm_eps: float = 1e-5
    padding: int | None = None  # the token that fills a text up; None: the end of the text. 0 in OpenCLIP


def causal_attention(q: Tensor, k: Tensor, v: Tensor, heard: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of (B, heads, T, D), in which no token sees those after it.

    heard: bool (B, T), False for tokens that none sees; the first one is always seen.
    """
    if heard is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = heard[:, None, None] & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU, with which CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPAttention(nn.Module):
    """Self-attention; what takes the place of `attend` must be causal, too, and know `heard` where that is given."""

    causal = True

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attend: Callable[..., Tensor] = causal_attention
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, *heard: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(q, k, v, *heard).transpose(1, 2).flatten(2))  # (B, T, C)


class CLIPMLP(nn.Module):
    def __init__(self, dim: int, inner: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """Self-attention and feed-forward; each on its norm, each added."""

    def __init__(self, c: TextConfig):
        super().__init__()
        self.self_attn = CLIPAttention(c.hidden_size, c.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = CLIPMLP(c.hidden_size, c.intermediate_size, c.hidden_act)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)

    def forward(self, x: Tensor, *heard: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), *heard)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """What each token means, and where it stands: (B, T) -> (B, T, C)."""

    def __init__(self, c: TextConfig):
        super().__init__()
        tables = [torch.empty(n, c.hidden_size) for n in (c.vocab_size, c.max_position_embeddings)]
        for table in tables:
            if not table.is_meta:  # there it would import torch's compiler: 2 seconds, and 77 MB
                nn.init.normal_(table)
        self.token_embedding, self.position_embedding = (
            nn.Embedding(len(t), c.hidden_size, _weight=t) for t in tables
        )

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.token_embedding(tokens) + self.position_embedding(positions)


class CLIPEncoder(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(c) for _ in range(c.num_hidden_layers))


class CLIPText(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor, skip: int = 0, *heard: Tensor) -> Tensor:
        """Token numbers (B, T) on any device -> (B, T, C): the last hidden state, after the final norm.

        skip    so many of the last layers are left out (diffusers' clip_skip)
        heard   an attention mask, if any: bool (B, T), False for tokens that no token sees. The first is to be True
        """
        device = self.final_layer_norm.weight.device
        x, heard = self.embeddings(tokens.to(device)), tuple(mask.to(device) for mask in heard)
        for layer in self.encoder.layers[: len(self.encoder.layers) - skip]:
            x = layer(x, *heard)
        return self.final_layer_norm(x)


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' CLIPTextModel under our names, which are those of 5.6 and later.

    Left out are `position_ids` (saved by transformers before 4.31: 0, 1, 2, ...), and the projection of a
    CLIPTextModelWithProjection, which is not used here.
    """
    return {
        name.removeprefix("text_model."): t
        for name, t in tensors.items()
        if not name.endswith(("position_ids", "text_projection.weight"))
    }

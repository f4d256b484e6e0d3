"""From prompts to embeddings: transformers' CLIP (Radford et al. 2021, arXiv:2103.00020), tokenizer and model.

Importing transformers takes seconds, so a `TextEncoder` begins as what a file holds, sizes, tensors and the texts
of a tokenizer, and makes the model and the tokenizer of them when they are first used.

Tensors have their names in CompVis files, without `cond_stage_model.transformer.text_model.`. That is what
`CLIPTextModel` of transformers 5.6 and later calls them; earlier ones put `text_model.` before every name.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as short  # of a prompt of megabytes, too
from typing import Any

import torch
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"  # the end of text is also what fills up to 77 tokens

LONGEST = 100_000  # characters of a prompt, of which the model reads some hundreds

Texts = Mapping[str, str]  # of a tokenizer: "vocab.json", "merges.txt", and "added_tokens.json" where it adds words

_MAKING = threading.RLock()


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a CLIP text encoder; the defaults are Stable Diffusion v1's (names as in transformers)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


def text_shapes(c: TextConfig) -> dict[str, tuple[int, ...]]:
    """All tensors of a text encoder and their shapes, without transformers: 196 for Stable Diffusion v1."""
    d, inner = c.hidden_size, c.intermediate_size
    linears = {f"self_attn.{p}_proj": (d, d) for p in "qkv"} | {"self_attn.out_proj": (d, d)}
    linears |= {"mlp.fc1": (inner, d), "mlp.fc2": (d, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (c.vocab_size, d),
        "embeddings.position_embedding.weight": (c.max_position_embeddings, d),
    }
    norms = ["final_layer_norm"]
    for layer in (f"encoder.layers.{i}" for i in range(c.num_hidden_layers)):
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    return shapes | {f"{norm}.{kind}": (d,) for norm in norms for kind in ("weight", "bias")}


def own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModel's tensors under our names, whichever transformers named them.

    Left out are `position_ids` (saved by transformers before 4.31: 0, 1, 2, ...), and the projection of a
    CLIPTextModelWithProjection, which is not used here.
    """
    return {
        name.removeprefix("text_model."): t
        for name, t in tensors.items()
        if not name.endswith(("position_ids", "text_projection.weight"))
    }


def check_tokenizer(config: TextConfig, vocab: str, merges: str) -> None:
    """Raise ValueError, the rest of a sentence, unless these files are a tokenizer of this encoder.

    The tokenizer itself is made later, and says less clearly what is wrong.
    """
    try:
        ids = json.loads(vocab)
        sane = isinstance(ids, dict) and all(type(i) is int and i >= 0 for i in ids.values())
    except (ValueError, RecursionError):
        sane = False
    if not sane or START not in ids or END not in ids:
        raise ValueError(f"vocab.json is no vocabulary of CLIP (tokens and numbers, {START} and {END})")
    if max(ids.values()) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer numbers tokens up to {max(ids.values())}, the text encoder knows {config.vocab_size}"
        )
    for merge in merges.split("\n")[1:]:
        pair = merge.split(" ")
        if merge.strip() and (len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys()):
            raise ValueError(f"merges.txt does not belong to vocab.json ({merge[:40]!r})")


def sound_tokenizer(config: TextConfig, texts: Texts) -> Texts:
    """The texts of a tokenizer of this encoder. Raises ValueError, the rest of a sentence, where they are none."""
    vocab, merges = texts["vocab.json"], texts["merges.txt"]
    # Tokenizers skip the first line, some of them whatever it says; and some stumble over lines of spaces.
    merges = merges if merges.startswith("#version") else f"#version: 0.2\n{merges}"
    merges = "".join(f"{line}\n" for line in merges.split("\n") if line.strip())
    check_tokenizer(config, vocab, merges)
    return {**texts, "merges.txt": merges}


class TextEncoder:
    """Prompts to embeddings.

    config, tensors    sizes and weights; the names of either age of transformers are understood
    texts              those of CLIP's vocab.json and merges.txt, by these names, and of added_tokens.json where there
                       are words beside these: a list as "added_tokens" in a tokenizer.json, which
                       `sd.weights.tokenizer` checks; or a function that gives them, called when a text is first
                       encoded
    known_words        all words that the model was trained on, if they are few: others get a warning
    device, dtype      where and in what to compute; the tensors are moved and converted when they are first used

    `.tokenizer` and `.model` are transformers' CLIPTokenizer and CLIPTextModel, made on first use. Several threads
    may use one encoder. A call of `.tokenizer` changes settings that the next call finds, in another thread too; so
    it is for others alone, and what is encoded here is tokenized by one of our own, whose settings stay the same.
    Raises ValueError where the texts are no tokenizer of this encoder.
    """

    def __init__(
        self,
        config: TextConfig,
        tensors: Mapping[str, Tensor],
        texts: Texts | Callable[[], Texts],
        known_words: Collection[str] | None = None,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.config = config
        self.known_words = frozenset(known_words) if known_words is not None else None
        self._find = texts if callable(texts) else None
        self._texts = None if callable(texts) else sound_tokenizer(config, texts)
        self._tokenizers: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] | None = own_names(tensors)  # until they are in the model
        first = next(iter(self._tensors.values()))
        self._target = device or first.device, dtype or first.dtype

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TextEncoder:
        """An encoder of the same sizes, tokenizer and words, with these weights."""
        return TextEncoder(self.config, tensors, self._texts or (lambda: self.texts), self.known_words)

    def as_stored(self) -> TextEncoder:
        """This encoder; or, while its weights are in the file, one that shares them as they are there."""
        with _MAKING:  # another thread may be converting them, or putting them into the model
            return self if self._tensors is None else self.with_tensors(self._tensors)

    def with_model(self, model: Any) -> TextEncoder:
        """This encoder, computing by another model of the same sizes: a copy of `model` that streams weights, say."""
        _ = self._own  # once for both
        result = copy.copy(self)
        result._model, result._tensors = model, None
        return result

    @property
    def texts(self) -> Texts:
        """Those of the tokenizer, by file. Raises ValueError where they cannot be found, or do not fit."""
        with _MAKING:
            if self._texts is None:
                assert self._find is not None
                texts = self._find()
                try:
                    self._texts = sound_tokenizer(self.config, texts)
                except ValueError as error:
                    remedy = "give another as tokenizer= (--tokenizer)"
                    raise ValueError(f"The tokenizer does not fit the text encoder: {error}; {remedy}.") from None
            return self._texts

    @property
    def vocab(self) -> str:
        return self.texts["vocab.json"]

    @property
    def merges(self) -> str:
        return self.texts["merges.txt"]

    @property
    def tokenizer(self) -> Any:
        return self._made("theirs")

    @property
    def _own(self) -> Any:
        """The tokenizer that nobody else calls. Never padding or cutting, it never changes, so it needs no lock."""
        return self._made("ours")

    def _made(self, whose: str) -> Any:
        with _MAKING:
            if whose not in self._tokenizers:
                self._tokenizers[whose] = self._make_tokenizer()
            return self._tokenizers[whose]

    def _make_tokenizer(self) -> Any:
        texts = self.texts
        from transformers import AddedToken, CLIPTokenizer

        more: dict[str, Any] = {"model_max_length": self.config.max_position_embeddings}
        if words := json.loads(texts.get("added_tokens.json", "[]")):
            more["added_tokens_decoder"] = {word.pop("id"): AddedToken(**word) for word in words}
        with tempfile.TemporaryDirectory() as folder:  # transformers 4 takes files only
            paths = [Path(folder, name) for name in ("vocab.json", "merges.txt")]
            for path in paths:
                path.write_text(texts[path.name], encoding="utf-8")
            return CLIPTokenizer(*map(str, paths), clean_up_tokenization_spaces=True, **more)

    @property
    def model(self) -> Any:
        with _MAKING:  # two threads may encode first
            if self._model is None:
                self._model = self._make_model()
                self._tensors = None
            return self._model

    _model: Any = None

    def _make_model(self) -> Any:
        from transformers import CLIPTextConfig, CLIPTextModel

        # The ids say only where the pooled output is taken, and nobody uses that: no reason to look for a tokenizer.
        last = self.config.vocab_size - 1
        ids = json.loads(self._texts["vocab.json"]) if self._texts else {START: last - 1, END: last}
        ends = {"bos_token_id": ids[START], "eos_token_id": ids[END], "pad_token_id": ids[END]}
        with torch.device("meta"):
            model = CLIPTextModel(CLIPTextConfig(**asdict(self.config), **ends))
        tensors = self.state_dict()
        prefix = "text_model." if any(n.startswith("text_model.") for n in model.state_dict()) else ""
        model.load_state_dict({prefix + name: t for name, t in tensors.items()}, assign=True)
        positions = torch.arange(self.config.max_position_embeddings, device=self.device)[None]
        for module in model.modules():  # a buffer that no file holds, so it is still on meta
            if "position_ids" in module._buffers:
                module.position_ids = positions
        return model.eval().requires_grad_(False)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under our names, where and in what they are computed with."""
        with _MAKING, torch.inference_mode(False):
            if self._tensors is None:
                return own_names(self.model.state_dict())
            for name, tensor in self._tensors.items():  # one after the other: of each only one form is in memory
                self._tensors[name] = tensor.to(*self._target)
            return self._tensors

    def stored(self) -> dict[str, Tensor]:
        """The weights under our names, as they are now: in the file, until they are used."""
        with _MAKING:
            return self.state_dict() if self._tensors is None else self._tensors

    @property
    def device(self) -> torch.device:
        return self._target[0] if self._tensors is not None else next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self._target[1] if self._tensors is not None else next(self.model.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Move and convert, in place, tensor by tensor."""
        with _MAKING, torch.inference_mode(False):
            if self._tensors is None:
                self.model.to(device=device, dtype=dtype)
            else:
                for name, tensor in self._tensors.items():
                    self._tensors[name] = tensor.to(*self._target).to(device=device, dtype=dtype)
                first = next(iter(self._tensors.values()))
                self._target = first.device, first.dtype
        return self

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
        return self.model(torch.tensor(rows, device=self.device))[0]

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
        return self._own(text, verbose=False).input_ids

    def cut(self, ids: list[int]) -> list[int]:
        """As many of these as the model reads, the last one END."""
        return ids[:-1][: self.config.max_position_embeddings - 1] + ids[-1:]

    def text_of(self, ids: list[int]) -> str:
        """The text that these tokens stand for, as far as tokens tell: in lower case, with other spaces."""
        return self._own.decode(ids).strip()

    def ends(self, ids: list[int]) -> list[bool]:
        """Whether each token is the last one of a word: by its spelling, or as a word that the tokenizer adds."""
        added, spelling = self._own.added_tokens_decoder, self._own.convert_ids_to_tokens
        return [i in added or spelling(i).endswith("</w>") for i in ids]

    def _warn(self, text: str, ids: list[int]) -> None:
        length = self.config.max_position_embeddings
        if len(ids) > length:
            dropped = self.text_of(ids[length - 1 : -1])[:1000]
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

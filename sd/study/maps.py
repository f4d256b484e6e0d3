"""Attention maps: which word acts where, and who looks at whom, added up while a picture is drawn.

The probabilities are computed a second time, beside the model's own attention, from the very queries and keys that
it was given: so whatever computes the attention (`use_attention`, `chunked_attention`, `LeanSampler`), the maps are
the same and so is the picture. After DAAM (Tang et al. 2022, arXiv:2210.04885), but exact, and by layer and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import StableDiffusion
from ..prompts.words import find_word, words_of
from ..sampler import Call
from .around import Look, around_attention, attentions
from .calls import listen, model_of, rows_of

Index = int | Iterable[int] | None  # one, several, or all
SCORES = 1 << 22  # probabilities that are computed at once: 16 MB in float32


class AttentionMaps:
    """What `attention_maps` collected of the last call of a sampler; it may be read while the call goes on.

    layers      names of the cross-attentions, and of the self-attentions where they were asked for
    prompts     one text a picture; to be set by hand where embeddings were passed to the sampler
    """

    def __init__(
        self, model: StableDiffusion, heads: bool, steps: bool, side: int, half: str, cells: int | None = None
    ):
        self.prompts: list[str] | None = None
        self.style = "plain"  # in which they are written
        self._model, self._heads, self._steps, self._side, self._half = model, heads, steps, side, half
        self._cells = cells
        self._run, self._size = 0, (0, 0)  # of the call of the UNet that was recorded last
        # layer -> step (0 where steps are not kept) -> (images, heads or 1, queries, keys), and how many were added
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._counts: dict[str, dict[int, int]] = {}
        self._grids: dict[str, tuple[int, int]] = {}

    # ---- reading

    @property
    def layers(self) -> list[str]:
        return list(self._sums)

    def grid(self, layer: str) -> tuple[int, int]:
        """Height and width of a layer's own map."""
        self._select(layer, "")
        return self._grids[layer]

    def words(self, image: int = 0) -> list[tuple[str, list[int]]]:
        """The words of a picture's prompt in order, each with the positions of its tokens."""
        words = words_of(self._model.text, self._prompt(image), self.style)
        return [(word, self._repeated(places, image)) for word, places in words]

    def probabilities(self, layer: str, *, head: Index = None, step: Index = None) -> Tensor:
        """(images, queries, keys): the mean over the heads and steps chosen, of one layer by its full name.

        Queries are the positions of the layer's grid, row by row. Keys are the 77 tokens, or for self-attention
        positions as well. Each row sums to 1.
        """
        self._select(layer, "")
        sums, counts = self._sums[layer], self._counts[layer]
        if step is not None and not self._steps:
            raise ValueError("The maps are means over all steps: attention_maps(model, steps=True) keeps each.")
        if head is not None and not self._heads:
            raise ValueError("The maps are means over all heads: attention_maps(model, heads=True) keeps each.")
        steps = list(sums) if step is None else indices(step)
        if missing := [s for s in steps if s not in sums]:
            raise ValueError(f"Step {missing[0]} is not among the {len(sums)} that were recorded (from 0).")
        heads = slice(None) if head is None else indices(head)
        try:
            # one step after the other: nothing of the size of all of them is made
            total = torch.zeros(())
            for s in steps:
                total = total.to(sums[s]) + sums[s][:, heads].mean(1)
        except IndexError:
            count = next(iter(sums.values())).shape[1]
            raise ValueError(f"There are heads 0 to {count - 1} in {layer}, not {head}.") from None
        return total / sum(counts[s] for s in steps)

    def word(
        self,
        word: str,
        *,
        image: int = 0,
        layer: str = "*",
        head: Index = None,
        step: Index = None,
        occurrence: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """(H, W): how much of the attention at each place goes to a word, or to several in a row; 0 to 1.

        layer       a pattern over names, as "output_blocks.*"; the mean over all layers that it matches
        head, step  a number or several, as range(10, 20); the mean over them, or over all
        occurrence  which one, from 0, where the prompt has the word more than once; all of them if not given
        size        the height and width wanted; the picture's if not given. Maps are enlarged bilinearly

        Raises ValueError where the prompt has no such word, or what was asked for was not recorded.
        """
        found = find_word(self._model.text, self._prompt(image), word, occurrence, self.style)
        return self.tokens(self._repeated(found, image), image=image, layer=layer, head=head, step=step, size=size)

    def tokens(
        self,
        positions: Iterable[int],
        *,
        image: int = 0,
        layer: str = "*",
        head: Index = None,
        step: Index = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """(H, W): the same for tokens by their positions; 0 is the start of the text."""
        positions = list(positions)
        maps = []
        for name in self._select(layer, "attn2"):
            rows = self.probabilities(name, head=head, step=step)[image]  # (queries, 77)
            maps.append(self._enlarge(rows[:, positions].sum(-1), name, size))
        return torch.stack(maps).mean(0)

    def looks_at(
        self,
        y: float,
        x: float,
        *,
        image: int = 0,
        layer: str = "*",
        head: Index = None,
        step: Index = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """(H, W): where the place (y, x), each from 0 to 1 across the picture, looks in self-attention.

        Each layer's map sums to 1 over its own grid.
        """
        if not (0 <= y <= 1 and 0 <= x <= 1):
            raise ValueError(f"A place is given as y and x from 0 to 1 across the picture, not {(y, x)}.")
        maps = []
        for name in self._select(layer, "attn1"):
            h, w = self._grids[name]
            place = min(int(y * h), h - 1) * w + min(int(x * w), w - 1)
            maps.append(self._enlarge(self.probabilities(name, head=head, step=step)[image, place], name, size))
        return torch.stack(maps).mean(0)

    def _repeated(self, places: list[int], image: int) -> list[int]:
        """These, and the same in each copy of a prompt that is repeated up to the length of another."""
        length = sum(len(chunk.ids) for chunk in self._model.text.chunks(self._prompt(image), self.style))
        kinds = self._select("*", "attn2")
        keys = next(iter(self._sums[kinds[0]].values())).shape[-1]
        return [place + start for start in range(0, keys, length) for place in places]

    def _prompt(self, image: int) -> str:
        self._select("*", "")  # was anything recorded?
        if self.prompts is None:
            raise ValueError("The prompt is not known, for embeddings were passed: set maps.prompts = [text, ...].")
        if not 0 <= image < len(self.prompts):
            raise ValueError(f"There are pictures 0 to {len(self.prompts) - 1}, not {image}.")
        return self.prompts[image]

    def _select(self, pattern: str, kind: str) -> list[str]:
        """The layers of a kind (attn1, attn2) that a pattern matches: at least one."""
        if not self._sums:
            raise ValueError("Nothing was recorded: draw with the model within `with attention_maps(model)`.")
        chosen = [n for n in self._sums if n.endswith(kind) and fnmatchcase(n, pattern)]
        if not chosen:
            kinds = [n for n in self._sums if n.endswith(kind)]
            hint = f"there are {', '.join(kinds)}" if kinds else "ask for them: attention_maps(self_attention=True)"
            raise ValueError(f"No layer {pattern!r} was recorded: {hint}.")
        return chosen

    def _enlarge(self, values: Tensor, layer: str, size: tuple[int, int] | None) -> Tensor:
        f = self._model.vae.config.downsampling
        size = size or (f * self._size[0], f * self._size[1])
        return F.interpolate(values.view(1, 1, *self._grids[layer]), size, mode="bilinear")[0, 0]

    # ---- writing

    def record(self, layer: str, call: Call, q: Tensor, k: Tensor) -> None:
        """Add the probabilities of one layer in one call of the UNet. q (B, heads, T, D), k (B, heads, S, D)."""
        if not call.whole:
            raise ValueError(
                "Here the picture is cut by rows, and a rank sees the attention of its own rows alone: "
                "split by image or by guidance to see maps."
            )
        cross = layer.endswith("attn2")
        if self._run != call.run:
            self._sums, self._counts, self._grids = {}, {}, {}
            self._run, self._size, self.prompts = call.run, call.size, call.prompts
            self.style = call.style
        cond, uncond = rows_of(call, len(q))
        rows = cond if self._half == "cond" else uncond
        q, k = q[rows], k[rows]
        if not len(q):
            return
        dtype = torch.promote_types(q.dtype, torch.float32)
        h, w = grid_of(q.shape[2], *call.size)
        side = self._side if not cross else self._cells or max(h, w)
        cells, grid = cells_of(h, w, side, q.device)
        step = call.step if self._steps else 0
        sums = self._sums.setdefault(layer, {})
        shape = (
            len(q),
            q.shape[1] if self._heads else 1,
            grid[0] * grid[1],
            k.shape[2] if cross else grid[0] * grid[1],
        )
        if step not in sums:
            sums[step] = torch.zeros(shape, dtype=dtype, device=q.device)
        counts = self._counts.setdefault(layer, {})
        counts[step] = counts.get(step, 0) + 1
        self._grids[layer] = grid
        queries = max(1, min(q.shape[2], SCORES // k.shape[2]))
        heads = max(1, min(q.shape[1], SCORES // (queries * k.shape[2])))
        for total, q_image, k_image in zip(sums[step], q.to(dtype), k.to(dtype), strict=True):
            for a in range(0, q.shape[1], heads):  # few heads, and few queries, at a time
                of = slice(a, a + heads)
                target = total[of] if self._heads else total
                share = 1.0 if self._heads else 1 / q.shape[1]
                for b in range(0, q.shape[2], queries):
                    _add(target, q_image[of, b : b + queries], k_image[of], share, b, cells, gather=not cross)


def _add(target: Tensor, q: Tensor, k: Tensor, share: float, start: int, cells: Tensor, gather: bool) -> None:
    """target (heads or 1, cells, keys) += share x softmax(q k^T / sqrt(D)), from the query `start` on.

    A cell has the mean over its queries. gather: keys are positions, too, and a cell has the sum over its keys.
    """
    probs = (q * q.shape[-1] ** -0.5) @ k.mT  # (heads, queries, keys)
    torch.softmax(probs, -1, out=probs)
    if len(target) != len(probs):
        probs = probs.sum(0, keepdim=True)
    if target.shape[1] == len(cells):  # each query its own
        target[:, start : start + probs.shape[1]].add_(probs, alpha=share)
        return
    if gather:
        probs = probs.new_zeros(*probs.shape[:2], target.shape[2]).index_add_(2, cells, probs)
    here = cells[start : start + probs.shape[1]]
    sizes = torch.bincount(cells, minlength=target.shape[1]).to(probs.dtype)
    target.index_add_(1, here, probs.div_(sizes[here][:, None]), alpha=share)


def grid_of(positions: int, h: int, w: int) -> tuple[int, int]:
    """The height and width of a layer with so many positions: latents of (h, w) halved until they fit."""
    while h * w > positions:
        h, w = ceil(h / 2), ceil(w / 2)
    if h * w != positions:
        raise ValueError(f"An attention over {positions} positions is of no picture of {h} x {w} latents.")
    return h, w


def cells_of(h: int, w: int, side: int, device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """Positions gathered into at most side x side cells: the cell of each position (h*w,), and the cells' grid."""
    f = ceil(max(h, w) / side)
    grid = ceil(h / f), ceil(w / f)
    y, x = torch.arange(h, device=device) // f, torch.arange(w, device=device) // f
    return (y[:, None] * grid[1] + x).flatten(), grid


def indices(index: int | Iterable[int]) -> list[int]:
    """One or several, as a list."""
    return [index] if isinstance(index, int) else list(index)


@contextmanager
def attention_maps(
    model: Any,
    *,
    self_attention: bool | int = False,
    heads: bool = True,
    steps: bool = False,
    half: str = "cond",
    cells: int | None = None,
) -> Iterator[AttentionMaps]:
    """Within the block, collect the UNet's attention: `with attention_maps(model) as maps: sampler(...)`.

    model            from `sd.load`, or a sampler
    self_attention   the UNet's self-attention too, on a grid of at most 16 x 16 (or so many as the number given):
                     a coarser cell's attention is the mean over its queries, and the sum over its keys
    heads, steps     keep each head, or each step, apart; else means are kept. At 512 x 512, for Stable Diffusion v1
                     and one picture, cross-attention is 8 MB, times 8 with heads, times the steps with steps
    half             of guidance: "cond", what the prompt does, or "uncond", what the negative prompt does
    cells            cross-attention, too, on a grid of at most so many cells along an edge; else on the layer's own

    Pictures are the same to the last bit. The maps are those of the sampler's last call: they begin anew when a step
    of another one comes, also of one that was begun before. Float32, or float64 where the model is. Raises ValueError
    for other arguments, or where a picture is cut into rows (`ParallelSampler`).
    """
    model = model_of(model)
    if half not in ("cond", "uncond"):
        raise ValueError(f"half must be 'cond' or 'uncond', not {half!r}.")
    side = 16 if self_attention is True else int(self_attention)
    if side < 0:
        raise ValueError(f"self_attention must be True, False, or the side of a grid, not {self_attention!r}.")
    if cells is not None and cells < 1:
        raise ValueError(f"cells must be at least 1, not {cells}: it is the longer edge of a grid.")
    maps = AttentionMaps(model, heads, steps, side, half, cells)
    with listen(model) as now, ExitStack() as stack:

        def recorder(name: str) -> Look:
            def look(q: Tensor, k: Tensor) -> None:
                if call := now():
                    with torch.no_grad():
                        maps.record(name, call, q.detach(), k.detach())

            return look

        for name, module in attentions(model.unet):
            if side or name.endswith("attn2"):
                stack.enter_context(around_attention(module, look=recorder(name)))
        yield maps

"""Instruments around an attention: what goes in can be seen, and the probabilities can be changed.

Nothing takes the place of the attention itself, so it does not matter what computes it (`use_attention`,
`chunked_attention`, that of `LeanSampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..operations import Attention

Look = Callable[..., None]  # q (B, heads, T, D), k (B, heads, S, D); and a mask of the text's tokens, if there is one
Change = Callable[[Tensor, tuple[Tensor, Tensor, Tensor]], Tensor]  # probabilities (B, heads, T, S); q, k, v


class Around:
    """An attention with instruments around it: `looks` see what goes in, `changes` act on the probabilities.

    All instruments on a module share one, so that each acts whatever the others do, and in whatever order they came.
    """

    def __init__(
        self,
        inner: Callable[..., Tensor],
        looks: tuple[Look, ...] = (),
        changes: tuple[Change, ...] = (),
        causal: bool = False,
    ):
        self.inner, self.looks, self.changes, self.causal = inner, looks, changes, causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *heard: Tensor) -> Tensor:
        for look in self.looks:
            look(q, k, *heard)  # first: some attentions write their result over q
        if not self.changes:
            return self.inner(q, k, v, *heard)
        dtype = torch.promote_types(q.dtype, torch.float32)
        probs = changed = probabilities(q.to(dtype), k.to(dtype), self.causal, *heard)
        for change in self.changes:
            changed = change(changed, (q, k, v))
        return self.inner(q, k, v, *heard) if changed is probs else (changed @ v.to(dtype)).to(q.dtype)


def probabilities(q: Tensor, k: Tensor, causal: bool = False, heard: Tensor | None = None) -> Tensor:
    """q (B, heads, T, D), k (B, heads, S, D) -> (B, heads, T, S).

    causal: no token sees those after it; heard: bool (B, S), False for tokens that none sees.
    """
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if heard is not None:
        scores = scores.masked_fill(~heard[:, None, None], -torch.inf)
    return torch.softmax(scores, dim=-1)


@contextmanager
def around_attention(module: Any, *, look: Look | None = None, changes: Iterable[Change] = ()) -> Iterator[None]:
    """Within the block, instruments are around an attention, whatever computes it at the time of each call.

    They are put on for each call of the module, and taken off after it: so blocks may end in any order. A module
    that calls the same hooks, as that of a copy of the model, gets them too.
    """
    looks, changes = (look,) if look else (), tuple(changes)
    inner: dict[nn.Module, list[Attention]] = {}  # what a module that is being called attended with before

    def before(m: Any, args: Any) -> None:
        inner.setdefault(m, []).append(m.attend)
        around = m.attend if isinstance(m.attend, Around) else Around(m.attend, causal=getattr(m, "causal", False))
        if not {*around.looks, *around.changes} >= {*looks, *changes}:  # else another thread has put them on
            m.attend = Around(around.inner, around.looks + looks, around.changes + changes, around.causal)

    def after(m: Any, args: Any, out: Any) -> None:
        if kept := inner.get(m):
            m.attend = kept.pop()
        if not kept:
            inner.pop(m, None)

    # The first to go in is the last to come out; and it comes out after an exception, too.
    handles = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, prepend=True, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attentions(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules that attend, by name."""
    return [(name, m) for name, m in module.named_modules() if hasattr(m, "attend")]

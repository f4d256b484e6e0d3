"""The operations that the blocks of the UNet and of the VAE are made of, and copies that compute them in another way.

A block says what is computed; how, its `ops` say. Here stands the textbook's way. The other ways to run a model
(`sd/speed`, `sd/lean`, `sd/parallel`) are subclasses of `Operations`, and `copy_of` gives them to a copy of the model
which shares its parameters. So every block is written once, and the model that somebody holds is never touched.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

# q (B, heads, T, D), k and v (B, heads, S, D) -> (B, heads, T, D)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Module = TypeVar("Module", bound=nn.Module)


class NormSiLUConvolution(Protocol):
    """A group norm, SiLU and a convolution in a row: `NormSiLUConv` in the UNet, `Normed` in the VAE."""

    @property
    def norm(self) -> nn.GroupNorm: ...
    @property
    def conv(self) -> nn.Conv2d: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class NormSiLUConv(nn.Sequential):
    """The three as one module, under the names that CompVis checkpoints have in the UNet: "0" and the last."""

    @property
    def norm(self) -> nn.GroupNorm:
        layer = self[0]
        assert isinstance(layer, nn.GroupNorm)
        return layer

    @property
    def conv(self) -> nn.Conv2d:
        layer = self[-1]
        assert isinstance(layer, nn.Conv2d)
        return layer


class Normed(NamedTuple):
    """The three where a checkpoint has norm and convolution side by side, as in the VAE."""

    norm: nn.GroupNorm
    conv: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class Operations:
    """How the textbook computes. Pixels are (B, C, h, w), tokens (B, T, C).

    `layers` says which modules a copy computes by another function: type -> function(ops, module, *inputs).
    """

    layers: Mapping[type[nn.Module], Callable[..., Tensor]] = {}

    def norm_silu_conv(self, layers: NormSiLUConvolution, x: Tensor, add: Tensor | None = None) -> Tensor:
        """conv(silu(norm(x))) + add, where `add` is of the result's shape, or (B, C, 1, 1)."""
        y = layers(x)
        return y if add is None else y + add

    def upsample(self, conv: nn.Conv2d, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """x enlarged to `size` by repeating pixels, then a convolution."""
        return conv(F.interpolate(x, size=size, mode="nearest"))

    def linear(self, layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
        """A linear layer, or a convolution of 1 x 1, on tokens."""
        if isinstance(layer, nn.Conv2d):
            return F.linear(tokens, layer.weight.flatten(1), layer.bias)
        return layer(tokens)

    def project(
        self,
        to_q: nn.Linear | nn.Conv2d,
        to_k: nn.Linear | nn.Conv2d,
        to_v: nn.Linear | nn.Conv2d,
        x: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, and keys and values of `context`, or of x itself where there is none: (B, T, C) each."""
        source = x if context is None else context
        return self.linear(to_q, x), self.linear(to_k, source), self.linear(to_v, source)

    def pixels(self, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        """Tokens (B, h*w, C) as pixels (B, C, h, w)."""
        return tokens.transpose(1, 2).unflatten(2, size).contiguous()

    def attention(self, attend: Attention) -> Attention:
        """What attends in the copy of a module which attends by `attend`."""
        return attend


TEXTBOOK = Operations()
HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")  # ends of the names under which torch keeps them


def copy_of(module: Module, ops: Operations, *, own_hooks: bool = False) -> Module:
    """A copy of a module, with parameters that lie in the same memory, whose blocks have other operations.

    It is for inference: its parameters want no gradients. Hooks that are put on the original act on the copy as well,
    unless it has its `own_hooks`: those of now, and then its own. What is made for one copy (packed weights, say)
    belongs in `ops`.
    """
    result = copy.copy(module)
    state = result.__dict__
    state.pop("forward", None)  # the original's own
    state["_parameters"] = {
        name: None if p is None else nn.Parameter(p.detach(), requires_grad=False)
        for name, p in module._parameters.items()
    }
    state["_modules"] = {
        name: None if child is None else copy_of(child, ops, own_hooks=own_hooks)
        for name, child in module._modules.items()
    }
    if own_hooks:
        state |= {name: OrderedDict(value) for name, value in state.items() if name.endswith(HOOKS)}
    if hasattr(module, "ops"):
        state["ops"] = ops
    if "attend" in state:
        state["attend"] = ops.attention(state["attend"])
    if type(module) in ops.layers:
        state["forward"] = partial(ops.layers[type(module)], ops, result)
    return result

"""`fast`: the same function up to rounding, in about half the time on a CPU.

The textbook's modules keep their places and names; the larger ones are given another forward, from outside. What
these do: convolutions of 3 x 3 with a quarter of the multiplications (`winograd.py`), with norm and SiLU computed on
read; products by oneDNN with weights in its layout (`packed.py`); attention and feed-forward in pieces that stay in
cache; pixels with channels last throughout, so that a transformer's tokens are the image as it lies there; the text's
keys and values once for all steps; and what both halves of guidance share, up to the first cross-attention, once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..attention import SpatialTransformer, attention
from ..model import StableDiffusion
from ..unet import Block, ResBlock, UNet
from ..vae import VAE, Decoder, Encoder
from .forwards import FORWARDS, alike_rows, fast_attention, shared_halves
from .malloc import keep
from .packed import onednn

SMALL = 1 << 15  # elements of a weight that is converted at once

Module = TypeVar("Module", bound=nn.Module)


def fast(model: StableDiffusion, *, compile: bool = False, extra_memory: bool = True) -> StableDiffusion:
    """A model that computes what `model` computes, faster, up to rounding: for inference, no gradients flow.

    It shares the parameters of `model`, which stays as it is, and has its state_dict names. Weights are prepared when
    a layer is first used, and again after they have been changed in place. On the CPU in float32 (float64 runs, and
    is no faster; in half precision the textbook is kept) and on CUDA.

    extra_memory   keep prepared weights: at full size about 5 GB for the UNet and below 1 GB for the VAE; and keep
                   what memory a call has freed for the next one, in the whole process (`malloc.py`). False: a
                   smaller gain, at no cost
    compile        on CUDA, torch.compile with mode="max-autotune", which takes minutes in the first call. The CPU
                   needs none, and takes no notice

    A model that was loaded with `lazy=True` has its weights prepared right from the file, so they are in memory once.
    (Not so without extra_memory, or in another dtype: then it is loaded.)

    A hook on a convolution or product inside a block that is computed otherwise is not called: put it on the block,
    or on the textbook model. Changes of weights that PyTorch does not count (through `.data`, load_state_dict with
    assign=True) are not noticed: take `fast` of the changed model. So too in place of a deepcopy.
    """
    packs = extra_memory and model.device.type == "cpu" and onednn(torch.empty(0, dtype=model.dtype))
    if model.lazy and packs:
        result = from_file(model)
    else:
        model = model.ready()
        result = model.with_parts(sharing(model.unet), sharing(model.vae), model.text)
    for part in (result.unet, result.vae):
        first = next(part.parameters())
        if first.is_cuda:
            on_cuda(part, compile, extra_memory)
            result.is_fast |= compile
        elif first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64):
            on_cpu(part, extra_memory)
            result.is_fast = True
            if extra_memory:
                keep()
    return result


def sharing(module: Module) -> Module:
    """A copy of a module with parameters of its own that lie in the same memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in module.parameters()}
    result = copy.deepcopy(module, memo)
    for part in result.modules():
        part.__dict__.pop("forward", None)  # of a model that is fast already: it is of the modules there
    return result


def from_file(model: StableDiffusion) -> StableDiffusion:
    """A lazy model as one of float32 whose large weights are still as they are in the file.

    They are those of convolutions and products, which `Conv`, `Linear` and `Winograd` take in any dtype, but
    not of the time embedding: products of a row or two are not worth packing. Small ones are converted now; by the
    first of them in each part others tell what it computes in.
    """
    text = {name: tensor.float() for name, tensor in model.text.state_dict().items()}
    encoder = model.text.with_tensors(text)
    result = model.with_parts(sharing(model.unet), sharing(model.vae), encoder)
    result.unet.time_embed.float()
    for part in (result.unet, result.vae):
        for module in part.modules():
            if isinstance(module, ResBlock):
                module.emb_layers.float()
            for name, p in list(module.named_parameters(recurse=False)):
                if p.numel() < SMALL:
                    setattr(module, name, nn.Parameter(p.detach().float(), p.requires_grad))
    return result


def on_cuda(part: UNet | VAE, compile: bool, extra_memory: bool) -> None:
    """Convolutions with channels last; compiled, elementwise work is fused and launched as CUDA graphs."""
    if extra_memory:  # a copy of the convolutions' weights
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        module = part if isinstance(part, UNet) else part.decoder
        graph = torch.compile(module.forward, mode="max-autotune")
        # A copy, because the next call writes its result to the same place.
        module.forward = lambda *args, **kwargs: graph(*args, **kwargs).clone()  # type: ignore[method-assign]


def on_cpu(part: UNet | VAE | nn.Module, pack: bool) -> None:
    """Give the modules of `part` their fast forwards."""
    for module in part.modules():
        if type(module) in FORWARDS:
            module.forward = torch.no_grad()(FORWARDS[type(module)](module, pack))
        elif isinstance(module, UNet | Encoder | Decoder):
            module.forward = torch.no_grad()(module.forward)  # type: ignore[method-assign]
        if getattr(module, "attend", None) is attention:
            module.attend = fast_attention  # type: ignore[assignment]
    for last in (part.decoder, part.quant_conv) if isinstance(part, VAE) else (part,):
        last.forward = channels_first(last.forward)
    if isinstance(part, UNet):
        part.time_embed.forward = partial(alike_rows, part.time_embed)  # type: ignore[method-assign]
        for block in part.input_blocks:
            assert isinstance(block, Block)
            block.forward = partial(shared_halves, block)  # type: ignore[method-assign]
            if any(isinstance(layer, SpatialTransformer) for layer in block):
                break


def channels_first(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What leaves the model lies in memory as the textbook's does."""

    @wraps(forward)
    def result(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs).contiguous()

    return result

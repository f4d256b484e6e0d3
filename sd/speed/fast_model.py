"""`fast`: the same function up to rounding, in about half the time on a CPU.

The blocks are the textbook's; they get other operations (`operations.py`). What these do: convolutions of 3 x 3 with
a quarter of the multiplications (`winograd.py`), with norm and SiLU computed on read; products by oneDNN with weights
in its layout (`packed.py`); attention and feed-forward in pieces that stay in cache; pixels with channels last
throughout, so that a transformer's tokens are the image as it lies there; and the text's keys and values once for all
steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..model import StableDiffusion
from ..operations import TEXTBOOK, copy_of
from ..unet import ResBlock, UNet
from ..vae import VAE
from ..weights.unread import at_rest, computes_in, patch_weights, read_weights
from .graphs import Graphed
from .malloc import keep
from .operations import Fast
from .packed import onednn

Part = TypeVar("Part", bound=nn.Module)  # the UNet, the VAE, or a ControlNet
Model = TypeVar("Model", StableDiffusion, nn.Module)
SMALL = 1 << 15  # elements of a weight that is converted at once


def fast(model: Model, *, compile: bool = False, extra_memory: bool = True) -> Model:
    """A model that computes what `model` computes, faster, up to rounding: for inference, no gradients flow.

    A ControlNet can be given as well, and is drawn with like any other.

    It shares the parameters of `model`, which stays as it is, and has its state_dict names. Weights are prepared when
    a layer is first used, and again after they have been changed in place. On the CPU in float32, and in bfloat16 on
    processors that multiply faster in it (with AMX or avx512_bf16; float64 runs, and is no faster; else the textbook
    is kept); and on CUDA, where the UNet's calls are replayed as graphs.

    extra_memory   keep prepared weights: at full size about 5 GB for the UNet and below 1 GB for the VAE; and keep
                   what memory a call has freed for the next one, in the whole process (`malloc.py`). False: a
                   smaller gain, at no cost
    compile        on CUDA, torch.compile with mode="max-autotune", which takes minutes in the first call. The CPU
                   needs none, and takes no notice

    A model whose weights are still in its file has them prepared right from there, so they are in memory once.
    (Not so without extra_memory, or in another dtype: then they are read first.)

    A hook on a convolution or product inside a block that is computed otherwise is not called: put it on the block,
    or on the textbook model. Changes of weights that PyTorch does not count (through `.data`, load_state_dict with
    assign=True) are not noticed: take `fast` of the changed model.
    """
    if isinstance(model, nn.Module):
        return fast_part(model, compile, extra_memory)
    unet, vae = fast_part(model.unet, compile, extra_memory), fast_part(model.vae, compile, extra_memory)
    if extra_memory and model.device.type == "cpu":
        keep()
    return model.with_parts(unet, vae, model.text)


def fast_part(part: Part, compile: bool, extra_memory: bool) -> Part:
    """A fast copy of the UNet, the VAE or a ControlNet; of the textbook's operations, where those are not faster."""
    device, dtype = computes_in(part)
    packs = extra_memory and device.type == "cpu" and onednn(torch.empty(0, dtype=dtype))
    if not packs:
        read_weights(part)
    if packs or (device.type == "cpu" and dtype in (torch.float32, torch.float64)):
        with at_rest(patch_weights(part)):  # another thread may be calling it for the first time
            result = copy_of(part, Fast(extra_memory), own_hooks=True)
        if packs:
            small_in(result, dtype)
        at_the_border(result)
        return result
    result = copy_of(part, TEXTBOOK, own_hooks=True)
    if device.type == "cuda":
        on_cuda(result, compile, extra_memory)
    return result


def small_in(part: nn.Module, dtype: torch.dtype) -> None:
    """Convert the small weights, and leave the large ones, those of convolutions and products, as they are in a file.

    `Conv`, `Linear` and `Winograd` take these in any dtype; but those of the time embedding are converted as well,
    for products of a row or two are not worth packing. By the first small one others tell what a part computes in.
    """
    for module in part.modules():
        if hasattr(module, "time_embed"):  # the UNet, or a ControlNet
            module.time_embed.to(dtype)
        elif isinstance(module, ResBlock):
            module.emb_layers.to(dtype)
        for name, p in list(module.named_parameters(recurse=False)):
            if p.numel() < SMALL:
                setattr(module, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))


def on_cuda(part: nn.Module, compile: bool, extra_memory: bool) -> None:
    """The UNet's convolutions with channels last, and its calls as graphs; compiled, elementwise work is fused, too.

    With channels last the VAE decodes slower: 27 ms against 22 in float16, 512 x 512, on an H200. A ControlNet's
    calls are not recorded, nor are the UNet's beside one.
    """
    if extra_memory and not isinstance(part, VAE):  # a copy of the convolutions' weights
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not compile and isinstance(part, UNet):
            part.__dict__["forward"] = Graphed(part)
    if compile and isinstance(part, UNet | VAE):
        module = part if isinstance(part, UNet) else part.decoder
        graph = torch.compile(module.forward, mode="max-autotune")
        # A copy, because the next call writes its result to the same place.
        module.__dict__["forward"] = lambda *args, **kwargs: graph(*args, **kwargs).clone()


def at_the_border(part: nn.Module) -> None:
    """What leaves a part lies in memory as the textbook's does, and no gradients flow through it.

    What a ControlNet gives stays as it lies, for a UNet that has its channels last as well.
    """
    if not isinstance(part, UNet | VAE):
        part.__dict__["forward"] = torch.no_grad()(part.forward)
        return
    for module in part.children() if isinstance(part, VAE) else (part,):
        module.__dict__["forward"] = partial(contiguous, module.forward)


@torch.no_grad()
def contiguous(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return forward(*args, **kwargs).contiguous()

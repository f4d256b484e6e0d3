"""Devices that are neither a CPU nor CUDA, such as Apple's mps, as far as a machine without one can tell.

Nothing may be computed there in float64, which mps does not have, and nothing that only CUDA has may be called.
Tensors have a device, a shape and a dtype but no values (torch's FakeTensorMode); they say that they are on torch's
"lazy", for mps itself does not exist in torch's build for CPUs. Values and speed are not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sd
from sd.compare.reference import random_controlnet
from sd.scheduler import SCHEDULERS
from tests.layouts import make_model

DEVICE = "lazy"
REFUSED = (torch.float64, torch.complex64, torch.complex128)


class NoDouble(TorchDispatchMode):
    """Counts what is computed on the device, and raises where it could not be."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # "all finite": there are no values to look at
            return True
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == DEVICE:
                self.calls += 1
                assert tensor.dtype not in REFUSED, f"{func} gives {tensor.dtype}"
        return out


@contextmanager
def fake_device() -> Iterator[NoDouble]:
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), NoDouble() as seen:
        yield seen


@pytest.fixture
def model():
    return make_model(dtype=torch.float32)


def draw(model: sd.StableDiffusion, **call: Any) -> Tensor:
    embeds = torch.zeros(1, 77, 64)
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "output_type": "latent"}
    return sd.SimpleSampler(model)(num_inference_steps=3, guidance_scale=4.0, **options | call)


def test_the_fake_device_refuses_float64():
    with pytest.raises(AssertionError, match="gives torch"), fake_device():
        torch.zeros(2).to(DEVICE).double()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_solver(model, scheduler):
    with fake_device() as seen:
        model.unet.to(DEVICE)
        latents = draw(model, scheduler=scheduler, eta=0.5 if scheduler == "ddim" else 0.0)
        assert latents.device.type == DEVICE
        assert latents.dtype == torch.float32
    assert seen.calls > 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pictures_in_and_out(model, dtype):
    """A picture, a mask, rescaled guidance, a ControlNet; the VAE and the text encoder there, too."""
    net = random_controlnet(model)
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    with fake_device():
        model.to(DEVICE, dtype)
        net.to(DEVICE, dtype)
        how = {"image": picture, "mask_image": mask, "controlnet": net, "control_image": picture}
        images = draw(model, **how, guidance_rescale=0.5, output_type="pt", paste=False)
        assert images.device.type == DEVICE
        assert images.shape == (1, 3, 64, 64)
        assert model.text.model(torch.zeros(1, 77, dtype=torch.long).to(DEVICE)).device.type == DEVICE


def test_there_sd_fast_is_the_textbook(model):
    with fake_device():
        model.to(DEVICE)
        assert draw(sd.fast(model)).device.type == DEVICE

"""ControlNet: a second network that reads a picture of edges, poses and the like, and adds to what the UNet sees.

Zhang, Rao & Agrawala 2023 (arXiv:2302.05543); lllyasviel/ControlNet, cldm/cldm.py. It is the UNet's way down and its
middle block, with weights of their own, and a convolution of 1 x 1 behind each of them. What these return is added
to the UNet's skips and to its middle block. They start as zero: one that has learned nothing changes nothing.

Modules carry the names of CompVis files; the blocks are the UNet's own:

    input_hint_block   the picture, (B, 3, H, W), to (B, 320, H / 8, W / 8), added behind the first input block
    input_blocks, middle_block, time_embed   as in the UNet
    zero_convs         one for each input block
    middle_block_out   one for the middle block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..time_embedding import timestep_embedding
from ..unet import UNet, UNetConfig, topology
from ..weights.mapped import WeightFiles
from ..weights.unread import computes_in


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """The sizes of the UNet that a ControlNet is for, and its own; the defaults are those of Stable Diffusion v1."""

    hint_channels: int = 3  # of the picture
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)  # at the picture's own size, at half of it, and so on
    global_pool: bool = False  # what is added is a mean over all pixels: for "shuffle", which tells colours alone


class ControlNet(nn.Module):
    """What a picture has to say to a UNet: 361,279,120 parameters by default.

    `name` and `hash` tell which weights; `files` are those that the weights lie in.
    """

    name = "ControlNet"

    def __init__(self, config: ControlNetConfig | None = None):
        super().__init__()
        self.config = c = config or ControlNetConfig()
        self.files = WeightFiles()
        unet = UNet(c)  # its way up is let go
        self.time_embed, self.input_blocks, self.middle_block = unet.time_embed, unet.input_blocks, unet.middle_block
        self.input_hint_block = hint_block(c)
        inputs, (middle,), _ = topology(c)
        *skips, last = (nn.Sequential(nn.Conv2d(n, n, 1)) for n in (b[-1].out_channels for b in [*inputs, middle]))
        self.zero_convs, self.middle_block_out = nn.ModuleList(skips), last

    @property
    def hash(self) -> str | None:
        """The first 10 digits of the file's SHA-256, as of a model; read on first use."""
        digest = self.files.digest()
        return digest and digest[:10]

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where it computes, and in what."""
        return computes_in(self)

    def hint(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W), in [0, 1], -> (B, model_channels, h, w), for `forward`. It is the same in every step."""
        return self.input_hint_block(picture.to(*self.place))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """What the UNet is to add to the skip of each input block, and last to its middle block.

        x, t, context: as the UNet's, but x (B, 4, h, w) also for a UNet of 9 channels; hint: of `hint`.
        """
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        added = []
        for i, (block, out) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            x = block(x, emb, context)
            if i == 0:
                x = x + hint
            added.append(out(x))
        return [*added, self.middle_block_out(self.middle_block(x, emb, context))]


def hint_block(c: ControlNetConfig) -> nn.Sequential:
    """Convolutions with SiLU between them; all but the first go in pairs, of which the second halves the size."""
    first, last = c.hint_widths[0], c.hint_widths[-1]
    layers: list[nn.Module] = [nn.Conv2d(c.hint_channels, first, 3, padding=1), nn.SiLU()]
    for width, wider in pairwise(c.hint_widths):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(width, wider, 3, padding=1, stride=2), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(last, c.model_channels, 3, padding=1))


def controlnet_for(unet: UNet, hint_widths: Sequence[int] = ControlNetConfig.hint_widths) -> ControlNet:
    """A ControlNet that has learned nothing: a copy of the UNet's way down, and zeros at the ends.

    It is where training begins. On the UNet's device and in its dtype; the UNet stays as it is.
    """
    c, (device, dtype) = config_for(unet.config, hint_widths), computes_in(unet)
    with torch.device("meta"):
        net = ControlNet(c)
    theirs, tensors = unet.state_dict(), {}
    drawn = {f"input_hint_block.{name}": tensor for name, tensor in hint_block(c)[:-1].state_dict().items()}
    for name, empty in net.state_dict().items():
        given = theirs.get(name, drawn.get(name, torch.zeros(1).expand(empty.shape)))
        given = given[:, : empty.shape[1]] if empty.ndim > 1 else given  # of 9 channels, the latents'
        tensors[name] = torch.empty(empty.shape, device=device, dtype=dtype).copy_(given)
    net.load_state_dict(tensors, assign=True)
    return net


def config_for(c: UNetConfig, hint_widths: Sequence[int] = ControlNetConfig.hint_widths) -> ControlNetConfig:
    """Of a ControlNet for a UNet of these sizes."""
    sizes = {name: getattr(c, name) for name in UNetConfig.__dataclass_fields__}
    sizes |= {"in_channels": c.out_channels, "guidance_dim": None}  # LCM's alone are told their guidance
    return ControlNetConfig(**sizes, hint_widths=tuple(hint_widths))

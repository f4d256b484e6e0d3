"""Instruments: see, and change, what happens inside a model while it draws.

    trace             every step's tensors, kept in one file
    attention_maps    which word acts where
    text_attention    which word of a prompt listens to which
    edit              read or replace what any module returns, by its name
    scale             how much of a LoRA is added, for a while or by step

They are put on from outside, as context managers, and leave nothing behind; a model that is not studied knows
nothing of them and pays nothing. They listen to what the sampler announces of each call of the UNet, and act on
whatever copy of the model it draws with. Of `ParallelSampler`, only where whole pictures are dealt out, because a
rank sees no more than its own share.
"""

from ..prompts.words import find_word
from .colours import latent_rgb, to_rgb
from .edits import Here, edit, names
from .maps import AttentionMaps, attention_maps
from .scales import scale
from .text_maps import TextAttention, text_attention
from .traces import Trace, trace

__all__ = [
    "AttentionMaps",
    "Here",
    "TextAttention",
    "Trace",
    "attention_maps",
    "edit",
    "find_word",
    "latent_rgb",
    "names",
    "scale",
    "text_attention",
    "to_rgb",
    "trace",
]

"""Instruments: see, and change, what happens inside a model while it draws."""

from ..prompts.words import find_word
from .maps import AttentionMaps, attention_maps
from .study import Here, Trace, edit, latent_rgb, names, to_rgb, trace

__all__ = [
    "AttentionMaps",
    "Here",
    "Trace",
    "attention_maps",
    "edit",
    "find_word",
    "latent_rgb",
    "names",
    "to_rgb",
    "trace",
]

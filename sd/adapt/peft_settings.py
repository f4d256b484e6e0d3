"""Ranks and alphas as PEFT and diffusers write them: beside the tensors, in adapter_config.json or in the header."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import parse_json, read_json, shown
from ..weights.configs import LoadError

CONFIG, HEADER = "adapter_config.json", "lora_adapter_metadata"
PARTS = {"unet": "unet", "text": "text_encoder"}  # what diffusers puts before a setting's name


class PeftSettings:
    """Those of a file, by its header, or, with `look_beside`, by the file beside it."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], look_beside: bool):
        self.path = path
        self.config: dict[str, Any] = {}
        try:
            if isinstance(text := metadata.get(HEADER), str):
                self.config = parse_json(text)
            elif look_beside and (beside := path.with_name(CONFIG)).is_file():
                self.config = read_json(beside)
            if not isinstance(self.config, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            raise LoadError(f"{path} has settings of PEFT that cannot be read: {str(error).rstrip('.')}.") from None
        for name in ("fan_in_fan_out", "use_bdlora", "megatron_config"):
            if any(self.of(part, name) for part in PARTS):
                raise LoadError(f"{path} was made with {name}, which is not followed here.")

    def of(self, part: str, name: str) -> Any:
        """A setting; in the header, those of each part have its name before them."""
        own = f"{PARTS[part]}.{name}"
        return self.config[own] if own in self.config else self.config.get(name)

    def pattern(self, part: str, name: str, kind: str, usual: Any) -> Any:
        """The value of a pattern of PEFT's that is for the module of this name, or else the usual one.

        Patterns are regular expressions, of which only names and ends of names are followed.
        """
        patterns = self.of(part, kind) or {}
        if not isinstance(patterns, dict):
            raise LoadError(f"{self.path} has a {kind} that is no table: its settings of PEFT are damaged.")
        for pattern, value in patterns.items():
            plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not all(c.isalnum() or c in "._-" for c in plain):
                what = f"{self.path} has the {kind} {shown(pattern, 60)}"
                raise LoadError(f"{what}, which is not followed: only names of modules are.")
            if name == plain or name.endswith(f".{plain}"):
                return value
        return usual

    def scale(self, part: str, name: str, rank: int | None) -> float:
        """alpha / rank of the module that the file calls so, or alpha / sqrt(rank); 1 where nothing says it."""
        alpha = self.of(part, "lora_alpha")
        alpha = self.pattern(part, name, "alpha_pattern", self.of(part, "alpha") if alpha is None else alpha)
        rank = rank or self.pattern(part, name, "rank_pattern", self.of(part, "r"))
        if alpha is None or rank is None:
            return 1.0
        if not all(type(n) in (int, float) and math.isfinite(n) for n in (alpha, rank)) or rank <= 0:
            raise LoadError(f"{self.path} has alpha {shown(alpha)} and rank {shown(rank)} for {name}: it is damaged.")
        return alpha / (math.sqrt(rank) if self.of(part, "use_rslora") else rank)

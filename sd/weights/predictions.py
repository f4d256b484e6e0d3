"""What the model of a single file predicts, and who says so: shapes do not tell.

Stable Diffusion v1 predicts the noise where nothing is said. Of Stable Diffusion 2 there are both kinds (512-base
predicts the noise, 768-v the velocity), and many files of it say nothing; then a statistic of their weights decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files import read_utf8

DOUBT = "in doubt"  # stands in the place of a prediction
_V = {"v", "v_prediction", "v-prediction", "vpred", "velocity"}  # words for one thing
_NOISE = {"eps", "epsilon"}
_PARAMETERIZATION = re.compile(r"""^\s*parameterization\s*:\s*["']?([\w-]+)""", re.MULTILINE)
# ComfyUI's test. The two kinds lie on either side of it; what is so near to it may be either.
STATISTIC, LIMIT, NEAR = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09, 0.005


class Prediction(NamedTuple):
    """What a model predicts, one of PREDICTIONS if it can be drawn with, or DOUBT; and what decided."""

    kind: str
    by: str
    guessed: bool = False  # by a statistic


NOISE = Prediction("epsilon", "")  # where nothing is said


def prediction_of(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], unet: Mapping[str, Tensor], doubtful: bool
) -> Prediction:
    """What the model of a single file predicts, as far as that can be known.

    Said, in this order, in the header (the keys of modelspec and of kohya's trainer), in a CompVis config beside the
    file, of the same name with the ending .yaml, or by a tensor called v_pred or ztsnr. Else it is the noise; where
    it is `doubtful`, as of Stable Diffusion 2, the weights of the UNet decide.
    """
    said = [(str(metadata.get("modelspec.prediction_type", "")), "modelspec.prediction_type in its header")]
    if says_yes(metadata.get("ss_v_parameterization")):
        said.append(("v", "ss_v_parameterization in its header"))
    for beside in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
        if beside.is_file():
            try:
                words = _PARAMETERIZATION.findall(read_utf8(beside, limit=1 << 20))
            except ValueError:  # of something else
                continue
            said += [(word, f"{beside.name} beside it") for word in words]
    said += [
        ("v", f"its tensor {key}") for key in ("v_pred", "ztsnr") if key in tensors and (doubtful or key != "ztsnr")
    ]
    for word, by in said:
        word = word.lower()
        if word in _V:
            return Prediction("v_prediction", by)
        if word and (word not in _NOISE or doubtful):
            return Prediction("epsilon" if word in _NOISE else word[:40], by)
    return by_statistic(unet.get(STATISTIC)) if doubtful else NOISE


def by_statistic(bias: Tensor | None) -> Prediction:
    if bias is None:
        return Prediction(DOUBT, "")
    spread = bias.double().std(correction=0).item()
    by = f"a statistic of its weights (the spread of {STATISTIC} is {spread:.3f}; above {LIMIT} it is v)"
    if not math.isfinite(spread) or spread == 0 or abs(spread - LIMIT) < NEAR:
        return Prediction(DOUBT, by)
    return Prediction("v_prediction" if spread > LIMIT else "epsilon", by, guessed=True)


def says_yes(value: Any) -> bool:
    return str(value).lower() in ("true", "1")

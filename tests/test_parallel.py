"""Every split, in worlds of 1 to 8 ranks, draws the simple sampler's picture."""

from itertools import product

import pytest
import torch

import sd
from sd.parallel import CPU, ParallelSampler, Split, deal, make_plan, work_of
from sd.ranks import RankError, agree
from tests.layouts import make_model
from tests.worlds import in_world

CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "seed": 5, "output_type": "pt"}
SIZES = [(72, 56), (104, 40)]  # latents of 9 x 7 and 13 x 5: nothing divides


def largest_difference(rank, splits, count):
    """Over all splits and sizes: between the parallel and the simple sampler, in float64."""
    model = make_model(dtype=torch.float64)
    worst = {}
    for split, (height, width) in product(splits, SIZES):
        call = CALL | {"height": height, "width": width, "num_images_per_prompt": count}
        wanted = sd.SimpleSampler(model)("a b", **call)
        found = ParallelSampler(model, split)("a b", **call)
        worst[str(split), height] = (found - wanted).abs().max().item()
    return worst


@pytest.mark.parametrize("world", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_split_is_exact(world):
    splits = [
        {"image": i, "guidance": g, "rows": r}
        for i, g, r in product(range(1, 4), (1, 2), range(1, 9))
        if i * g * r == world or (world == 3 and i * g * r == 2)  # one rank has nothing to do
    ]
    for worst in in_world(world, largest_difference, [*splits, None], 3):
        assert max(worst.values()) < 1e-12, worst

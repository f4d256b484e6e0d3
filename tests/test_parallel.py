"""Every split, in worlds of 1 to 8 ranks, draws the simple sampler's picture."""

from itertools import product

import pytest
import torch

import sd
from sd.parallel.ranks import RankError, agree
from sd.parallel.sampler import CPU, ParallelSampler, Split, deal, plan_split, work_of
from tests import ALL
from tests.layouts import make_model
from tests.worlds import in_world

CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "seed": 5, "output_type": "pt"}
SIZES = [(72, 56), (104, 40)]  # latents of 9 x 7 and 13 x 5: nothing divides


def largest_difference(rank, splits, count):
    """Over all splits and sizes: between the parallel and the simple sampler, in float64."""
    model = make_model(dtype=torch.float64)
    worst = {}
    for height, width in SIZES:
        call = CALL | {"height": height, "width": width, "num_images_per_prompt": count}
        wanted = sd.SimpleSampler(model)("a b", **call)
        for split in splits:
            found = ParallelSampler(model, split)("a b", **call)
            worst[str(split), height] = (found - wanted).abs().max().item()
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 4, *([8] if ALL else [])])
def test_every_split_is_exact(world):
    splits = [
        {"image": i, "guidance": g, "rows": r}
        for i, g, r in product(range(1, 4), (1, 2), range(1, 9))
        if i * g * r == world or (world == 3 and i * g * r == 2)  # one rank has nothing to do
    ]
    for worst in in_world(world, largest_difference, [*splits, None], 3):
        assert max(worst.values()) < 1e-12, worst


def counted(rank):
    """What a UNet call with two rows' ranks exchanges, and what the plan says of it."""
    model = make_model(dtype=torch.float32)
    sampler = ParallelSampler(model, {"rows": 2})
    steps = sampler.stream("a", **{k: v for k, v in CALL.items() if k != "output_type"}, height=64, width=64)
    next(steps)
    sampler.traffic.clear()
    next(steps)
    steps.close()
    return vars(sampler.traffic), sampler.plan("a", guidance_scale=4.0, height=64, width=64)


@pytest.mark.slow
def test_traffic_is_what_the_plan_says():
    for traffic, plan in in_world(2, counted):
        assert traffic["exchanges"] == plan.exchanges
        assert traffic["received"] > plan.received  # halos, moments and the noise come on top
        assert traffic["received"] < 3 * plan.received


def test_a_forward_of_the_full_unet_has_84_exchanges():
    work, elements, exchanges = work_of(sd.UNetConfig(), 64, 64)
    assert exchanges == 84
    assert work == pytest.approx(0.803e12, rel=0.02)
    # keys and values in float16, received by each of 2, 4 and 8 ranks: 23, 35 and 40 MB
    assert [round(2 * elements * (1 - 1 / n) / 1e6) for n in (2, 4, 8)] == [23, 35, 40]


def disagree(rank, what):
    model = make_model(dtype=torch.float32)
    if what == "the weights" and rank == 1:
        model.vae.decoder.conv_out.bias.data[0] += 1e-3
    prompt = "b" if what == "the prompts" and rank == 1 else "a"
    call = {"seed": rank} if what == "the seeds" else {"scheduler": ["ddim", "lms"][rank]} if "sched" in what else {}
    try:
        ParallelSampler(model, {"rows": 2})(prompt, **CALL | {"height": 64, "width": 64} | call)
    except RankError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["the weights", "the prompts", "the seeds", "the scheduler"])
def test_ranks_that_disagree_are_found_at_the_start(what):
    for message in in_world(2, disagree, what):
        assert f"disagree on {what}: rank 1 has" in message


def leaves(rank, when):
    """Rank 1 leaves without a word, before the drawing or in it; rank 0 goes on, and says what becomes of it."""
    model = make_model(dtype=torch.float32)
    sampler = ParallelSampler(model, {"rows": 2})
    call = {k: v for k, v in CALL.items() if k != "output_type"}
    steps = sampler.stream("a", **call, height=64, width=64)
    if when == "in the drawing":
        next(steps)
    if rank == 1:
        return "left"
    try:
        return f"{len(list(steps))} steps"
    except RankError as error:
        return str(error)


@pytest.mark.parametrize("when", ["before the drawing", pytest.param("in the drawing", marks=pytest.mark.slow)])
def test_a_rank_that_leaves_is_an_error_on_the_others(when):
    stayed, left = in_world(2, leaves, when)
    assert left == "left"
    assert stayed.startswith("Another rank is gone, so this one stops")


@pytest.mark.parametrize(
    ("ranks", "images", "guidance", "split"),
    [
        (1, 1, True, Split()),
        (2, 1, True, Split(guidance=2)),
        (2, 2, True, Split(image=2)),
        (4, 1, True, Split(guidance=2, rows=2)),
        (4, 8, True, Split(image=4)),
        (4, 2, True, Split(image=2, guidance=2)),
        (3, 1, False, Split(rows=3)),
        (8, 2, True, Split(image=2, guidance=2, rows=2)),
    ],
)
def test_images_first_then_guidance_then_rows(ranks, images, guidance, split):
    plan = plan_split(sd.UNetConfig(), ranks, images, guidance, (64, 64), 4, CPU)
    assert plan.split == split
    assert "split" in str(plan)


def test_rows_only_where_they_pay():
    unet = make_model().unet.config  # so small that messages take longer than the work
    plan = plan_split(unet, 4, 1, True, (16, 16), 4, CPU)
    assert plan.split == Split(guidance=2)
    assert "2 of 4 ranks have nothing to do" in str(plan)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"rows": 0}, "of the form"),
        ({"columns": 2}, "of the form"),
        ({"rows": True}, "of the form"),
        ({"rows": 2}, "for 2 ranks, but there are 1"),
        ({"image": 3}, "image 3, but here are 1"),
        ({"guidance": 3}, "guidance 3, but here are 2"),
    ],
)
def test_splits_that_do_not_fit(split, words, tiny):
    with pytest.raises(ValueError, match=words):
        ParallelSampler(tiny, split)("a", **CALL)


def test_shares_differ_by_one_at_most():
    assert deal(7, 3) == [range(0, 2), range(2, 4), range(4, 7)]
    assert sum(map(len, deal(5, 8))) == 5


def test_agreement_alone_is_no_question(monkeypatch):
    """A world of one rank has nobody to ask, and no process group to ask in."""
    asked = []
    monkeypatch.setattr(torch.distributed, "all_gather", lambda *args: asked.append(args))
    agree({"anything": 1})
    assert asked == []
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rng": "cuda"}, "the seeds"),
        ({"seed": 4}, "the seeds"),
        ({"guidance_rescale": 0.5}, "the prompts"),
        ({"clip_skip": 1}, "the prompts"),
        ({"scheduler": sd.make_scheduler("ddim", 3, timestep_spacing="trailing")}, "the scheduler"),
        ({"scheduler": sd.make_scheduler("ddim", 3, 0.5)}, "the scheduler"),
    ],
)
def test_what_has_to_be_the_same_on_every_rank(tiny, changes, what):
    """Each argument that decides the picture is among what ranks compare before they draw."""
    sampler = sd.ParallelSampler(tiny)
    call = {"num_inference_steps": 3, "scheduler": "ddim", "seed": 3}
    one = sampler.fingerprints(sampler.request("a star", **call))
    other = sampler.fingerprints(sampler.request("a star", **call | changes))
    assert [name for name in one if one[name] != other[name]] == [what]

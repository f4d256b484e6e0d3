"""Which call of the UNet is under way: instruments hear it from the sampler, whatever it draws with."""

from __future__ import annotations

import threading

import pytest
import torch

import sd
from sd import study
from sd.sampler import current_call
from tests.layouts import draw, make_model
from tests.worlds import in_world

CAPTION = "a red star above a blue ring on a white background"


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_lean_sampler(shapes, scale, monkeypatch):
    """Also with guidance in two calls, and where its attention writes over its queries."""
    call = {"num_inference_steps": 4, "guidance_scale": scale, "scheduler": "pndm", "output_type": "latent"}
    with study.attention_maps(shapes, steps=True) as wanted:
        sd.SimpleSampler(shapes)(CAPTION, **call)
    for halves in (True, False):
        lean = sd.LeanSampler(shapes)
        plan = lean.make_plan

        def in_turn(request, halves=halves, plan=plan):
            made = plan(request)
            object.__setattr__(made, "halves", halves)
            return made

        monkeypatch.setattr(lean, "make_plan", in_turn)
        plain = lean(CAPTION, **call)
        with study.attention_maps(lean, steps=True) as maps:
            assert torch.equal(lean(CAPTION, **call), plain)
        assert maps.prompts == [CAPTION]
        for step in range(5):
            got, expected = maps.word("star", step=step), wanted.word("star", step=step)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        steps, keys = [], []
        edits = {
            "middle_block": lambda out, at, s=steps: s.append((at.step, len(out[at.cond]), len(out[at.uncond]))),
            "*.attn2.to_k": lambda out, at, s=keys: s.append(at.step),
        }
        with study.edit(lean, edits):
            lean(CAPTION, **call)
        turn = [(0, 1), (1, 0)] if halves and scale > 1 else [(1, int(scale > 1))]
        assert steps == [(i, *rows) for i in range(5) for rows in turn]
        assert {*keys} == {*range(5)}  # computed once, before the first step, and handed out in each
        t = study.trace(lean, CAPTION, **{k: v for k, v in call.items() if k != "output_type"})
        assert torch.equal(t.latents, plain)
        assert (t.noise_without is None) == (scale == 1.0)


def test_texts_encoded_while_drawing(tiny):
    """They begin no drawing, unless it is drawn with them."""
    with study.attention_maps(tiny, steps=True) as maps:
        for _ in sd.SimpleSampler(tiny).stream("a red star", num_inference_steps=3):
            for i in range(20):
                tiny.encode_prompt(f"a {i}")
        assert maps.word("star", step=3).sum() > 0  # pndm's fourth call
        assert maps.prompts == ["a red star"]
        draw(tiny, "st", num_inference_steps=1)
        assert maps.prompts == ["st"]
    with study.attention_maps(tiny, steps=True) as alone:
        draw(tiny, "st", num_inference_steps=1)
    assert torch.equal(maps.word("st"), alone.word("st"))


def test_each_run_is_a_run_of_its_own(tiny):
    """Also with the same seed, from embeddings, without guidance, one step each: nothing there tells them apart."""
    first, second = (tiny.encode_prompt([text]) for text in ("a red star", "st"))
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "scheduler": "ddim"}
    with study.attention_maps(tiny, steps=True) as maps:
        draw(tiny, first, **call)
        draw(tiny, second, **call)
    with study.attention_maps(tiny, steps=True) as alone:
        draw(tiny, second, **call)
    for layer in alone.layers:
        assert torch.equal(maps.probabilities(layer), alone.probabilities(layer))


def test_a_run_that_is_stopped_is_not_continued_by_the_next(tiny):
    steps = []
    with (
        study.attention_maps(tiny, steps=True) as maps,
        study.edit(tiny, {"middle_block": lambda out, at: steps.append(at.step)}),
    ):
        stream = sd.SimpleSampler(tiny).stream("a red star", num_inference_steps=3)
        next(stream)
        stream.close()
        draw(tiny, "a red star")
    assert steps == [0, 0, 1, 2, 3]
    with study.attention_maps(tiny, steps=True) as alone:
        draw(tiny, "a red star")
    assert torch.equal(maps.word("star"), alone.word("star"))


def test_two_drawings_that_take_turns(tiny):
    """The maps are of the one that was stepped last, from that step on; edits know the step of each."""
    steps = []
    with (
        study.attention_maps(tiny, steps=True) as maps,
        study.edit(tiny, {"middle_block": lambda out, at: steps.append(at.step)}),
    ):
        a, b = (sd.SimpleSampler(tiny).stream(text, num_inference_steps=3) for text in ("a red star", "st"))
        for _ in zip(a, b, strict=True):
            pass
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]
    assert maps.prompts == ["st"]
    with pytest.raises(ValueError, match="Step 0"):
        maps.word("st", step=0)
    assert maps.word("st", step=3).shape == (64, 64)


def test_drawings_in_two_threads_do_not_hear_each_other(tiny):
    heard = {"a red star": [], "st": []}
    both_drawing = threading.Barrier(2)

    def look(out, at):
        call = current_call()
        heard[call.prompts[0]].append((call.run, call.step, call.half, threading.get_ident()))
        if call.step == 0:
            both_drawing.wait(60)

    with study.edit(tiny, {"middle_block": look}):
        threads = [threading.Thread(target=draw, args=(tiny, text)) for text in heard]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert current_call() is None
    for calls in heard.values():
        assert [(step, half) for _, step, half, _ in calls] == [(i, "both") for i in range(4)]
        assert len({(run, thread) for run, _, _, thread in calls}) == 1
    assert len({calls[0][0] for calls in heard.values()}) == 2


def test_a_call_without_a_sampler_is_a_step_by_itself(tiny):
    seen = []
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([7.0, 7.0]), tiny.encode_prompt(["a red star", "st"])
    edits = {"middle_block": lambda out, at: seen.append(at)}
    with study.attention_maps(tiny) as maps, study.edit(tiny, edits), torch.no_grad():
        tiny.unet(x, t, context)
    assert [(at.step, at.timestep, at.cond, at.uncond) for at in seen] == [(0, 7.0, slice(0, 2), slice(0, 0))]
    maps.prompts = ["a red star", "st"]
    assert maps.word("st", image=1).shape == (64, 64)


@pytest.mark.parametrize("kind", [sd.SimpleSampler, sd.LeanSampler, sd.ParallelSampler])
def test_instruments_on_the_model_act_in_every_sampler(tiny, kind):
    """On the copy that it draws with, too; also where the sampler was there before."""
    sampler = kind(tiny)
    wanted = draw(tiny)
    edits = {"middle_block": lambda out, at: 0.5 * out}
    with study.edit(tiny, edits):
        changed = draw(tiny)
        found = sampler("a red star", num_inference_steps=3, output_type="latent")
    assert (changed - wanted).abs().max() > 1e-3
    torch.testing.assert_close(found, changed, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        sampler("a red star", num_inference_steps=3, output_type="latent"), wanted, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("kind", [sd.SimpleSampler, sd.LeanSampler, sd.ParallelSampler])
def test_calls_are_announced(tiny, kind):
    """By every sampler, here for two prompts with two pictures each; and by nobody between two steps."""
    heard = []
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "scheduler": "ddim", "height": 48}
    for scale in (7.5, 1.0):
        with study.edit(tiny, {"middle_block": lambda out, at: heard.append(current_call())}):
            for _ in kind(tiny).stream(["a red star", "st"], guidance_scale=scale, **call):
                assert current_call() is None
    assert [c.half for c in heard] == ["both"] * 2 + ["cond"] * 2
    assert len({c.run for c in heard}) == 2
    texts = ["a red star", "a red star", "st", "st"]
    facts = [(texts, 4, (6, 8), i, t) for i, t in enumerate(sd.DDIM(2).timesteps)]
    assert [(c.prompts, c.images, c.size, c.step, c.timestep) for c in heard] == 2 * facts


def on_a_rank(rank, split):
    """What a rank's instruments hear, and the maps that it has, of two pictures."""
    model, heard = make_model(), []
    sampler = sd.ParallelSampler(model, split)
    edits = {"middle_block": lambda out, at: heard.append((current_call().half, len(out), at.cond, at.uncond))}
    with study.attention_maps(model) as maps, study.edit(model, edits):
        latents = draw(model, ["a red star", "st"], lambda _: sampler, num_inference_steps=1)
    shown = [maps.word(text, image=i) for i, text in enumerate(maps.prompts)] if maps.layers else []
    return latents.numpy(), maps.prompts, [m.numpy() for m in shown], heard


@pytest.mark.parametrize(
    ("ranks", "split"),
    [(1, {"image": 1}), pytest.param(2, {"image": 2}, marks=pytest.mark.slow),
     pytest.param(2, {"guidance": 2}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_ranks_show_their_share(tiny, ranks, split):
    """Whole pictures, or halves of guidance, as they are dealt out."""
    with study.attention_maps(tiny) as wanted:
        latents = draw(tiny, ["a red star", "st"], num_inference_steps=1)
    maps = [wanted.word(text, image=i) for i, text in enumerate(wanted.prompts)]
    for rank, (found, prompts, shown, heard) in enumerate(in_world(ranks, on_a_rank, split)):
        torch.testing.assert_close(torch.from_numpy(found), latents, atol=1e-4, rtol=1e-4)
        own = slice(rank, rank + 1) if split == {"image": 2} else slice(0, 2)
        assert prompts == ["a red star", "st"][own]
        if split == {"guidance": 2}:
            assert {half for half, *_ in heard} == {("uncond", "cond")[rank]}
            own = own if rank else slice(0, 0)
        for one, other in zip(shown, maps[own], strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, atol=1e-5, rtol=0)


def test_instruments_may_end_in_any_order(tiny):
    wanted = draw(tiny, num_inference_steps=1)
    first, second = study.attention_maps(tiny), study.edit(tiny, {"*.attn2.attend": lambda probs, at: 0 * probs})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(draw(tiny, num_inference_steps=1), wanted)
    second.__exit__(None, None, None)
    assert torch.equal(draw(tiny, num_inference_steps=1), wanted)
    assert all(m.attend is sd.attention.attention for m in tiny.unet.modules() if hasattr(m, "attend"))

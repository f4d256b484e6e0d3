"""Instruments: what they show is what happens, and they change nothing unless they are told to."""

from __future__ import annotations

import gc
import random
import re
import sys
import warnings
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from sd import study
from tests.layouts import make_model

sys.path[:0] = [str(Path(__file__).parents[1] / "examples" / part) for part in ("lab", "shapes")]

CAPTION = "a red star above a blue ring on a white background"


@pytest.fixture(scope="module")
def shapes():
    return sd.load("shapes")


def draw(model, prompt="a red star", sampler=sd.SimpleSampler, **call):
    return sampler(model)(prompt, **{"num_inference_steps": 3, "output_type": "latent", **call})


def reference(model, prompt, **call):
    """Every probability of the conditional half in float64: layer -> one (images, heads, T, S) a UNet call."""
    found: dict[str, list] = {name: [] for name, m in model.unet.named_modules() if hasattr(m, "attend")}
    names = iter([])

    def attend(q, k, v):
        logits = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double()) / q.shape[-1] ** 0.5
        half = logits.chunk(2)[1] if call.get("guidance_scale", 7.5) > 1 else logits
        found[next(names)].append(half.softmax(-1))
        return sd.attention.attention(q, k, v)

    def begin(*_):
        nonlocal names
        names = iter(order)

    order = list(found)  # named_modules goes in the order of the blocks
    handle = model.unet.register_forward_pre_hook(begin)
    with sd.use_attention(model.unet, attend):
        latents = draw(model, prompt, **call)
    handle.remove()
    return found, latents


CALLS = {
    "guided": {},
    "plain": {"guidance_scale": 1.0},
    "two prompts, two pictures each": {"prompt": ["a red star", "st"], "num_images_per_prompt": 2},
    "wide": {"height": 48, "width": 104},
    "ddim": {"scheduler": "ddim"},
    "lms": {"scheduler": "lms", "negative_prompt": "bad"},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_maps_are_the_probabilities(tiny, call):
    prompt, call = call.get("prompt", "a red star"), {k: v for k, v in call.items() if k != "prompt"}
    wanted, latents = reference(tiny, prompt, **call)
    with study.attention_maps(tiny, steps=True, self_attention=True) as maps:
        assert torch.equal(draw(tiny, prompt, **call), latents)
    assert maps.layers == list(wanted)
    for layer, calls in wanted.items():
        for step, probs in enumerate(calls):
            for head in (0, 7):
                got = maps.probabilities(layer, head=head, step=step)
                torch.testing.assert_close(got.double(), probs[:, head], atol=1e-6, rtol=0)
        mean = torch.stack(calls).mean((0, 2))
        torch.testing.assert_close(maps.probabilities(layer).double(), mean, atol=1e-6, rtol=0)
        torch.testing.assert_close(mean.sum(-1), torch.ones_like(mean[..., 0]))


def test_means_are_taken_on_the_fly(tiny):
    with study.attention_maps(tiny, steps=True) as every:
        draw(tiny)
    with study.attention_maps(tiny, heads=False) as means:
        draw(tiny)
    for layer in every.layers:
        torch.testing.assert_close(means.probabilities(layer), every.probabilities(layer), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="steps=True"):
        means.probabilities(layer, step=0)
    with pytest.raises(ValueError, match="heads=True"):
        means.word("star", head=0)
    with pytest.raises(ValueError, match="heads 0 to 7"):
        every.probabilities(layer, head=8)
    with pytest.raises(ValueError, match="Step 9"):
        every.probabilities(layer, step=9)


def test_the_negative_half_too(tiny):
    with study.attention_maps(tiny, half="uncond") as maps:
        draw(tiny, "a red star", negative_prompt="bad")
    with study.attention_maps(tiny) as plain:
        draw(tiny, "bad", negative_prompt="a red star", guidance_scale=1.0, num_inference_steps=1)
    with study.attention_maps(tiny, half="uncond", steps=True) as first:
        draw(tiny, "a red star", negative_prompt="bad", num_inference_steps=1)
    assert maps.layers == plain.layers
    torch.testing.assert_close(first.tokens([1]), plain.tokens([1]))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [7, 64])
def test_any_attention_inside_or_outside(tiny, chunk):
    with study.attention_maps(tiny) as wanted:
        draw(tiny)

    def cut(q, k, v):
        return sd.chunked_attention(q, k, v, chunk, out=q)  # over its own queries

    with sd.use_attention(tiny.unet, cut), study.attention_maps(tiny) as inside:
        draw(tiny)
    with study.attention_maps(tiny) as outside, sd.use_attention(tiny.unet, cut):
        draw(tiny)
    assert all(m.attend is sd.attention.attention for m in tiny.unet.modules() if hasattr(m, "attend"))
    for maps in (inside, outside):
        torch.testing.assert_close(maps.word("star"), wanted.word("star"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_lean_sampler(shapes, scale, monkeypatch):
    """Also with guidance in two calls, and where its attention writes over its queries."""
    call = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "latent"}
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
        assert {*keys} == {-1, *range(5)}  # computed once, before the first step, and handed out in each
        t = study.trace(lean, CAPTION, num_inference_steps=4, guidance_scale=scale)
        assert torch.equal(t.latents, plain)
        assert (t.noise_without is None) == (scale == 1.0)


def test_maps_of_the_last_call(tiny):
    with study.attention_maps(tiny) as maps:
        draw(tiny, "a red star")
        first = maps.word("star")
        draw(tiny, ["st", "star"], seed=1, guidance_scale=1.0)
        assert maps.prompts == ["st", "star"]
        second = maps.word("star", image=1)
        draw(tiny, "a red star")
        assert torch.equal(maps.word("star"), first)
        with pytest.raises(ValueError, match="pictures 0 to 0, not 1"):
            maps.word("star", image=1)
    assert second.shape == first.shape == (64, 64)


def test_the_same_noise_without_guidance_is_no_guidance(tiny):
    noise = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    with study.attention_maps(tiny, steps=True) as maps:
        draw(tiny, ["a red star", "st"], latents=noise, guidance_scale=1.0)
    assert maps.prompts == ["a red star", "st"]
    with study.attention_maps(tiny, steps=True) as alone:
        draw(tiny, "st", latents=noise[:1], guidance_scale=1.0)
    torch.testing.assert_close(maps.word("st", image=1), alone.word("st"))


def test_words(tiny):
    with study.attention_maps(tiny) as maps:
        draw(tiny, "a STAR, art st a tar")
    assert [w for w, _ in maps.words()] == ["a", "star", ",", "art", "st", "a", "tar"]
    assert torch.equal(maps.word("Star"), maps.tokens([2]))
    assert torch.equal(maps.word("art"), maps.tokens([4, 5, 6]))  # three tokens
    assert torch.equal(maps.word("art st"), maps.tokens([4, 5, 6, 7, 8]))
    assert torch.equal(maps.word("a", occurrence=1), maps.tokens([9]))
    assert torch.equal(maps.word("a"), maps.tokens([1, 9]))
    for missing in ("r", "ar", "moon", ""):  # a part of a word is not a word
        with pytest.raises(ValueError, match="no '"):
            maps.word(missing)
    with pytest.raises(ValueError, match="'a' 2 times"):
        maps.word("a", occurrence=2)


def test_embeddings_have_no_words_until_told(tiny):
    context = tiny.encode_prompt(["a red star"])
    with study.attention_maps(tiny) as maps:
        draw(tiny, context)
    with pytest.raises(ValueError, match=r"maps\.prompts"):
        maps.word("star")
    maps.prompts = ["a red star"]
    with study.attention_maps(tiny) as told:
        draw(tiny, "a red star")
    assert torch.equal(maps.word("star"), told.word("star"))


def test_layers_by_name(tiny):
    with study.attention_maps(tiny) as maps:
        draw(tiny, height=72, width=40)
    assert maps.grid("middle_block.1.transformer_blocks.0.attn2") == (3, 2)  # odd sizes round up
    assert maps.word("star").shape == (72, 40)
    assert maps.word("star", layer="input_blocks.*", size=(9, 5)).shape == (9, 5)
    with pytest.raises(ValueError, match="No layer 'input_blocks"):
        maps.word("star", layer="input_blocks.7.*")
    with pytest.raises(ValueError, match="self_attention=True"):
        maps.looks_at(0.5, 0.5)
    with study.attention_maps(tiny) as nothing:
        pass
    with pytest.raises(ValueError, match="Nothing was recorded"):
        nothing.word("star")


@pytest.mark.parametrize("side", [1, 3, 5, 16])
def test_self_attention_in_coarse_cells(tiny, side):
    with (
        study.attention_maps(tiny, self_attention=99) as fine,
        study.attention_maps(tiny, self_attention=side) as m,
    ):
        draw(tiny, height=40, width=56)
    layer = "input_blocks.1.1.transformer_blocks.0.attn1"
    f = -(-7 // side)
    h, w = m.grid(layer)
    assert (h, w) == (-(-5 // f), -(-7 // f))
    probs = fine.probabilities(layer)[0].double().view(5, 7, 5, 7)
    for y in range(h):
        for x in range(w):
            rows = probs[y * f : (y + 1) * f, x * f : (x + 1) * f].mean((0, 1))
            cells = [[rows[i * f : (i + 1) * f, j * f : (j + 1) * f].sum() for j in range(w)] for i in range(h)]
            got = m.probabilities(layer)[0, y * w + x].double().view(h, w)
            torch.testing.assert_close(got, torch.tensor(cells), atol=1e-6, rtol=0)
    assert m.looks_at(1, 1, layer="input_blocks.1.*").shape == (40, 56)


def test_memory_does_not_grow_with_steps(tiny):
    def held(steps):
        with study.attention_maps(tiny, self_attention=True) as maps:
            draw(tiny, num_inference_steps=steps)
        return sum(t.numel() for sums in maps._sums.values() for t in sums.values())

    assert held(2) == held(9)


def hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for part in (model.unet, model.vae, model.text.model)
        for m in part.modules()
    )


@pytest.mark.parametrize("instrument", ["maps", "edit", "attend", "trace"])
def test_nothing_is_left_behind(tiny, instrument):
    before, seen = hooks(tiny), []

    def fail(out, at):
        seen.append(at.step)
        if at.step == 1:
            raise RuntimeError("stop")

    name = {"edit": "middle_block", "attend": "middle_block.*.attn2.attend"}.get(instrument, "middle_block")
    sampler = sd.SimpleSampler(tiny)
    run = partial(study.trace, sampler) if instrument == "trace" else sampler
    maps = study.attention_maps(tiny)
    with pytest.raises(RuntimeError, match="stop"), study.edit(tiny, {name: fail}), maps as kept:
        run("st", num_inference_steps=3)
    assert seen[-1] == 1
    assert hooks(tiny) == before
    assert "encode" not in vars(tiny.text)
    assert all(m.attend is sd.attention.attention for m in tiny.unet.modules() if hasattr(m, "attend"))
    gone = weakref.ref(kept)
    del maps, kept
    gc.collect()
    assert gone() is None


def test_edit_by_name(tiny):
    seen = []
    with study.edit(tiny, {"input_blocks.?.1.*.attn2": lambda out, at: seen.append((at.name, tuple(out.shape)))}):
        latents = draw(tiny, num_inference_steps=1)
    assert torch.equal(latents, draw(tiny, num_inference_steps=1))  # reading changes nothing
    assert seen == [
        ("input_blocks.1.1.transformer_blocks.0.attn2", (2, 64, 32)),
        ("input_blocks.3.1.transformer_blocks.0.attn2", (2, 16, 64)),
    ]
    at_steps = []
    edits = {
        "middle_block": lambda out, at: at_steps.append((at.step, at.timestep, at.cond, at.uncond)),
        "unet": lambda out, at: torch.zeros_like(out),
    }
    with study.edit(tiny, edits):
        draw(tiny)
    assert [s for s, *_ in at_steps] == [0, 1, 2, 3]
    assert [t for _, t, *_ in at_steps] == list(sd.PNDM(3).timesteps)
    assert all(rest == [slice(1, 2), slice(0, 1)] for *_, rest in [(s, t, [c, u]) for s, t, c, u in at_steps])


def test_edit_every_part(tiny):
    seen = []
    edits = dict.fromkeys(
        ["vae.decoder.mid.attn_1", "vae.decoder.mid.attn_1.attend", "text.final_layer_norm", "out.2", "vae"],
        lambda out, at: seen.append(at.name),
    )
    with pytest.warns(UserWarning, match="'vae' never ran"), study.edit(tiny, edits):
        draw(tiny, output_type="pt")
    assert set(seen) == {"vae.decoder.mid.attn_1", "text.final_layer_norm", "out.2"}
    assert {"unet", "vae", "text", "vae.encoder.mid", "text.encoder.layers.0"} <= study.names(tiny).keys()


def test_edited_probabilities(tiny):
    """Told to be what they are, they give the same picture; the maps show what they were before."""
    same = {"*.attn?.attend": lambda probs, at: probs}
    wanted = draw(tiny)
    with study.edit(tiny, same):
        torch.testing.assert_close(draw(tiny), wanted, atol=1e-5, rtol=1e-4)

    def blind(probs, at):
        probs[at.cond, :, :, study.find_word(tiny.text, "a red star", "star")] = 0
        return probs

    with study.edit(tiny, {"*.attn2.attend": blind}):
        changed = draw(tiny)
    assert (changed - draw(tiny)).abs().max() > 1e-3
    # the same as values of zero
    with study.edit(tiny, {"*.attn2.to_v": lambda out, at: out * (torch.arange(77) != 5)[:, None]}):
        both = draw(tiny, guidance_scale=1.0)
    with study.edit(tiny, {"*.attn2.attend": blind}):
        torch.testing.assert_close(draw(tiny, guidance_scale=1.0), both, atol=1e-5, rtol=1e-4)


def test_all_edits_of_one_attention_run(tiny):
    """In the order given, also from two blocks; and maps are recorded, whichever came first."""
    seen = []

    def zero(token):
        def change(probs, at):
            seen.append(token)
            probs[..., token] = 0
            return probs

        return change

    def both(probs, at):
        probs[..., [3, 5]] = 0
        return probs

    name = "middle_block.1.transformer_blocks.0.attn2"
    with study.edit(tiny, {f"{name}.attend": both}), study.attention_maps(tiny) as maps:
        wanted = draw(tiny, num_inference_steps=1)
    edits = {f"{name}.attend": zero(3), "middle_block.*.attn2.attend": zero(5)}
    with study.attention_maps(tiny) as outside, study.edit(tiny, edits):
        assert torch.equal(draw(tiny, num_inference_steps=1), wanted)
    assert seen[:2] == [3, 5]
    with study.edit(tiny, {f"{name}.attend": zero(3)}), study.edit(tiny, {f"{name}.attend": zero(5)}):
        assert torch.equal(draw(tiny, num_inference_steps=1), wanted)
    assert not torch.equal(wanted, draw(tiny, num_inference_steps=1))
    assert maps.layers == outside.layers
    assert torch.equal(maps.probabilities(name), outside.probabilities(name))


def test_halves_that_fast_shares(tiny):
    """What is computed once for both is a map of either, and cannot be edited for one."""
    quick = sd.fast(tiny)
    first = "input_blocks.1.1.transformer_blocks.0.attn1"
    for half in ("cond", "uncond"):
        with study.attention_maps(tiny, self_attention=True, half=half) as wanted:
            draw(tiny, num_inference_steps=1)
        with study.attention_maps(quick, self_attention=True, half=half) as maps:
            draw(quick, num_inference_steps=1)
        assert maps.layers == wanted.layers
        for layer in maps.layers:
            torch.testing.assert_close(
                maps.probabilities(layer), wanted.probabilities(layer), atol=1e-4, rtol=0, msg=layer
            )
    for name in (first, first + ".attend", "input_blocks.1.0"):
        with pytest.raises(ValueError, match="textbook"), study.edit(quick, {name: lambda out, at: None}):
            draw(quick, num_inference_steps=1)
        with study.edit(quick, {name: lambda out, at: None}):
            draw(quick, num_inference_steps=1, guidance_scale=1.0)
    rows = []
    with study.edit(quick, {"input_blocks.1": lambda out, at: rows.append((len(out[at.cond]), len(out[at.uncond])))}):
        draw(quick, num_inference_steps=1)
    assert set(rows) == {(1, 1)}


def test_what_an_edit_returns_is_not_written_into(tiny):
    """Where forwards go on in place, as those of sd.fast do with attn2 and ff."""
    quick = sd.fast(tiny)
    name = "middle_block.1.transformer_blocks.0.attn2"
    kept = []
    with study.edit(quick, {name: lambda out, at: kept.append(out.clone()) and None}):
        draw(quick, num_inference_steps=1)
    mine = kept[0].clone()
    with study.edit(quick, {name: lambda out, at: mine}):
        draw(quick, num_inference_steps=1)
    assert torch.equal(mine, kept[0])


def test_outside_of_the_unet(tiny):
    """Encoder and decoder belong to no step, of this drawing or of the one before."""
    seen = []
    edits = dict.fromkeys(
        ["text.final_layer_norm", "vae.decoder.mid"],
        lambda out, at: seen.append((at.step, at.timestep == at.timestep, at.cond, at.uncond)),
    )
    with study.edit(tiny, edits):
        draw(tiny, output_type="pt", num_inference_steps=1)
        draw(tiny, output_type="pt", num_inference_steps=1)
    assert len(seen) == 6
    assert set(map(str, seen)) == {str((-1, False, slice(None), slice(0, 0)))}


def test_texts_encoded_while_drawing(tiny):
    """They begin no drawing, unless it is drawn with them."""
    with study.attention_maps(tiny, steps=True) as maps:
        for _ in sd.SimpleSampler(tiny).stream("a red star", num_inference_steps=3):
            for i in range(20):
                tiny.encode_prompt(f"a {i}")
        assert len(next(iter(maps._sums.values()))) == 4  # pndm's
        assert maps.prompts == ["a red star"]
        assert len(maps._calls._encoded) <= 16
        draw(tiny, "st", num_inference_steps=1)
        assert maps.prompts == ["st"]
    with study.attention_maps(tiny, steps=True) as alone:
        draw(tiny, "st", num_inference_steps=1)
    assert torch.equal(maps.word("st"), alone.word("st"))


def test_inference_mode(tiny):
    wanted = draw(tiny, num_inference_steps=1)
    edits = {"middle_block": lambda out, at: None}
    with torch.inference_mode(), study.edit(tiny, edits), study.attention_maps(tiny) as maps:
        assert torch.equal(draw(tiny, num_inference_steps=1), wanted)
    assert maps.word("star").shape == (64, 64)


def test_maps_in_pieces_and_cells(tiny, monkeypatch):
    with study.attention_maps(tiny, self_attention=3) as wanted:
        draw(tiny, num_inference_steps=1)
    monkeypatch.setattr(sd.study.maps, "SCORES", 1000)  # some queries of one head
    with study.attention_maps(tiny, self_attention=3, cells=4) as maps:
        draw(tiny, num_inference_steps=1)
    for layer in maps.layers:
        got, expected = maps.probabilities(layer), wanted.probabilities(layer)
        if wanted.grid(layer) == (8, 8):
            assert maps.grid(layer) == (4, 4)
            expected = expected.view(-1, 4, 2, 4, 2, 77).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_names_of_a_pattern(tiny):
    assert list(study.names(tiny, "input_blocks.?.1.*.attn2")) == [
        "input_blocks.1.1.transformer_blocks.0.attn2",
        "input_blocks.3.1.transformer_blocks.0.attn2",
    ]
    assert len(study.names(tiny, "*.attend")) == sum(
        hasattr(m, "attend") for part in (tiny.unet, tiny.vae) for m in part.modules()
    )


def test_wrong_edits(tiny):
    def forgets(out, at):
        out.zero_()

    cases = [
        ({"middle_blok": forgets}, "middle_block"),
        ({"out.2.attend": forgets}, "No attention"),
        ({"middle_block": forgets}, "return it"),
        ({"middle_block": lambda out, at: out[:1]}, r"must return \(2, 64, 2, 2\)"),
        ({"middle_block": lambda out, at: 1}, "not int"),
    ]
    for edits, message in cases:
        with pytest.raises(ValueError, match=message), study.edit(tiny, edits):
            draw(tiny)
    with pytest.raises(ValueError, match="a model or a sampler"), study.edit(tiny.unet, {}):
        pass
    with pytest.raises(ValueError, match="half must be"), study.attention_maps(tiny, half="left"):
        pass


def test_trace(tiny, tmp_path):
    sampler = sd.SimpleSampler(tiny)
    call = {"num_inference_steps": 5, "num_images_per_prompt": 2, "seed": 3}
    t = study.trace(sampler, "a red star", **call)
    steps = list(sampler.stream("a red star", **call))
    assert torch.equal(t.latents, steps[-1].latents)
    assert torch.equal(t.noise, torch.stack([s.noise for s in steps]))
    assert torch.equal(t.x0, torch.stack([s.denoised for s in steps]))
    assert torch.equal(t.x[1:], torch.stack([s.latents for s in steps[:-1]]))
    assert torch.equal(t.x[0, 1], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))[0])
    assert torch.equal(t.noise, t.noise_without + 7.5 * (t.noise_with - t.noise_without))
    assert t.timesteps.tolist() == list(sd.PNDM(5).timesteps)
    assert t.norms["x"][0].sub(1).abs().max() < 0.2  # unit noise
    a, b = t.noise_without[2, 0].double().flatten(), t.noise_with[2, 0].double().flatten()
    assert torch.isclose(torch.cos(torch.deg2rad(t.angle[2, 0])), a @ b / a.norm() / b.norm())
    t.save(tmp_path / "t.safetensors")
    again = study.Trace.load(tmp_path / "t.safetensors")
    assert again.settings == t.settings
    assert again.settings["seeds"] == [3, 4]
    assert again.settings | {"eta": 0.0, "dtype": "float32", "version": sd.__version__} == again.settings
    assert again.settings["num_images_per_prompt"] == 2
    assert "model_hash" in again.settings
    assert torch.equal(again.noise_without, t.noise_without)
    assert torch.equal(again.angle, t.angle)
    with pytest.raises(ValueError, match="exists"):
        t.save(tmp_path / "t.safetensors")
    sd.save(tiny, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is no trace"):
        study.Trace.load(tmp_path / "model.safetensors")
    plain = study.trace(
        sampler, "a red star", negative_prompt=["bad"], guidance_scale=1.0, num_inference_steps=2, scheduler="lms"
    )
    assert plain.settings["negative_prompt"] == ["bad"]
    assert plain.noise_without is None
    assert plain.angle is None
    assert torch.equal(plain.noise, plain.noise_with)
    assert plain.norms["x"][0].item() < 1.3  # what the UNet is given, not LMS' own x
    with pytest.raises(ValueError, match="no 'noise_without'"):
        plain.picture(kind="noise_without")


def test_rough_colours(shapes):
    """The matrix that is fitted gives about the colours that the VAE gives."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(8, 3, generator=generator)
    latents = torch.cat([shapes.vae.encode((2 * c - 1).view(1, 3, 1, 1).expand(-1, -1, 128, 128)) for c in colours])
    rough = study.to_rgb(latents, study.latent_rgb(shapes)).mean((2, 3))
    assert (rough - colours).abs().mean() < 0.16 < (colours - colours.mean(0)).abs().mean()
    t = study.trace(sd.SimpleSampler(shapes), "a red star", num_inference_steps=2)
    assert t.picture().size == t.picture(vae=shapes.vae).size == (128, 128)
    v1 = study.latent_rgb(make_model(vae=sd.VAEConfig(ch=32)))
    torch.testing.assert_close(v1[:, 0], torch.tensor([0.149, 0.0935, -0.079, -0.092, 0.5]))


def test_the_shape_word_lies_on_the_shape(shapes):
    """A few of what examples/lab/attention.py measures over 200 captions."""
    import attention as lab
    import scenes

    rng, shares, ground = random.Random(2), [], []
    for i in range(6):
        result = lab.measure(shapes, scenes.random_scene(rng, pairs=0), i)
        if result:
            _, (shape, both, background) = result
            shares += [lab.top_share(words["map"], words["own"], 0.01) for words in (shape, both)]
            ground.append(lab.top_share(background["map"], background["own"], 0.1))
    assert len(ground) >= 4
    assert sum(shares) / len(shares) >= 0.85
    assert sum(ground) / len(ground) <= 0.1


@pytest.mark.slow
def test_quality_in_small(tmp_path, monkeypatch, capsys):
    """Only that examples/lab/quality.py runs, and that its table and plot have what was asked for."""
    import quality

    plot = tmp_path / "quality.png"
    call = ["quality.py", "--count", "2", "--steps", "2", "3", "--schedulers", "ddim", "lms", "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", call)
    quality.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:3] for row in rows] == [[name, steps, "4"] for name in ("ddim", "lms") for steps in ("2", "3")]
    assert all(float(row[3]) in (0, 50, 100) for row in rows)
    assert Image.open(plot).size == (480, 300)


@pytest.mark.slow
def test_the_documentation_runs(tmp_path, monkeypatch):
    """docs/study.md as it stands, and what it says of its pictures."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 9
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec("\n".join(blocks), found)
    pictures = {name: torch.from_numpy(np.array(p)).float() for name, p in found["pictures"].items()}
    assert Image.open("edits.png").width == 824

    def differ(a, b):
        return (pictures[a] - pictures[b]).abs().mean().item()

    # what the text says of them
    assert differ("as it is", "without “red”") < 3
    assert differ("two objects", "keys swapped") < 5
    assert differ("as it is", "middle block: circle") < 3
    assert differ("as it is", "no middle block") < 5
    star, ring = (30, 64), (92, 64 - 18)  # the middle of the star, the left of the ring: red and blue change places
    for place, colour in ((star, 2), (ring, 0)):
        assert pictures["tokens swapped"][place].argmax() == colour
        assert pictures["two objects"][place].argmax() == 2 - colour
    assert pictures["the other's end"][5, 5].max() < 60  # a black background
    covered = {name: (p.min(-1).values < 150).float().mean() for name, p in pictures.items()}
    assert covered["small"] < covered["half way to small"] < covered["as it is"]
    assert differ("two objects", "in steps 10 to 19") < differ("two objects", "no guidance") / 2


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    """docs/tour.md as it stands, and what it says of its figures."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "tour.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^## \d+\. ", text, re.MULTILINE)) == 10
    try:
        exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), {})
    finally:
        torch.set_grad_enabled(True)
    out = capsys.readouterr().out
    assert float(re.search(r"by hand and by the library: (\S+)", out)[1]) < 1e-5
    assert all(float(error) < 0.1 for error in re.findall(r"t \d+: error (\S+)", out))
    assert all(float(error) < 1e-4 for error in re.findall(r"(?:the same|pieces of 16): (\S+)", out))
    distance = {(name, n): float(d) for name, n, d in re.findall(r"(\w+) in (\d+) steps: (\S+)", out)}
    assert min(distance, key=distance.__getitem__) == ("ddim", "20")
    x, y = map(int, re.search(r"at \((\d+), (\d+)\)", out).groups())
    assert max(abs(x - 64), abs(y - 64)) < 25
    assert Image.open("tour.png").size == (792, 396)

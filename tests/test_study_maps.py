"""Attention maps: what they show is what happens, and they change nothing."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

import sd
from sd import study
from tests.layouts import draw


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
        gc.collect()
        assert maps.layers
        return sum(
            x.numel() for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim == 4 and x.shape[3] == 77
        )

    before = held(2)
    assert held(9) == before > 0


def test_maps_of_a_fast_model(tiny):
    quick = sd.fast(tiny)
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


def test_an_edit_of_a_fast_model_does_not_outlive_its_block(tiny):
    quick = sd.fast(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with study.edit(quick, {"*.attn2.to_k": lambda out, at: 0 * out}):
            draw(quick, num_inference_steps=1)
    assert torch.equal(draw(quick, num_inference_steps=1), draw(sd.fast(tiny), num_inference_steps=1))


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

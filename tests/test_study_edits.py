"""Edits: they change what they are told to change, and leave nothing behind."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch

import sd
from sd import study
from sd.sampler import guided
from tests.layouts import draw, make_model


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


@pytest.mark.parametrize("sampled", [True, False])
def test_edits_of_the_unet_itself(tiny, sampled):
    """They belong to its call, as those of what is inside do."""
    seen = []
    names = ["middle_block.*.attn2.attend", "middle_block", "unet"]
    edits = dict.fromkeys(names, lambda out, at: seen.append((at.step, at.timestep, at.cond, at.uncond)))
    with study.edit(tiny, edits):
        if sampled:
            draw(tiny, num_inference_steps=2, scheduler="ddim")
            wanted = [(i, t, slice(1, 2), slice(0, 1)) for i, t in enumerate(sd.DDIM(2).timesteps) for _ in names]
        else:
            tiny.unet(x=torch.randn(2, 4, 8, 8), t=torch.full((2,), 500.0), context=tiny.encode_prompt(["a", "st"]))
            wanted = [(0, 500.0, slice(0, 2), slice(0, 0))] * 3
    assert seen == wanted


def test_a_denoiser_without_the_loop(tiny):
    seen = []
    context, negative = tiny.encode_prompt("a red star"), tiny.encode_prompt("")
    with study.edit(tiny, {"unet": lambda out, at: seen.append((at.timestep, at.cond, at.uncond))}):
        guided(tiny.unet, context, negative, 7.5)(torch.randn(1, 4, 8, 8), torch.tensor([500.0]))
    assert seen == [(500.0, slice(1, 2), slice(0, 1))]


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


def test_edited_probabilities():
    """Told to be what they are, they give the same picture; the maps show what they were before.

    In float64: guidance of random weights multiplies differences, and each processor rounds in its own way.
    """
    tiny = make_model(dtype=torch.float64)
    same = {"*.attn?.attend": lambda probs, at: probs}
    wanted = draw(tiny)
    with study.edit(tiny, same):
        torch.testing.assert_close(draw(tiny), wanted, atol=1e-10, rtol=1e-10)

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
        torch.testing.assert_close(draw(tiny, guidance_scale=1.0), both, atol=1e-10, rtol=1e-10)


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


def test_inference_mode(tiny):
    wanted = draw(tiny, num_inference_steps=1)
    edits = {"middle_block": lambda out, at: None}
    with torch.inference_mode(), study.edit(tiny, edits), study.attention_maps(tiny) as maps:
        assert torch.equal(draw(tiny, num_inference_steps=1), wanted)
    assert maps.word("star").shape == (64, 64)


def test_names_of_a_pattern(tiny):
    assert list(study.names(tiny, "input_blocks.?.1.*.attn2")) == [
        "input_blocks.1.1.transformer_blocks.0.attn2",
        "input_blocks.3.1.transformer_blocks.0.attn2",
    ]
    assert len(study.names(tiny, "*.attend")) == sum(
        hasattr(m, "attend") for part in (tiny.unet, tiny.vae, tiny.text.model) for m in part.modules()
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


def test_the_text_encoders_attention_is_seen_as_it_is(tiny):
    """Causal: no token sees those after it. Given back as they were, the probabilities make the same embeddings."""
    seen = []

    def look(probabilities, at):
        seen.append(probabilities)
        return probabilities.clone()

    wanted = tiny.encode_prompt("a red star")
    with study.edit(tiny, {"text.*.attend": look}):
        got = tiny.encode_prompt("a red star")
    assert len(seen) == len(tiny.text.model.encoder.layers)
    for probabilities in seen:
        assert probabilities.shape[-2:] == (77, 77)
        assert probabilities.triu(1).abs().max() == 0
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)

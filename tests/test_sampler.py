"""Pictures against diffusers' StableDiffusionPipeline, and the sampler's own rules."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import sd
from sd.compare.reference import diffusers_scheduler
from sd.sampler import denoise, guided
from tests.layouts import diffusers_images, make_model

PROMPT = "a red star above a blue ring"


def v1_scheduler(name):
    pytest.importorskip("diffusers")
    return diffusers_scheduler(name)


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("pndm", {"num_inference_steps": 7, "negative_prompt": "blur"}),
        pytest.param("pndm", {"num_inference_steps": 50}, marks=pytest.mark.slow),
        ("pndm", {"num_inference_steps": 4, "guidance_scale": 1.0}),
        ("ddim", {"num_inference_steps": 6, "guidance_scale": 4.0, "negative_prompt": "a green cross"}),
        ("ddim", {"num_inference_steps": 6, "eta": 0.7}),
    ],
)
def test_pixels_are_those_of_diffusers(tiny, scheduler, options):
    size = {"height": 128, "width": 192}
    expected = diffusers_images(tiny, v1_scheduler(scheduler), **size, **options)
    got = sd.SimpleSampler(tiny)(PROMPT, seed=3, scheduler=scheduler, **size, **options)
    assert (pixels(got) == pixels(expected)).all()
    assert pixels(got).std() > 10  # and it is a picture, not one colour


def test_lms_is_diffusers_up_to_rounding(tiny):
    options = {"num_inference_steps": 8, "height": 64, "width": 64}
    expected = diffusers_images(tiny, v1_scheduler("lms"), **options)
    got = sd.SimpleSampler(tiny)(PROMPT, seed=3, scheduler="lms", **options)
    assert np.abs(pixels(got) - pixels(expected)).max() <= 1


def test_a_batch_is_that_of_diffusers(tiny):
    prompts = [PROMPT, "a cross"]
    options = {"num_inference_steps": 5, "negative_prompt": ["blur", ""], "num_images_per_prompt": 2}
    expected = diffusers_images(
        tiny, v1_scheduler("pndm"), prompts, seeds=(5, 6, 7, 8), **options, height=64, width=64
    )
    got = sd.SimpleSampler(tiny)(prompts, seed=5, **options)
    assert np.abs(pixels(got) - pixels(expected)).max() <= 1  # other batch sizes in the VAE: other rounding


def test_a_seed_gives_the_same_image_alone_and_in_a_batch(tiny):
    sampler = sd.SimpleSampler(tiny.to(dtype=torch.float32))
    options = {"num_inference_steps": 4, "scheduler": "ddim", "eta": 1.0, "output_type": "latent"}
    batch = sampler([PROMPT, PROMPT, "a cross"], seed=10, **options)
    alone = sampler(PROMPT, seed=11, **options)
    torch.testing.assert_close(batch[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.equal(batch[0], batch[1])


def test_output_types_and_stream_agree(tiny):
    sampler = sd.SimpleSampler(tiny)
    options = {"num_inference_steps": 3, "seed": 1}
    latents = sampler(PROMPT, output_type="latent", **options)
    tensor = sampler(PROMPT, output_type="pt", **options)
    (image,) = sampler(PROMPT, **options)
    steps = list(sampler.stream(PROMPT, **options))
    assert latents.shape == (1, 4, 8, 8)
    assert tensor.shape == (1, 3, 64, 64)
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert image.size == (64, 64)
    assert [s.index for s in steps] == [0, 1, 2, 3]
    assert [s.timestep for s in steps] == [667, 334, 334, 1]
    assert torch.equal(steps[-1].latents, latents)
    assert (pixels(sampler.decode(latents)) == pixels([image])).all()
    torch.testing.assert_close(steps[-1].denoised, steps[-1].latents, rtol=0.2, atol=0.2)  # hardly noise left


def test_latents_and_embeddings_can_be_given(tiny):
    sampler = sd.SimpleSampler(tiny)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = sampler(PROMPT, seed=4, **options)
    before = noise.clone()
    assert torch.equal(sampler(PROMPT, latents=noise, **options), expected)
    assert torch.equal(noise, before)
    context, nothing = tiny.encode_prompt(PROMPT), tiny.encode_prompt("")
    assert torch.equal(sampler(context, negative_prompt=nothing, seed=4, **options), expected)
    named = sampler(prompt_embeds=context, negative_prompt_embeds=nothing, seed=4, **options)
    assert torch.equal(named, expected)


def test_a_scheduler_can_be_given(tiny):
    sampler = sd.SimpleSampler(tiny)
    got = sampler(PROMPT, scheduler=sd.DDIM(3), output_type="latent")
    assert torch.equal(got, sampler(PROMPT, scheduler="ddim", num_inference_steps=3, output_type="latent"))


def test_stopping_early_costs_nothing_more(tiny):
    calls = []
    hook = tiny.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        for step in sd.SimpleSampler(tiny).stream(PROMPT, num_inference_steps=50):
            if step.index == 2:
                break
    finally:
        hook.remove()
    assert len(calls) == 3


def test_guidance_is_a_wrapper_and_the_loop_takes_any_denoiser():
    def unet(x, t, context):
        return context[:, :1, :1, None] * x

    one, two = torch.full((1, 1, 1), 1.0), torch.full((1, 1, 1), 2.0)
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(guided(unet, two, one, 3.0)(x, torch.zeros(1)), x * (1 + 3 * (2 - 1)))
    steps = list(denoise(lambda x, t: 0 * x, x, sd.DDIM(4)))
    assert len(steps) == 4
    assert steps[-1].latents.shape == x.shape


def test_the_callers_code_keeps_its_gradients(tiny):
    for _ in sd.SimpleSampler(tiny).stream(PROMPT, num_inference_steps=2):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 3}, "prompt must be a text"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": ["a", None]}, "prompt must be a text"),
        ({"prompt": None}, "prompt must be a text"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 entries for 1 prompts"),
        ({"height": 100}, "height must be a multiple of 8"),
        ({"width": 0}, "width must be a multiple of 8"),
        ({"width": -8}, "width must be a multiple of 8"),
        ({"width": 64.0}, "width must be a multiple of 8"),
        ({"height": 1 << 20}, "height must be a multiple of 8 from 8 to"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"guidance_scale": -1}, "guidance_scale must be a number"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 1.5}, "seed must be"),
        ({"scheduler": "eulr"}, "eulr"),
        ({"scheduler": "ddim", "eta": 1.5}, "eta"),
        ({"eta": 0.5}, "eta"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "latents must be floating-point"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents are for 2 images"),
        ({"latents": torch.zeros(1, 4, 8, 8), "width": 128}, "latents are for 64 x 64 pixels"),
        ({"prompt": torch.zeros(1, 77, 5)}, "prompt embeddings must be of shape"),
        ({"output_type": "jpeg"}, "output_type must be"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(tiny, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        sd.SimpleSampler(tiny)(**{"prompt": PROMPT, **options})
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(("part", "stage"), [("text", "text encoder"), ("unet", "UNet"), ("vae", "VAE")])
def test_nan_names_the_stage_and_the_remedy(part, stage):
    model = make_model()
    weights = model.text.model if part == "text" else getattr(model, part)
    with torch.no_grad():
        for p in weights.parameters():
            p.fill_(torch.nan)
    with pytest.raises(sd.NotFiniteError, match=f"{stage}.* returned NaN or infinity.*float"):
        sd.SimpleSampler(model)(PROMPT, num_inference_steps=2)


def test_long_prompts_are_cut_with_a_warning_that_quotes(tiny):
    with pytest.warns(UserWarning, match="dropped.*never heard of"):
        sd.SimpleSampler(tiny)("star " * 75 + "never heard of", num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.SimpleSampler(tiny)("star " * 75, num_inference_steps=1)


def test_the_vae_may_have_a_dtype_of_its_own():
    model = make_model()
    model.vae.double()
    (image,) = sd.SimpleSampler(model)(PROMPT, num_inference_steps=2)
    assert image.size == (64, 64)


E = torch.zeros(1, 77, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": E, "negative_prompt_embeds": torch.zeros(1, 100, 64)},
            "prompt has 77 tokens and negative_.* 100",
        ),
        ({"prompt_embeds": torch.zeros(1, 100, 64)}, "prompt has 100 tokens and negative_prompt 77: give embeddings"),
        ({"prompt": torch.zeros(0, 77, 64)}, "prompt embeddings must be of shape .*not empty, not .0, 77, 64."),
        ({"prompt": torch.zeros(1, 0, 64)}, "prompt embeddings must be of shape .*not empty"),
        ({"prompt": E.long()}, "prompt embeddings must be .*floating-point.*torch.int64"),
        ({"prompt": E.to_sparse()}, "prompt embeddings must be .*dense.*torch.sparse_coo"),
        ({"prompt": E.to("meta")}, "prompt embeddings must be .*meta"),
        ({"prompt": E[0]}, "prompt embeddings must be of shape"),
        ({"prompt": E / 0}, "prompt embeddings have NaN or infinity in torch.float32: give finite ones"),
        ({"prompt": E.double() + 1e300}, "prompt embeddings have NaN or infinity in torch.float32"),
        ({"negative_prompt_embeds": E * torch.nan}, "negative_prompt embeddings have NaN"),
        ({"negative_prompt_embeds": torch.zeros(3, 77, 64)}, "negative_prompt has 3 entries for 1 prompts"),
        ({"prompt_embeds": ["a"]}, r"prompt_embeds must be a tensor, not \['a'\]"),
        ({"prompt": b"x" * 10_000_000}, "prompt must be a text"),
        ({"prompt": "x" * 10_000_000}, "A prompt must have at most 100,000 characters, not 10,000,000: shorten it"),
        ({"prompt": [None] * 1_000_000}, "prompt must be a text"),
        ({"latents": [1.0]}, "latents must be a tensor"),
    ],
)
def test_embeddings_and_texts_that_cannot_be_are_one_short_sentence(tiny, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        sd.SimpleSampler(tiny)(**{"prompt": PROMPT, **options})
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_both_halves_may_be_longer_than_one_prompt(tiny):
    longer = torch.cat([tiny.encode_prompt("a star"), tiny.encode_prompt("a ring")], dim=1)
    call = {"num_inference_steps": 1, "output_type": "latent"}
    assert sd.SimpleSampler(tiny)(longer, negative_prompt_embeds=longer / 2, **call).isfinite().all()


def test_numpys_numbers_are_numbers(tiny):
    plain = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 2.5, "height": 64, "width": 64, "eta": 0.5}
    kinds = {"seed": np.int64, "num_inference_steps": np.int32, "guidance_scale": np.float32, "height": np.uint16}
    given = {name: kinds.get(name, np.float64 if name == "eta" else np.int64)(value) for name, value in plain.items()}
    sampler = sd.SimpleSampler(tiny)
    ours = sampler(PROMPT, scheduler="ddim", num_images_per_prompt=np.int8(2), output_type="pt", **given)
    theirs = sampler(PROMPT, scheduler="ddim", num_images_per_prompt=2, output_type="pt", **plain)
    assert torch.equal(ours, theirs)
    request = sampler.request(PROMPT, scheduler="ddim", **given)
    assert {type(x) for x in (*request.seeds, request.height, request.scheduler.num_inference_steps)} == {int}
    for wrong in (np.bool_(True), np.float32(2), np.nan, True):
        with pytest.raises(ValueError, match="seed must be"):
            sampler.request(PROMPT, seed=wrong)


def test_no_negative_prompt_is_an_empty_one(tiny):
    sampler = sd.SimpleSampler(tiny)
    ours, theirs = (sampler.request(PROMPT, negative_prompt=nothing).negative for nothing in (None, ""))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("generator", "seed"),
        ("num_images", "num_images_per_prompt"),
        ("callback", "stream"),
        ("callback_on_step_end", "stream"),
        ("cfg_scale", "guidance_scale"),
        ("steps", "num_inference_steps"),
        ("wieght", "SimpleSampler"),
    ],
)
@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_arguments_of_others_are_told_what_to_do(tiny, name, word, kind):
    with pytest.raises(kind, match=rf"^Samplers take no argument {name}: .*{word}.*\.$"):
        sd.SimpleSampler(tiny)(PROMPT, **{name: 1})

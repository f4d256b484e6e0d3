"""UNet, VAE and text encoder against diffusers and transformers, with the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import sd
from sd.compare.reference import transformers_text, transformers_tokenizer
from sd.time_embedding import timestep_embedding
from tests.layouts import UNET, diffusers_unet, diffusers_vae, make_model

diffusers = pytest.importorskip("diffusers")

BOUND = 1e-10  # relative, in float64


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def inputs(model, height, width, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64).to(dtype)
    context = torch.randn(batch, 77, model.unet.config.context_dim, generator=generator, dtype=torch.float64).to(
        dtype
    )
    return x, torch.tensor([981.0, 17.25])[:batch], context


@pytest.fixture(scope="module")
def double():
    return make_model(dtype=torch.float64)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (9, 7), (5, 12), (1, 1)])
def test_unet(double, height, width):
    x, t, context = inputs(double, height, width)
    with torch.no_grad():
        got = double.unet(x, t, context)
        expected = diffusers_unet(double)(x, t, context).sample
    assert relative(got, expected) < BOUND


@pytest.mark.parametrize(
    "config",
    [
        sd.UNetConfig(model_channels=32, channel_mult=(1, 2), attention_resolutions=(1, 2), context_dim=24),
        sd.UNetConfig(model_channels=64, channel_mult=(1, 1, 2, 2), num_res_blocks=1, attention_resolutions=(2, 4),
                      num_heads=4, context_dim=64),
    ],
)  # fmt: skip
def test_unets_of_other_shapes(config):
    model = make_model(unet=config, dtype=torch.float64)
    x, t, context = inputs(model, 16, 8)
    with torch.no_grad():
        assert relative(model.unet(x, t, context), diffusers_unet(model)(x, t, context).sample) < BOUND


def test_vae(double):
    theirs = diffusers_vae(double)
    image = torch.rand(2, 3, 64, 104, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(image).latent_dist
        assert relative(double.vae.encode(image), posterior.mean * 0.18215) < BOUND
        drawn = double.vae.encode(image, generator=torch.Generator().manual_seed(5))
        assert relative(drawn, posterior.sample(torch.Generator().manual_seed(5)) * 0.18215) < BOUND
        latent = torch.randn(2, 4, 8, 13, dtype=torch.float64)
        before = latent.clone()
        assert relative(double.vae.decode(latent), theirs.decode(latent / 0.18215).sample) < BOUND
        assert torch.equal(latent, before)


def test_vae_refuses_odd_sizes(tiny):
    with pytest.raises(ValueError, match="20 x 16 cannot be encoded: both sides must be multiples of 8"):
        tiny.vae.encode(torch.zeros(1, 3, 16, 20))


def test_small_models_are_bit_identical_in_float32(tiny):
    x, t, context = inputs(tiny, 16, 24, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(tiny.unet(x, t, context), diffusers_unet(tiny)(x, t, context).sample)
        assert torch.equal(tiny.vae.decode(x), diffusers_vae(tiny).decode(x / 0.18215).sample)


def test_wrong_epsilons_would_be_seen(double):
    """1e-5 in place of the transformer's 1e-6 moves the result by little: the bound must be tighter."""
    x, t, context = inputs(double, 8, 8)
    with torch.no_grad():
        right = double.unet(x, t, context)
        norms = [m.norm for m in double.unet.modules() if isinstance(m, sd.unet.SpatialTransformer)]
        try:
            for norm in norms:
                norm.eps = 1e-5
            wrong = double.unet(x, t, context)
        finally:
            for norm in norms:
                norm.eps = 1e-6
    assert BOUND * 100 < relative(wrong, right) < 1e-3


def test_timestep_embedding():
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 501.5, 999.0])
    assert torch.equal(
        timestep_embedding(t, 320), get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    )


def test_sizes_of_the_full_model():
    with torch.device("meta"):
        unet, vae = sd.UNet(), sd.VAE()
    assert (sum(p.numel() for p in unet.parameters()), len(unet.state_dict())) == (859_520_964, 686)
    assert (sum(p.numel() for p in vae.parameters()), len(vae.state_dict())) == (83_653_863, 248)


def test_everything_is_trainable():
    model = make_model()
    x, t, context = inputs(model, 8, 8, dtype=torch.float32)
    model.unet(x, t, context).square().mean().backward()
    model.vae.decode(model.vae.encode(torch.rand(1, 3, 16, 16), torch.Generator().manual_seed(0))).mean().backward()
    for module in (model.unet, model.vae):
        dead = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        # Before a softmax, a bias of the keys moves all logits alike.
        assert [n for n in dead if not n.endswith("attn_1.k.bias")] == []


def test_chunked_attention_in_the_whole_model(double):
    x, t, context = inputs(double, 8, 8)
    with torch.no_grad():
        expected = double.unet(x, t, context), double.vae.decode(x)
        small = partial(sd.chunked_attention, chunk=10)
        with sd.use_attention(double.unet, small), sd.use_attention(double.vae, small):
            got = double.unet(x, t, context), double.vae.decode(x)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < BOUND


def test_text_encoder(double):
    """As StableDiffusionPipeline.encode_prompt does it."""
    prompts = ["a red star", "", "Über den Wolken: 123 stars!"]
    how = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    tokens = transformers_tokenizer(double.text)(prompts, **how)
    with torch.no_grad():
        expected = transformers_text(double.text)(tokens.input_ids)[0]
    assert torch.equal(double.encode_prompt(prompts), expected)
    assert expected.shape == (3, 77, UNET.context_dim)

"""The VAE by bands equals the whole, whatever the bands are and whatever is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sd
from sd.attention import chunked_attention
from sd.lean.bands import Bands, Choice, Gather, Given, Stored
from tests import ALL

CHOICES = [Choice(True, True), Choice(False, True), Choice(True, False), Choice(False, False)]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = sd.VAE(sd.VAEConfig(ch=16, num_groups=8)).double().eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
    return vae


def apart(x, y):
    return ((x - y).abs().max() / y.abs().max()).item()


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    size=st.sampled_from([1, 3_000, 20_000, 1 << 20]),
    choices=st.lists(st.sampled_from(CHOICES), max_size=14),
    seed=st.integers(0, 99),
)
def test_decoding_by_bands_is_decoding(vae, height, width, size, choices, seed):
    z = torch.randn(1, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    image = Bands(size, tuple(choices)).decode(vae, z)
    assert apart(image, vae.decode(z)) < 1e-12


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    size=st.sampled_from([1, 3_000, 20_000, 1 << 20]),
    choices=st.lists(st.sampled_from(CHOICES), max_size=10),
)
def test_encoding_by_bands_is_encoding(vae, height, width, size, choices):
    image = torch.rand(1, 3, 8 * height, 8 * width, dtype=torch.float64) * 2 - 1
    mean, logvar = Bands(size, tuple(choices)).encode(vae, image)
    wanted, wanted_logvar = vae.moments(image)
    assert apart(mean, wanted) < 1e-12
    assert apart(logvar, wanted_logvar) < 1e-12


def test_any_attention_will_do(vae):
    z = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    wanted, seen = vae.decode(z), []

    def mine(q, k, v):
        seen.append(q.shape)
        return chunked_attention(q, k, v, chunk=8)

    with sd.use_attention(vae, mine):
        assert apart(Bands().decode(vae, z), wanted) < 1e-12
    assert seen == [(1, 1, 35, 64)]


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(392, 264), *([(512, 512)] if ALL else [])])
def test_full_size_decoding_without_seams(height, width):
    torch.manual_seed(0)
    vae = sd.VAE(sd.VAEConfig(ch=32)).double().eval().requires_grad_(False)
    z = torch.randn(1, 4, height // 8, width // 8, dtype=torch.float64)
    image = Bands(1 << 19, (Choice(False, False),) * 14).decode(vae, z)
    assert apart(image, vae.decode(z)) < 1e-12


@settings(deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=6), offset=st.floats(-1e3, 1e3))
def test_moments_of_bands_are_those_of_the_whole(cuts, offset):
    x = torch.randn(1, 8, sum(cuts), 5, dtype=torch.float64) + offset * torch.arange(8).view(1, 8, 1, 1)
    gather = Gather(4)
    for band in x.split(cuts, dim=2):
        gather.add(band)
    var, mean = torch.var_mean(x.view(4, -1), dim=1, correction=0)
    assert torch.allclose(gather.total().mean, mean, rtol=1e-12, atol=1e-10)
    assert torch.allclose(gather.total().var, var, rtol=1e-9, atol=1e-9)


def test_bands_are_let_go_when_no_row_is_needed_again():
    like = Given(torch.zeros(1, 2, 9, 3))
    x = Stored(like, 2)
    x.bands = [torch.full((1, 2, min(2, 9 - a), 3), float(a)) for a in range(0, 9, 2)]
    assert torch.equal(x.rows(1, 6)[0, 0, :, 0], torch.tensor([0.0, 2, 2, 4, 4]))
    x.release(5)
    assert [band is None for band in x.bands] == [True, True, False, False, False]
    assert torch.equal(x.rows(5, 9)[0, 0, :, 0], torch.tensor([4.0, 6, 6, 8]))

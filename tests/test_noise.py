"""Noise as an NVIDIA GPU draws it, on any machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sd
from sd.noise import noise_source, philox
from tests.layouts import make_model

# Random123's own table of known answers (kat_vectors, philox4x32 10)
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, words):
    counters = np.array([[int(w, 16)] for w in counter.split()], np.uint64)
    low, high = (int(w, 16) for w in key.split())
    got = philox(counters, (low, high))
    assert [f"{int(w):08x}" for w in got[:, 0]] == words.split()


def test_its_numbers_are_normal_and_differ_from_draw_to_draw():
    draw = noise_source(7, "cuda")
    first, second = draw((1, 4, 64, 64), torch.float32), draw((1, 4, 64, 64), torch.float32)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    for x in (first, second):
        assert abs(x.mean()) < 0.03
        assert abs(x.std() - 1) < 0.03
        assert x.abs().max() < 6
    assert torch.equal(noise_source(7, "cuda")((1, 4, 64, 64), torch.float32), first)
    assert torch.equal(noise_source(7, "cuda")((1, 4, 64, 64), torch.float16), first.half())  # the same in any dtype
    assert not torch.equal(noise_source(7 + (1 << 32), "cuda")((1, 4, 64, 64), torch.float32), first)


# The angle has half a unit of 2 pi in float32 (2.4e-7) of rounding and the sine as much again, times a radius of up
# to 6.8; 2.3e-6 was the most over 200,000 values on an H200.
GPU_ROUNDING = 4e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 64, 64), (1, 4, 96, 128)])
def test_it_is_what_a_gpu_draws(shape):
    generator = torch.Generator("cuda").manual_seed(2**33 + 5)
    draw = noise_source(2**33 + 5, "cuda")
    for _ in range(3):
        expected = torch.randn(shape, generator=generator, device="cuda").cpu()
        torch.testing.assert_close(draw(shape, torch.float32), expected, rtol=0, atol=GPU_ROUNDING)


@pytest.mark.parametrize(
    ("seed", "draws"),  # of an H200, torch 2.11
    [
        (
            0,
            [
                [-0.92466241, -0.42534423, -2.6438458, 0.14518386],
                None,
                [2.5440972, -0.71634889, -0.49336892, 0.12671055],
            ],
        ),
        (
            2**40 + 5,
            [
                [1.0671084, -1.1719363, 0.71284592, 0.028116509],
                None,
                [-0.74161267, 1.1338202, -0.95113301, -0.35136524],
            ],
        ),
    ],
)
def test_it_is_what_a_gpu_drew(seed, draws):
    draw = noise_source(seed, "cuda")
    for expected in draws:
        values = draw((4,), torch.float32)
        if expected is not None:
            torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=GPU_ROUNDING)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
def test_pictures_from_it(scheduler):
    model = make_model(dtype=torch.float64)
    call = {"num_inference_steps": 3, "scheduler": scheduler, "rng": "cuda", "output_type": "latent"}
    sampler = sd.SimpleSampler(model)
    both = sampler(["a star", "a ring"], seed=3, **call)
    torch.testing.assert_close(sampler("a ring", seed=4, **call), both[1:], rtol=1e-8, atol=1e-8)
    assert not torch.allclose(sampler("a ring", seed=4, **call | {"rng": "cpu"}), both[1:], atol=0.1)
    lean = sd.LeanSampler(model)(["a star", "a ring"], seed=3, **call)
    torch.testing.assert_close(lean, both, rtol=1e-8, atol=1e-8)


def test_another_source_is_refused(tiny):
    with pytest.raises(ValueError, match="rng must be cpu or cuda, not 'gpu'"):
        sd.SimpleSampler(tiny)("a star", rng="gpu")

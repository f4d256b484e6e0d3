"""LoRA in every way to run, and its scale studied: merged, streamed, fast, changed for a while and by step."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import sd
from sd import study
from sd.adapt.adapters import Adapters
from sd.lean import plan
from sd.lean.plan import Adapting
from sd.lean.sampler import cost_of
from sd.lean.stream import Streamed, Weights
from sd.operations import copy_of
from sd.weights.unread import patches_of, read_weights, target
from tests import loras
from tests.layouts import TEXT, make_model
from tests.loras import KINDS, layers_of, lora_tensors, write_lora

CALL = {
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "height": 32,
    "width": 32,
    "output_type": "latent",
    "scheduler": "ddim",
}
SIZES = {k: v for k, v in CALL.items() if k != "output_type"}
F64 = torch.float64


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A small model as a float16 file, and two LoRAs of all its layers but for those that no 4 x 2 divides."""
    folder = tmp_path_factory.mktemp("lora")
    unet = sd.UNetConfig(
        model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), context_dim=64
    )
    model = make_model(unet)
    sd.save(model, folder / "half.safetensors", torch.float16)
    places = [p for p in layers_of(model, nn.Linear, nn.Conv2d) if p[1] not in ("input_blocks.0.0", "out.2")]
    for name, kinds, seed in (("style", KINDS, 0), ("other", {"LoRA": loras.lora}, 7)):
        tensors = {}
        linear = [kind for n, kind in kinds.items() if n not in loras.OF_CONVOLUTIONS]
        for n, place in enumerate(places):
            w = loras.weight_of(model, *place)
            usable = [*kinds.values()] if w.ndim > 2 and w.shape[2] == 3 else linear
            tensors |= lora_tensors(model, [place], usable[n % len(usable)], seed=100 * n + seed)[0]
        tensors |= {
            "lora_unet_conv_norm_out.w_norm": loras.randn(32),
            "lora_unet_conv_norm_out.b_norm": loras.randn(32),
        }
        tensors |= {"lora_unet_conv_out.diff_b": loras.randn(4)}
        write_lora(
            folder / f"{name}.safetensors", {n: 0.5 * t if n.endswith("up.weight") else t for n, t in tensors.items()}
        )
    return folder


def load(half, *names, dtype=F64, scale=0.7):
    model = sd.load(half / "half.safetensors", dtype=dtype)
    for name in names:
        model = sd.lora(model, half / f"{name}.safetensors", scale)
    return model


@pytest.fixture(scope="module")
def wanted(half):
    """What the textbook draws with both, merged."""
    return sd.SimpleSampler(load(half, "style", "other"))("a star", **CALL)


def near(got, wanted, bound=1e-10):
    return (got - wanted).abs().max() <= bound * wanted.abs().max()


# ---- streamed


@pytest.mark.parametrize("pieces", [[1 << 22], [700]])
def test_streamed_is_merged(half, wanted, monkeypatch, pieces):
    """Also where every piece is smaller than a row, and no weight is ever merged."""
    monkeypatch.setattr(plan, "PIECES", pieces)
    monkeypatch.setattr(plan, "TEXT_PIECE", pieces[0])
    monkeypatch.setattr("sd.lean.sampler.TEXT_PIECE", pieces[0])
    model = load(half, "style", "other")
    sampler = sd.LeanSampler(model, 10**12)
    sampler.memory = plan.least(
        sampler.plan("a star", **{k: v for k, v in CALL.items() if k != "output_type"}).job
    ).peak
    assert near(sampler("a star", **CALL), wanted)
    assert {p.dtype for part in (model.unet, model.text.model) for p in part.parameters()} == {torch.float16}
    assert target(model.unet) is not None
    sampler.memory = 10**12  # all of them kept
    assert near(sampler("a star", **CALL), wanted)
    merged = load(half, "style", "other")
    read_weights(merged.unet)
    assert near(sd.LeanSampler(merged, 10**12)("a star", **CALL), wanted)


def test_weights_in_memory_are_streamed_with_it_as_well(half, wanted):
    model = sd.load(half / "half.safetensors", dtype=F64)
    for part in (model.unet, model.text.model):
        read_weights(part)
    before = {n: p.clone() for n, p in model.unet.named_parameters()}
    for name in ("style", "other"):
        model = sd.lora(model, half / f"{name}.safetensors", 0.7)
    assert near(sd.LeanSampler(model, 10**12)("a star", **CALL), wanted)
    assert all(torch.equal(p, before[n]) for n, p in model.unet.named_parameters())  # still as without


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_in_float32(half, dtype):
    model = load(half, "style", dtype=dtype)
    streamed, merged = Weights(dtype), load(half, "style", dtype=dtype).unet
    copied = copy_of(model.unet, Streamed(streamed))
    streamed.patch(copied, patches_of(model.unet))
    read_weights(merged)
    for name, p in copied.named_parameters():
        (piece,) = streamed.parts((p, slice(0, 5)))
        w = merged.get_parameter(name)[:5]
        assert (piece - w).abs().max() <= torch.finfo(dtype).eps * w.abs().max(), name


def test_the_plan_counts_what_is_made_beside_a_piece(half):
    def plan_of(*names):
        return sd.LeanSampler(load(half, *names, dtype=torch.float32), 10**12).plan("a star", **SIZES).job

    assert plan_of().adapting == [Adapting(), Adapting()]
    low_rank, all_kinds = plan_of("other").adapting, plan_of("style").adapting
    assert low_rank[1].each == 0 < all_kinds[1].each  # a product is added without anything of the piece's size
    assert 0 < low_rank[0].once < all_kinds[0].once
    assert cost_of(patches_of(load(half, "style").unet), 8).each == 2 * all_kinds[0].each
    job = plan_of("style")
    assert plan.least(job).peaks["UNet"] > plan.least(plan_of()).peaks["UNet"]


# ---- fast


def test_fast_draws_the_same(half):
    model = load(half, "style", "other", dtype=torch.float32)
    got = sd.SimpleSampler(sd.fast(model))("a star", **CALL)
    assert near(got, sd.SimpleSampler(model)("a star", **CALL), 1e-3)


# ---- its scale


def samplers(half, way):
    model = load(half, "style", "other", dtype=F64 if way in ("simple", "lean") else torch.float32)
    if way == "lean":
        return sd.LeanSampler(model, 10**12)
    return sd.SimpleSampler(sd.fast(model) if way == "fast" else model)


@pytest.mark.parametrize("way", ["simple", "fast", "lean"])
def test_the_scale_for_a_while(half, way):
    """What a model with that scale from the start draws; and afterwards the same bits as before."""
    sampler = samplers(half, way)
    before = sampler("a star", **CALL)
    lower = sd.lora(load(half, "style", dtype=sampler.model.dtype), half / "other.safetensors", 0.2)
    with study.scale(sampler, "other", 0.2):
        got = sampler("a star", **CALL)
    assert near(got, sd.SimpleSampler(lower)("a star", **CALL), 1e-3 if way == "fast" else 1e-10)
    with study.scale(sampler, "other", 0), study.scale(sampler, "style", 0.0):
        plain = sampler("a star", **CALL)
    without = sd.load(half / "half.safetensors", dtype=sampler.model.dtype)
    again = type(sampler)(sd.fast(without) if way == "fast" else without)
    assert torch.equal(plain, again("a star", **CALL))
    assert torch.equal(sampler("a star", **CALL), before)
    assert not near(got, before, 1e-2)
    assert [adapter.scale for adapter in sampler.model.adapters] == [0.7, 0.7]


def test_the_scale_by_step(half):
    """By a function, and by hand while steps are streamed; merged anew at each step, and streamed."""
    drawn = {}
    options = SIZES | {"num_inference_steps": 3}
    for way in ("simple", "lean", "fast"):
        sampler = samplers(half, way)
        with study.scale(sampler, "style", lambda step: {"unet": 0.3 * step, "text": 0.1}):
            drawn[way] = sampler("a star", **options, output_type="latent")
        with study.scale(sampler, "style", {"unet": 0.0, "text": 0.1}) as change:
            for step in sampler.stream("a star", **options):
                change({"unet": 0.3 * (step.index + 1), "text": 0.1})
        assert torch.equal(step.latents, drawn[way])
        with study.scale(sampler, "style", {"unet": 0.3, "text": 0.1}):
            assert not near(sampler("a star", **options, output_type="latent"), drawn[way], 1e-2)
    assert near(drawn["lean"], drawn["simple"])
    with study.scale(
        slow := samplers(half, "simple, float32"), "style", lambda step: {"unet": 0.3 * step, "text": 0.1}
    ):
        assert near(drawn["fast"], slow("a star", **options, output_type="latent"), 1e-3)


def test_the_scale_of_an_unread_model_is_the_one_that_it_is_read_with(half, wanted):
    model = load(half, "style", "other")
    with study.scale(model, "other", 0.2):
        read_weights(model.unet)
    assert near(sd.SimpleSampler(model)("a star", **CALL), wanted)


def test_the_scale_is_restored_after_an_exception(half, wanted):
    model = load(half, "style", "other")
    before = study.scale(model, "other", 0.2)
    before.__enter__()
    sd.SimpleSampler(model)("a star", **CALL)
    with pytest.raises(RuntimeError):
        before.gen.throw(RuntimeError())
    assert torch.equal(sd.SimpleSampler(model)("a star", **CALL), wanted)
    assert not model.unet._forward_pre_hooks


@pytest.mark.parametrize(("name", "value"), [("nobody", 0.5), ("style", float("nan")), ("style", "x")])
def test_what_cannot_be_scaled_is_one_sentence(half, name, value):
    model = load(half, "style")
    with pytest.raises(ValueError, match=r"adapter|scale must be"), study.scale(model, name, value):
        pass
    with (
        pytest.raises(ValueError, match=r"sd\.lora adds one"),
        study.scale(sd.load(half / "half.safetensors"), name, 1),
    ):
        pass
    assert isinstance(model.adapters, Adapters)


def test_instruments_see_the_adapted_model(half):
    model = load(half, "style")
    seen = []
    with (
        study.edit(model, {"middle_block": lambda out, at: seen.append(at.step)}),
        study.attention_maps(model) as maps,
    ):
        sd.SimpleSampler(model)("a star", **CALL)
    assert seen == [0, 1]
    assert maps.tokens([1]).shape == (32, 32)


MEASURE = """
import os, sys, threading, time
import torch
torch.set_num_threads(2)
def anonymous():
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
base, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
import sd
sampler = sd.LeanSampler(sd.lora(sd.load(sys.argv[1]), sys.argv[2]), int(sys.argv[3]))
call = dict(num_inference_steps=1, scheduler="ddim", height=512, width=512)
plan = sampler.plan("a horse", **call)
sampler("a horse", **call)
done = True; thread.join()
print(plan.peak, peak - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_predicted_peak_is_the_measured_one(tmp_path):
    """A third of the full widths, as in test_lean.py: large tensors, few operations."""
    unet, vae = sd.UNetConfig(model_channels=96), sd.VAEConfig(ch=96)
    model = make_model(unet, vae, replace(TEXT, hidden_size=768, num_attention_heads=12), size=512)
    sd.save(model, tmp_path / "third.safetensors", torch.float16)
    tensors, _ = lora_tensors(model, list(layers_of(model, nn.Linear)), loras.lora)
    path = write_lora(tmp_path / "style.safetensors", {n: t.half() for n, t in tensors.items()})
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, tmp_path / "third.safetensors", path, "350000000"]
    predicted, measured = map(int, subprocess.run(command, capture_output=True).stdout.split())
    assert predicted <= 350_000_000
    assert abs(measured / predicted - 1) < 0.15, (predicted, measured)

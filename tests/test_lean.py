"""The lean sampler draws the simple one's picture, keeps to its plan, and leaves the model as it was."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import sd
from sd.compare.reference import random_controlnet
from sd.lean import plan
from sd.lean import sampler as lean
from sd.lean.plan import bytes_of
from sd.lean.sampler import LeanNetwork, Parts, large_weights
from sd.lean.stream import Streamed, Weights
from sd.loader import save
from sd.operations import TEXTBOOK, copy_of
from tests import ALL
from tests.layouts import TEXT, make_model

CALL = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 48, "width": 40, "seed": 5}


@pytest.fixture
def cut(monkeypatch):
    """Cuts that are small enough for a small model to be cut, and no memory that counts as the libraries'."""
    monkeypatch.setattr(plan, "PIECES", [4000, 500])
    monkeypatch.setattr(plan, "BANDS", [4000, 500])
    monkeypatch.setattr(plan, "TEXT_PIECE", 500)
    monkeypatch.setattr(lean, "PROCESS", 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tiny):
    """The small model as a float16 file: in any other dtype its weights have to be copied to be used."""
    path = tmp_path_factory.mktemp("lean") / "tiny.safetensors"
    save(tiny, path, dtype=torch.float16)
    return path


def least(sampler, **call):
    sampler.memory = 10**12
    return plan.least(sampler.plan(["a", "b"], **call).job).peak


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "lms"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_picture_is_the_simple_sampler_s(source, cut, scheduler, guidance_scale):
    call = CALL | {"scheduler": scheduler, "guidance_scale": guidance_scale, "output_type": "pt"}
    wanted = sd.SimpleSampler(sd.load(source, dtype=torch.float64))(["a", "b"], **call)
    sampler = sd.LeanSampler(sd.load(source, dtype=torch.float64, lazy=True))
    bottom = least(sampler, **{k: v for k, v in call.items() if k != "output_type"})
    for memory in (bottom, int(bottom * 1.3), 2 * bottom, 10**12):
        sampler.memory = memory
        assert (sampler(["a", "b"], **call) - wanted).abs().max() < 1e-10


def test_the_least_memory_cuts_everything(source, cut):
    sampler = sd.LeanSampler(sd.load(source, lazy=True))
    sampler.memory = least(sampler, **CALL)
    small = sampler.plan(["a", "b"], **CALL)
    assert small.halves
    assert small.piece == plan.PIECES[-1]
    sampler.memory = 10**12
    large = sampler.plan(["a", "b"], **CALL)
    assert large.kept == large.job.streamable > 0
    assert not large.halves
    assert all(choice.hidden for choice in large.choices)
    assert "100%" in str(large)


def test_less_than_the_least_is_refused_and_the_least_is_named(source):
    sampler = sd.LeanSampler(sd.load(source, lazy=True), memory="1MB")
    with pytest.raises(ValueError, match=r"1 MB of memory is too little for 40 x 48: the least is \d+ MB"):
        sampler("a", **CALL)


def test_stream_and_several_prompts(source, cut):
    simple = sd.SimpleSampler(sd.load(source, dtype=torch.float64))
    sampler = sd.LeanSampler(sd.load(source, dtype=torch.float64, lazy=True), memory=10**12)
    call = CALL | {"negative_prompt": "c", "num_images_per_prompt": 2}
    for ours, theirs in zip(sampler.stream(["a", "b"], **call), simple.stream(["a", "b"], **call), strict=True):
        assert (ours.noise - theirs.noise).abs().max() < 1e-10
        assert ours.timestep == theirs.timestep


def test_a_model_in_memory_is_used_as_it_is(tiny):
    before = dict(tiny.unet.named_parameters())
    wanted = sd.SimpleSampler(tiny)("a", **CALL, output_type="pt")
    assert (sd.LeanSampler(tiny)("a", **CALL, output_type="pt") - wanted).abs().max() < 1e-4
    assert all(p is before[n] for n, p in tiny.unet.named_parameters())


def test_the_model_that_is_given_is_not_touched(tiny):
    """Not while another draws with it, either: the steps of the two samplers take turns."""
    wanted = [step.latents for step in sd.SimpleSampler(tiny).stream("a", **CALL)]
    simple, lean_ = sd.SimpleSampler(tiny).stream("a", **CALL), sd.LeanSampler(tiny).stream("a", **CALL)
    for latents in wanted:
        assert (next(lean_).latents - latents).abs().max() < 1e-4
        assert all("forward" not in vars(m) and getattr(m, "ops", TEXTBOOK) is TEXTBOOK for m in tiny.unet.modules())
        assert torch.equal(next(simple).latents, latents)


def test_decoding_takes_the_attention_that_the_vae_has(tiny):
    seen = []

    def mine(q, k, v):
        seen.append(q.shape)
        return sd.attention.attention(q, k, v)

    with sd.use_attention(tiny.vae, mine):
        sd.LeanSampler(tiny).decode(torch.randn(1, 4, 6, 5))
    assert len(seen) == 1


def test_pictures_are_decoded_alike_whatever_was_drawn_before(source, cut):
    """What `decode` does depends on its latents alone."""
    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    fresh = sd.LeanSampler(sd.load(source), memory=10**12)
    wanted = fresh.decode(latents, "pt")
    used = sd.LeanSampler(sd.load(source), memory=10**12)
    used("a", **CALL | {"height": 64, "width": 64})
    assert torch.equal(used.decode(latents, "pt"), wanted)


def test_layers_in_pieces_are_the_layers(tiny):
    torch.manual_seed(0)
    model = make_model().to(dtype=torch.float16)
    x, t = torch.randn(2, 4, 6, 7, dtype=torch.float64), torch.tensor([3, 700])
    context = torch.randn(2, 77, model.unet.config.context_dim, dtype=torch.float64)
    whole = make_model().to(dtype=torch.float16).to(dtype=torch.float64).unet
    wanted = whole(x, t, context)
    for size in (1, 300, 5000, 1 << 20):
        unet = copy_of(model.unet, Streamed(Weights(torch.float64, size=size)))
        with torch.no_grad():
            assert (unet(x, t, context) - wanted).abs().max() < 1e-10


def test_one_token_is_not_added_to_the_bias(tiny):
    layer = tiny.unet.middle_block[1].transformer_blocks[0].ff
    x, before = torch.randn(1, 1, layer.net[2].out_features), layer.net[2].bias.clone()
    copied = copy_of(layer, Streamed(Weights(torch.float32)))
    for _ in range(2):
        torch.testing.assert_close(copied(x), layer(x))
    assert torch.equal(layer.net[2].bias, before)


@pytest.mark.parametrize("name", ["*.attn2.to_k", "*.emb_layers", "*.emb_layers.1"])
def test_edits_act_once_on_what_is_computed_beforehand(tiny, name):
    edits = {name: lambda out, at: torch.cat([out[at.uncond], 0.5 * out[at.cond]])}
    with sd.study.edit(tiny, edits):
        wanted = sd.SimpleSampler(tiny)("a", **CALL, output_type="latent")
        found = sd.LeanSampler(tiny)("a", **CALL, output_type="latent")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - sd.SimpleSampler(tiny)("a", **CALL, output_type="latent")).abs().max() > 1e-3


def test_what_is_kept_stays_within_its_budget(source):
    unet = sd.load(source, lazy=True).unet
    weights = Weights(torch.float32)
    used = weights.keep(large_weights(unet), 50_000)
    assert 0 < used <= 50_000
    assert used == sum(w.numel() * 4 for w in weights.kept.values())
    weights.release()
    assert not weights.kept


def test_weights_of_time_and_text_are_used_once(source):
    model = sd.load(source, lazy=True)
    sampler = sd.LeanSampler(model)
    with torch.no_grad():
        request = sampler.request("a", **CALL)
    unet = LeanNetwork(model.unet, Weights(torch.float32), request, [request.context])
    once = [m for n, m in unet.network.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v", "emb_layers.1"))]
    for module in once:
        module.weight = None  # whoever asks for it now fails
    x = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        assert torch.isfinite(unet(x, torch.tensor([float(request.scheduler.timesteps[0])]), Parts(0, 1))).all()


def test_lazy_models_stay_in_the_file_until_they_are_asked_for(source):
    model = sd.load(source, lazy=True)
    assert model.dtype == torch.float32
    assert all(p.dtype == torch.float16 for p in model.unet.parameters())
    wanted = sd.SimpleSampler(sd.load(source))("a", **CALL, output_type="pt")
    assert torch.equal(sd.SimpleSampler(model)("a", **CALL, output_type="pt"), wanted)
    assert all(p.dtype == torch.float32 for p in model.unet.parameters())


def test_every_kind_of_layer_of_a_model_is_streamed(tiny):
    """A layer with parameters that `Streamed` does not know would compute in the file's dtype."""
    for part in (tiny.unet, tiny.text.model):
        for module in part.modules():
            own = list(module.parameters(recurse=False))
            assert not own or type(module) in Streamed.layers


def test_nan_in_the_decoded_image_is_an_error(tiny, monkeypatch):
    sampler = sd.LeanSampler(tiny)
    with pytest.raises(sd.NotFiniteError, match="VAE"):
        sampler.decode(torch.full((1, 4, 2, 2), torch.nan))


def test_a_file_that_shrinks_is_one_sentence(source, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(source.read_bytes())
    sampler = sd.LeanSampler(sd.load(path))
    steps = sampler.stream("a", **CALL)
    next(steps)
    os.truncate(path, path.stat().st_size - 10_000)  # reading there through the memory map would be fatal
    with pytest.raises(sd.LoadError, match="has shrunk"):
        next(steps)


def test_a_file_that_is_deleted_or_replaced_does_no_harm(source, tmp_path):
    path = tmp_path / "copy.safetensors"
    path.write_bytes(source.read_bytes())
    wanted = [step.latents for step in sd.LeanSampler(sd.load(source)).stream("a", **CALL)]
    steps = sd.LeanSampler(sd.load(path)).stream("a", **CALL)
    got = [next(steps).latents]
    path.unlink()
    path.write_bytes(b"shorter")
    got += [step.latents for step in steps]
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_a_device_without_memory_is_one_sentence(source, monkeypatch):
    sampler = sd.LeanSampler(sd.load(source, lazy=True), memory="1GB")

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lean.LeanNetwork, "__call__", fail)
    with pytest.raises(ValueError, match=r"in the UNet \(it should take \d+ MB\): pass memory="):
        sampler("a", **CALL)


@pytest.mark.parametrize(
    ("text", "size"),
    [("600MB", 600_000_000), ("1.5 GB", 1_500_000_000), ("1GiB", 2**30), ("1024", 1024), (77, 77), ("3kb", 3000)],
)
def test_memory_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "12 parsecs", "1e9", True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="600MB"):
        bytes_of(text)


def test_free_memory_is_something():
    assert lean.free_memory(torch.device("cpu")) > 1_000_000


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
sampler = sd.LeanSampler(sd.load(sys.argv[1], lazy=True), int(sys.argv[2]))
call = dict(num_inference_steps=1, scheduler="ddim", height=512, width=512)
if nets := [sd.load_controlnet(path, model=sampler.model) for path in sys.argv[3:]]:
    call |= dict(controlnet=nets, control_image=[torch.rand(1, 3, 512, 512) for _ in nets])
plan = sampler.plan("a horse", **call)
sampler("a horse", **call)
done = True; thread.join()
print(plan.peak, peak - base)
"""


PEAKS = [(600_000_000, 0), (400_000_000, 2), (340_000_000, 0), (340_000_000, 1)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("memory", "nets"), PEAKS if ALL else PEAKS[:2])
def test_the_predicted_peak_is_the_measured_one(tmp_path, memory, nets):
    """A third of the full widths: large tensors, few operations."""
    unet, vae = sd.UNetConfig(model_channels=96), sd.VAEConfig(ch=96)
    path, control = tmp_path / "third.safetensors", tmp_path / "control.safetensors"
    model = make_model(unet, vae, replace(TEXT, hidden_size=768, num_attention_heads=12), size=512)
    save(model, path, torch.float16)
    sd.save_controlnet(random_controlnet(model), control, torch.float16)
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, path, str(memory), *nets * [control]]
    done = subprocess.run(command, capture_output=True)
    predicted, measured = map(int, done.stdout.split())
    assert predicted <= memory
    assert abs(measured / predicted - 1) < 0.15

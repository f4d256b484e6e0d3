"""What only a machine with an NVIDIA GPU can show: the same numbers there, and the same pictures by every sampler."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import sd
from sd import unet
from sd.compare.measure import relative
from sd.compare.reference import random_model_of
from sd.study import attention_maps, trace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
PROMPT = "a large red star on a white background"
CALL = {"num_inference_steps": 8, "seed": 3, "output_type": "pt"}


@pytest.fixture
def exact_products():
    """Products of float32 in float32, not in TF32, which convolutions are computed in if nothing is said."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_parts_compute_what_they_compute_on_the_cpu(dtype, bound, exact_products, monkeypatch):
    # Its sines are float32 also in a float64 model, and their last bit differs from device to device.
    sines = unet.timestep_embedding
    monkeypatch.setattr(unet, "timestep_embedding", lambda t, *args: sines(t.cpu(), *args).to(t.device))
    here, there = (random_model_of("small", dtype) for _ in range(2))
    for part in (there.unet, there.vae):
        part.to("cuda")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=g, dtype=dtype)
    t = torch.tensor([481, 20])
    context = torch.randn(2, 77, here.unet.config.context_dim, generator=g, dtype=dtype)
    with torch.no_grad():
        got = there.unet(x.cuda(), t.cuda(), context.cuda())
        assert relative(got.cpu(), here.unet(x, t, context)) < bound
        assert relative(there.vae.decode(x.cuda()).cpu(), here.vae.decode(x)) < bound
        picture = torch.rand(1, 3, 64, 64, generator=g, dtype=dtype) * 2 - 1
        assert relative(there.vae.encode(picture.cuda()).cpu(), here.vae.encode(picture)) < bound


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "lms", "dpmpp_2m", "euler_a", "dpmpp_sde", "unipc"])
def test_a_picture_is_that_of_the_cpu(scheduler, exact_products):
    here = sd.SimpleSampler(sd.load("shapes"))(PROMPT, scheduler=scheduler, **CALL)
    there = sd.SimpleSampler(sd.load("shapes", device="cuda", dtype=torch.float32))(
        PROMPT, scheduler=scheduler, **CALL
    )
    assert (here - there.cpu()).abs().max() < 0.02  # errors of float32 grow over the steps


@pytest.mark.parametrize("memory", [None, "300MB", "60MB"])
def test_lean_draws_what_simple_draws(memory, exact_products):
    model = sd.load("shapes", device="cuda", dtype=torch.float32)
    expected = sd.SimpleSampler(model)(PROMPT, **CALL)
    got = sd.LeanSampler(model, memory)(PROMPT, **CALL)
    assert (got.cpu() - expected.cpu()).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fast_draws_what_the_textbook_draws(dtype):
    model = sd.load("shapes", device="cuda", dtype=dtype)
    expected = sd.SimpleSampler(model)(PROMPT, **CALL).float()
    got = sd.SimpleSampler(sd.fast(model))(PROMPT, **CALL).float()
    assert got.isfinite().all()
    assert (got - expected).abs().mean() < 0.02


def test_the_instruments_see_what_they_see_on_the_cpu(exact_products):
    call = CALL | {"num_inference_steps": 3}
    del call["output_type"]
    traces, maps = [], []
    for device in ("cpu", "cuda"):
        sampler = sd.SimpleSampler(sd.load("shapes", device=device, dtype=torch.float32))
        traces.append(trace(sampler, PROMPT, **call))
        with attention_maps(sampler) as seen:
            sampler(PROMPT, **call)
        maps.append(seen.word("star"))
    assert (traces[0].latents - traces[1].latents).abs().max() < 1e-3
    assert (maps[0] - maps[1].cpu()).abs().max() < 1e-3


def test_training_by_graphs_is_training(tmp_path):
    """Steps that are replayed as CUDA graphs move the weights as eager ones do, in batches of two sizes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shapes"))
    from fitting import Run, fit

    results = []
    for graphs in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)).cuda()

        def batch_of(step):
            return (torch.randn(4 if step < 20 else 2, 3, device="cuda"),)

        def loss_of(x, net=net):
            return (net(x) - x.sum(1, keepdim=True)).square().mean()

        run = Run(tmp_path / str(graphs), "cuda", graphs=graphs)
        run.folder.mkdir()
        fit("net", net, batch_of, loss_of, run, {"steps": 40, "lr": 1e-2})
        results.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert (results[0] - results[1]).abs().max() < 1e-5


def test_pictures_in(exact_products):
    ramp = torch.linspace(0, 1, 128)
    call = CALL | {"image": ramp.expand(1, 3, 128, 128), "mask_image": (ramp > 0.5).float().expand(1, 1, 128, 128)}
    here = sd.SimpleSampler(sd.load("shapes"))(PROMPT, **call)
    for kind in (sd.SimpleSampler, sd.LeanSampler):
        there = kind(sd.load("shapes", device="cuda", dtype=torch.float32))(PROMPT, **call)
        assert (here - there.cpu()).abs().max() < 0.02


def test_a_graph_of_the_unet_is_what_the_unet_computes(exact_products):
    model = random_model_of("small", torch.float16).to("cuda")
    fast = sd.fast(model)
    g = torch.Generator().manual_seed(0)

    def given(batch, side=8):
        x = torch.randn(batch, 4, side, side, generator=g).cuda().half()
        context = torch.randn(batch, 77, model.unet.config.context_dim, generator=g).cuda().half()
        return x, torch.full((batch,), 481.0, device="cuda"), context

    with torch.no_grad():
        for batch, side in ((2, 8), (1, 8), (2, 16), (2, 8)):
            for _ in range(2):
                inputs = given(batch, side)
                assert relative(fast.unet(*inputs), model.unet(*inputs)) < 1e-2
        before, first = fast.unet(*inputs), given(2)
        assert torch.equal(fast.unet(*inputs), before)
        fast.unet.out[-1].weight.mul_(2)  # in place: the graph sees it
        fast.unet.out[-1].bias.mul_(2)
        assert relative(fast.unet(*inputs), 2 * before) < 1e-2
        fast.unet.out[-1].bias.data = torch.zeros_like(fast.unet.out[-1].bias)  # elsewhere: it is recorded again
        assert not torch.equal(fast.unet(*inputs), 2 * before)
        heard = []
        handle = fast.unet.middle_block.register_forward_hook(lambda *_: heard.append(1))
        fast.unet(*first), fast.unet(*first)
        handle.remove()
        assert len(heard) == 2
        after = fast.unet(*inputs)
        with sd.use_attention(fast.unet, lambda q, k, v: torch.zeros_like(q)):
            assert not torch.equal(fast.unet(*inputs), after)
        assert torch.equal(fast.unet(*inputs), after)


def test_pictures_by_graphs_are_those_of_the_textbook():
    model = sd.load("shapes", device="cuda")
    fast, plain = sd.SimpleSampler(sd.fast(model)), sd.SimpleSampler(model)
    for prompt in (PROMPT, [PROMPT, "a blue ring on a black background"]):
        for guidance in (7.5, 1.0):
            call = CALL | {"guidance_scale": guidance}
            assert (fast(prompt, **call) - plain(prompt, **call)).abs().max() < 0.05

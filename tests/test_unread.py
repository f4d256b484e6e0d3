"""Weights that stay in their file until somebody computes with them, and what may happen to a model meanwhile."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref

import pytest
import torch

import sd
from sd.weights import unread
from sd.weights.unread import computes_in
from tests.layouts import compvis_tensors


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """A file in half precision, which computes in float32 on the CPU."""
    path = tmp_path_factory.mktemp("unread") / "half.safetensors"
    sd.save(tiny, path, torch.float16)
    return path


@pytest.fixture
def model(half):
    return sd.load(half)


@pytest.fixture(scope="module")
def wanted(tiny):
    """The file's values in float32."""
    return {name: tensor.half().float() for name, tensor in compvis_tensors(tiny).items()}


X, T, C = torch.ones(1, 4, 8, 8), torch.tensor([7.0]), torch.ones(1, 77, 64)


def is_unread(part):
    return unread.target(part) is not None and {p.dtype for p in part.parameters()} == {torch.float16}


def is_read(part, dtype=torch.float32):
    hooks = any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in part.modules())
    plain = type(part) in (sd.UNet, sd.VAE)
    return unread.target(part) is None and {p.dtype for p in part.parameters()} == {dtype} and not hooks and plain


def test_a_model_is_in_the_file_until_a_part_is_called(model):
    assert is_unread(model.unet)
    assert is_unread(model.vae)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert computes_in(model.text.model)[1] == torch.float32
    assert is_unread(model.text.model)
    model.unet(X, T, C)
    assert is_read(model.unet)
    assert is_unread(model.vae)
    model.vae.decode(X)
    assert is_read(model.vae)
    assert model.encode_prompt("a star").dtype == torch.float32


@pytest.mark.parametrize(
    "use",
    [
        lambda unet: unet.input_blocks[0](X, torch.ones(1, 128), C),
        lambda unet: unet.time_embed(torch.ones(1, 32)),
        lambda unet: unet.out[2](torch.ones(1, 32, 8, 8)),
        lambda unet: unet.state_dict(),
        lambda unet: unet.out.state_dict(),
        lambda unet: unet.to("cpu"),
        lambda unet: unet.float(),
        lambda unet: unread.read_weights(unet),
    ],
)
def test_any_use_of_a_part_reads_all_of_it(model, wanted, use):
    use(model.unet)
    assert is_read(model.unet)
    for name, parameter in model.unet.named_parameters():
        assert torch.equal(parameter, wanted[f"model.diffusion_model.{name}"])


def test_the_shapes_and_names_of_parameters_read_nothing(model):
    assert sum(p.numel() for p in model.unet.parameters()) > 0
    assert sd.describe(model)
    assert is_unread(model.unet)


def test_state_dict_is_what_it_computes_with(model, wanted):
    got = compvis_tensors(model)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in got)


def test_conversion_is_from_what_the_part_computes_in(half):
    model = sd.load(half, dtype=torch.bfloat16)
    model.unet.double()
    assert is_read(model.unet, torch.float64)
    reference = sd.load(half, dtype=torch.bfloat16).unet.state_dict()
    for name, parameter in model.unet.named_parameters():
        assert torch.equal(parameter, reference[name].double())
    model = sd.load(half)
    model.vae.half()  # the file's own, but asked for: not float32 later
    model.vae.decode(X.half())
    assert is_read(model.vae, torch.float16)
    model.to(dtype=torch.float64)
    assert computes_in(model.text.model)[1] == model.dtype == torch.float64


def test_a_module_that_was_converted_alone_stays_so(model):
    model.vae.decoder.bfloat16()
    unread.read_weights(model.vae)
    assert {p.dtype for p in model.vae.decoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.encoder.parameters()} == {torch.float32}


def test_copies_are_independent_and_whole(model, wanted):
    for twin in (copy.deepcopy(model.vae), pickle.loads(pickle.dumps(sd.load("shapes").vae))):
        assert is_read(twin)
    unet = copy.deepcopy(model).unet
    assert is_read(unet)
    with torch.no_grad():
        unet.out[2].bias.fill_(9)
    assert torch.equal(model.unet.out[2].bias, wanted["model.diffusion_model.out.2.bias"])


def test_a_copy_that_shares_the_parameters_reads_nothing(model):
    shallow = copy.copy(model.unet)
    memo = {id(p): p for p in model.unet.parameters()}
    shared = copy.deepcopy(model.unet, memo)
    assert type(shallow) is type(shared) is sd.UNet
    assert all(p is q for p, q in zip(shared.parameters(), model.unet.parameters(), strict=True))
    assert is_unread(model.unet)
    with pytest.raises(RuntimeError):  # in the file's dtype: nobody has read it
        shared(X.double(), T, C)
    assert is_unread(model.unet)
    model.unet(X, T, C)
    assert torch.equal(shared(X, T, C), model.unet(X, T, C))  # they are still the same parameters


def test_an_optimizer_may_be_made_before(model):
    before = list(model.unet.parameters())
    optimizer = torch.optim.SGD(before, lr=0.1)
    with torch.inference_mode():
        model.unet(X, T, C)
    assert all(p is q for p, q in zip(before, model.unet.parameters(), strict=True))
    assert all(p.requires_grad for p in before)
    old = before[0].detach().clone()
    model.unet(X, T, C).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before[0], old)


def test_load_state_dict_keeps_its_precision(model, tiny):
    model.unet.load_state_dict(tiny.unet.state_dict())
    assert torch.equal(model.unet(X, T, C), tiny.unet(X, T, C))


def test_two_threads_may_call_it_first(half):
    for _ in range(5):
        model = sd.load(half)
        start, results = threading.Barrier(4), []

        def call(model=model, start=start, results=results):
            start.wait()
            with torch.no_grad():
                results.append((model.unet(X, T, C), model.text.encode("a star")))

        threads = [threading.Thread(target=call) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(results) == 4
        assert all(torch.equal(results[0][0], unet) and torch.equal(results[0][1], text) for unet, text in results)


def test_an_unread_model_is_freed(half):
    model = sd.load(half)
    part = weakref.ref(model.unet)
    del model
    gc.collect()
    assert part() is None
    assert not len(unread._UNREAD) or all(m is not None for m in unread._UNREAD)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_saving_reads_no_part(model, wanted, tmp_path, dtype):
    sd.save(model, tmp_path / "a.safetensors", dtype)
    assert is_unread(model.unet)
    assert is_unread(model.vae)
    saved = sd.load(tmp_path / "a.safetensors")
    assert {p.dtype for p in saved.unet.parameters()} == {dtype or torch.float32}
    got = compvis_tensors(saved)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_file_that_shrinks_is_seen_while_it_is_mapped(half, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(half.read_bytes())
    read, mapped, gone = sd.load(path), sd.load(path), sd.load(half)
    compvis_tensors(read)  # all of it is in memory
    os.truncate(path, path.stat().st_size - 1000)
    read.files.check()
    gone.files.check()
    with pytest.raises(sd.LoadError, match=r"a\.safetensors has shrunk from \d+ to \d+ bytes"):
        mapped.files.check()


@pytest.mark.parametrize("change", ["cut", "written over"])
@pytest.mark.parametrize("kind", ["simple", "fast", "lean"])
def test_a_drawing_stops_where_its_file_is_changed(change, kind, tiny, tmp_path):
    """Between two steps, in float32, where every tensor is mapped: to read on would end the process, or be wrong."""
    path = tmp_path / "a.safetensors"
    sd.save(tiny, path)
    model = sd.load(path)
    model = sd.fast(model) if kind == "fast" else model
    sampler = sd.LeanSampler(model, "600MB") if kind == "lean" else sd.SimpleSampler(model)
    steps = sampler.stream("a", num_inference_steps=3)
    next(steps)
    if change == "cut":
        os.truncate(path, 5000)
    else:
        with open(path, "r+b") as file:
            file.seek(5000)
            file.write(b"\1" * 100)
    with pytest.raises(sd.LoadError, match=r"shrunk|has been changed"):
        list(steps)
    with pytest.raises(sd.LoadError, match=r"shrunk|has been changed"):
        sampler("a", num_inference_steps=1)
    with pytest.raises(sd.LoadError, match=r"shrunk|has been changed"):
        model.encode_prompt("a")


def test_a_file_that_is_replaced_does_no_harm(half, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(half.read_bytes())
    model = sd.load(path)
    (tmp_path / "b").write_bytes(b"another file")
    os.replace(tmp_path / "b", path)
    model.files.check()
    assert torch.equal(model.unet(X, T, C), sd.load(half).unet(X, T, C))


def test_a_file_that_is_deleted_does_no_harm(half, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(half.read_bytes())
    model = sd.load(path)
    path.unlink()
    model.files.check()
    assert torch.equal(model.unet(X, T, C), sd.load(half).unet(X, T, C))

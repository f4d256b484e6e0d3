"""Weights in float8: read from .safetensors, computed with in the dtype that is asked for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import sd
from sd.weights import unread
from sd.weights.checkpoint import read, write_safetensors
from sd.weights.hub import tensors_of_header
from tests.layouts import compvis_tensors, draw, make_model

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]
SIZE = {"height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The tiny model's weights rounded to float8: in float8, and the same values in float32; a file for each kind."""
    folder, model, found = tmp_path_factory.mktemp("float8"), make_model(), {}
    for kind in KINDS:
        sd.save(model, folder / "own.safetensors", force=True)
        file = read(folder / "own.safetensors")
        small = {name: t.to(kind) for name, t in file.tensors.items()}
        for name, tensors in (("small", small), ("wide", {n: t.float() for n, t in small.items()})):
            write_safetensors(folder / f"{name}-{kind}.safetensors", tensors, file.metadata)
        found[kind] = folder / f"small-{kind}.safetensors", folder / f"wide-{kind}.safetensors"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_as_the_official_library_writes_it(kind, tmp_path):
    tensors = {"a": torch.randn(3, 4).to(kind), "b": torch.randn(2, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    got = read(tmp_path / "a.safetensors").tensors
    assert {n: t.dtype for n, t in got.items()} == {"a": kind, "b": torch.float32}
    assert torch.equal(got["a"].float(), tensors["a"].float())
    write_safetensors(tmp_path / "b.safetensors", got)
    assert torch.equal(read(tmp_path / "b.safetensors").tensors["a"].float(), tensors["a"].float())
    head = (tmp_path / "a.safetensors").read_bytes()
    assert tensors_of_header(head[8 : 8 + int.from_bytes(head[:8], "little")])["a"].dtype == kind


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_the_same_values(kind, dtype, files):
    small, wide = (sd.load(path, dtype=dtype) for path in files[kind])
    assert small.dtype == (dtype or torch.float32)
    assert next(small.unet.parameters()).dtype == kind  # still in the file
    assert torch.equal(draw(small, output_type="pt", **SIZE), draw(wide, output_type="pt", **SIZE))
    assert next(small.unet.parameters()).dtype == small.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_the_same_values(dtype, files):
    for small, wide in (map(sd.load, paths) for paths in files.values()):
        wanted = wide.unet.to(dtype=dtype).state_dict()
        got = small.unet.to(dtype=dtype).state_dict()
        assert all(torch.equal(got[name], t) for name, t in wanted.items())


@pytest.mark.parametrize("way", [sd.LeanSampler, sd.ParallelSampler, lambda model: sd.SimpleSampler(sd.fast(model))])
def test_in_every_way(way, files):
    path, wide = files[torch.float8_e4m3fn]
    wanted = draw(sd.load(wide), output_type="pt", **SIZE)
    torch.testing.assert_close(
        draw(sd.load(path), sampler=way, output_type="pt", **SIZE), wanted, atol=1e-4, rtol=1e-4
    )


def test_a_word_more_and_convert(files, tmp_path):
    path, wide = files[torch.float8_e5m2]
    torch.save({"<cat>": torch.randn(2, 64)}, tmp_path / "cat.bin")
    save_file({"<dog>": torch.randn(2, 64).to(torch.float8_e5m2)}, tmp_path / "dog.safetensors")
    small, other = (sd.load(p) for p in (path, wide))
    for word in ("cat.bin", "dog.safetensors"):
        small, other = (sd.textual_inversion(model, tmp_path / word) for model in (small, other))
    assert unread.target(small.text.model)
    wanted = other.encode_prompt("a <cat> and a <dog>")
    torch.testing.assert_close(
        sd.LeanSampler(small).encode_prompt(["a <cat> and a <dog>"]), wanted, atol=1e-5, rtol=1e-5
    )
    sd.save(small, tmp_path / "a.safetensors")
    assert torch.equal(sd.load(tmp_path / "a.safetensors").encode_prompt("a <cat> and a <dog>"), wanted)
    assert torch.equal(small.encode_prompt("a <cat> and a <dog>"), wanted)
    sd.convert(path, tmp_path / "b.safetensors")
    assert {t.dtype for t in read(tmp_path / "b.safetensors").tensors.values()} == {torch.float8_e5m2}
    assert sd.info(path)["total"]["dtypes"] == ["float8_e5m2"]
    assert sd.info(path)["problem"] is None


@pytest.mark.parametrize("name", ["model.diffusion_model.scaled_fp8", "model.diffusion_model.out.2.scale_weight",
                                  "model.diffusion_model.out.2.weight_scale"])  # fmt: skip
def test_scaled_weights_are_refused_by_name(name, tmp_path):
    tensors = {n: t.to(torch.float8_e4m3fn) for n, t in compvis_tensors(make_model()).items()}
    save_file(tensors | {name: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(sd.LoadError, match="in float8 that are to be multiplied by scales") as caught:
        sd.load(tmp_path / "a.safetensors")
    assert name in str(caught.value)
    assert sd.info(tmp_path / "a.safetensors")["problem"] == str(caught.value)

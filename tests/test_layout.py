"""Which files hold the weights: variants, shards, and what is said where some are missing. And odd folders."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd
from sd.cli import main
from sd.weights import hub
from sd.weights.layout import HubError, merged, weight_files
from tests.layouts import write_hub

U, V, T = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"
PLAIN = [f"{stem}.safetensors" for stem in (U, V, T)]
FP16 = [f"{stem}.fp16.safetensors" for stem in (U, V, T)]


def refused(*words, files=(), variant=None):
    with pytest.raises(HubError) as caught:
        weight_files(list(files), variant, "a/b")
    message = str(caught.value)
    assert message.isprintable()
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("files", "variant", "expected"),
    [
        (PLAIN, None, PLAIN),
        ([*PLAIN, *FP16], "fp16", FP16),
        ([*PLAIN, *FP16], None, PLAIN),
        ([*PLAIN, f"{U}.non_ema.safetensors"], "non_ema", [f"{U}.non_ema.safetensors", *PLAIN[1:]]),  # as CompVis has
        ([*PLAIN, FP16[2]], "fp16", [*PLAIN[:2], FP16[2]]),
        ([f"{U}.bin", f"{V}.bin", "text_encoder/pytorch_model.bin"], None,
         [f"{U}.bin", f"{V}.bin", "text_encoder/pytorch_model.bin"]),
        ([f"{U}.bin", *PLAIN, "unet/model.safetensors"], None, PLAIN),
        ([f"{U}.fp16.bin", *PLAIN], "fp16", [f"{U}.fp16.bin", *PLAIN[1:]]),
    ],
)  # fmt: skip
def test_which_file_is_taken(files, variant, expected):
    chosen = weight_files(files, variant, "a/b")
    assert [chosen["unet"], chosen["vae"], chosen["text"]] == [[name] for name in expected]


@pytest.mark.parametrize("name", ["{}-{:05}-of-{:05}{}", "{}-{}-of-{}{}"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_shards(name, ending):
    shards = [name.format(U, number, 3, ending) for number in (1, 2, 3)]
    assert weight_files([*shards, *PLAIN[1:], f"{U}{ending}.index.json"], None, "a/b")["unet"] == shards
    lost = f"-00002-of-{'00003' if '05' in name else '3'}{ending}"
    refused(f"lacks {U}{lost}", files=[shards[0], shards[2], *PLAIN[1:]])


@pytest.mark.parametrize("name", ["{}.fp16-{:05}-of-00002.safetensors", "{}-{:05}-of-00002.fp16.safetensors"])
def test_shards_of_a_variant(name):
    shards = [name.format(T, number) for number in (1, 2)]
    files = [*PLAIN, *shards]
    assert weight_files(files, "fp16", "a/b")["text"] == shards
    assert weight_files(files, "fp16", "a/b")["unet"] == weight_files(files, None, "a/b")["unet"] == PLAIN[:1]
    refused(f"lacks {shards[1]}", files=[*PLAIN, shards[0]], variant="fp16")
    assert weight_files([*PLAIN, shards[0]], None, "a/b")["text"] == PLAIN[2:]  # nobody asked for that one


def test_what_is_said_about_variants():
    refused("variant fp16", "it has no variants", "variant= (--hub-variant)", files=PLAIN, variant="fp16")
    refused("its variants are ema, non_ema", files=[*PLAIN, f"{U}.non_ema.bin", f"{V}.ema.bin"], variant="fp16")
    refused('variant="fp16"', "--hub-variant fp16", files=FP16)
    refused('variant="fp16"', files=[PLAIN[0], f"{V}.bf16.bin", *FP16[1:]])  # of bf16 there is no text encoder
    refused("expected the layout of diffusers", U, files=["README.md"])
    refused("index.json", files=[f"{U}.safetensors.index.json", *PLAIN[1:]])


@pytest.mark.parametrize(
    "name", ["-00001-of-00000", "-00003-of-00002", "-1-of-999999", ".a-00001-of-00001.b", "-x-of-y"]
)
def test_names_that_are_nearly_shards(name):
    refused(files=[f"{U}{name}.safetensors", *PLAIN[1:]])


def test_a_tensor_in_two_files_is_refused():
    assert merged({"a": {"x": 1}, "b": {"y": 2}}, "a/b") == {"x": 1, "y": 2}
    with pytest.raises(HubError, match=r"^a/b has the tensor 'x\\x1b' twice, in a and in c"):
        merged({"a": {"x\x1b": 1}, "b": {"y": 2}, "c": {"x\x1b": 3}}, "a/b")


# ---- folders


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("layout") / "hub", tiny)


@pytest.fixture
def folder(full, tmp_path):
    return shutil.copytree(full, tmp_path / "hub", copy_function=os.link)


def split(path, name="{}-{:05}-of-00002{}", twice=False):
    tensors = list(load_file(path).items())
    for number, part in ((1, tensors[::2]), (2, tensors if twice else tensors[1::2])):
        save_file(dict(part), path.with_name(name.format(path.stem, number, path.suffix)))
    path.unlink()


def test_a_folder_with_shards(folder, tiny, capsys):
    for stem in (U, T):
        split(folder / f"{stem}.safetensors")
    model = sd.load(folder)
    for part in ("unet", "text"):
        ours, theirs = getattr(model, part).state_dict(), getattr(tiny, part).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert {path.name for path, *_ in model.files._maps} == {
        "diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert main(["info", str(folder)]) == 0
    assert "Stable Diffusion v1" in capsys.readouterr().out
    (folder / f"{U}-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"lacks {U}-00002-of-00002.safetensors"):
        sd.load(folder)


def test_shards_that_overlap_are_refused(folder):
    split(folder / f"{U}.safetensors", twice=True)
    with pytest.raises(ValueError, match="twice, in unet/"):
        sd.info(folder)


def test_info_takes_a_variant(folder, capsys):
    save_file(
        {n: t.half() for n, t in load_file(folder / f"{U}.safetensors").items()}, folder / f"{U}.fp16.safetensors"
    )
    assert sd.info(folder, variant="fp16")["parts"]["unet"]["dtypes"] == ["float16"]
    assert main(["info", str(folder), "--hub-variant", "fp16"]) == 0
    assert "float16, float32" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["unet/config.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_a_config_that_is_no_small_file(folder, where):
    (folder / where).unlink()
    os.mkfifo(folder / where)
    if where.startswith("unet"):
        with pytest.raises(ValueError, match=r"without unet/config\.json"):
            sd.load(folder)
    else:
        with pytest.raises(sd.LoadError, match=rf"no readable {where} .it is not a regular file"):
            sd.load(folder)
    (folder / where).unlink()
    (folder / where).write_text("[" * 100_000)
    with pytest.raises(sd.LoadError, match=rf"no readable {where} .it has more than 32 brackets"):
        sd.load(folder)


# ---- the cache


COMMITS = [str(number) * 40 for number in (1, 2)]


@pytest.fixture
def cache(full, tmp_path, monkeypatch):
    """A cache of a/tiny at main, without network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--a--tiny"
    (repo / "blobs").mkdir(parents=True)
    for path in full.rglob("*"):
        if path.is_file():
            link = repo / "snapshots" / COMMITS[0] / path.relative_to(full)
            link.parent.mkdir(exist_ok=True, parents=True)
            blob = repo / "blobs" / str(path.relative_to(full)).replace("/", "-")
            os.link(path, blob)
            link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMITS[0])
    return repo


def said(source, **options):
    with pytest.raises(hub.HubError) as caught:
        sd.load(source, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_the_folder_of_a_repository_in_the_cache(cache):
    assert sd.load("a/tiny").unet.state_dict().keys() == sd.load(cache).unet.state_dict().keys()
    assert sd.load(cache / "snapshots", revision="main").name
    message = said(cache, revision="other")
    assert "the cache's folder of a/tiny, without revision other" in message
    assert f"snapshots/{COMMITS[0]} (main)" in message
    shutil.copytree(cache / "snapshots" / COMMITS[0], cache / "snapshots" / COMMITS[1], symlinks=True)
    message = said(cache)
    assert f"snapshots/{COMMITS[0]} (main)" in message
    assert f"snapshots/{COMMITS[1]} ({COMMITS[1]})" in message
    assert sd.load(cache, revision=COMMITS[1]).name
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    assert "without a snapshot: give a/tiny" in said(cache)


def test_another_revision_is_cached(cache):
    (cache / "refs/main").rename(cache / "refs/fp16")
    message = said("a/tiny")
    assert "in the cache only at revision fp16, not at main, and the Hub cannot be reached (HF_HUB_OFFLINE" in message
    assert 'revision="fp16" (--revision fp16)' in message
    assert sd.load("a/tiny", revision="fp16").name
    (cache / "refs/fp16").unlink()
    assert f"--revision {COMMITS[0]}" in said("a/tiny")
    assert sd.load("a/tiny", revision=COMMITS[0]).name
    (cache / "refs/main").write_bytes(b"../../../\xff")
    assert f"--revision {COMMITS[0]}" in said("a/tiny")


@pytest.mark.parametrize("where", ["unet/config.json", f"{U}.safetensors", "tokenizer/merges.txt"])
def test_links_to_files_that_are_gone(cache, where):
    os.remove(os.path.realpath(cache / "snapshots" / COMMITS[0] / where))
    for source in ("a/tiny", cache, cache / "snapshots" / COMMITS[0]):
        message = said(source)
        assert f"lost {where}, which is a link to a file that is gone" in message
        assert "is fetched again" in message


def test_a_variant_that_is_not_cached(cache):
    message = said("a/tiny", variant="fp16")
    assert "a/tiny in the cache has no weights" in message
    assert "the Hub cannot be reached (HF_HUB_OFFLINE is set) to fetch more" in message


def test_a_cache_without_the_weights(cache):
    for path in (cache / "snapshots").rglob("*.safetensors"):
        path.unlink()
    message = said("a/tiny")
    assert f"a/tiny in the cache lacks {U}.safetensors, and the Hub cannot be reached (HF_HUB_OFFLINE is" in message
    assert f"lacks {U}.fp16.safetensors" in said("a/tiny", variant="fp16")
    (cache / "snapshots" / COMMITS[0] / "unet/config.json").unlink()
    assert "a/tiny in the cache lacks unet/config.json, and the Hub cannot be reached" in said("a/tiny")

"""Repositories: huggingface_hub's real client against a small Hub on loopback, then without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.hub_server import COMMIT, serve
from tests.layouts import compvis_tensors, write_ckpt, write_hub, write_tokenizer

CLIP = "openai/clip-vit-large-patch14"
WEIGHTS = [
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


DRIVER = """
import hashlib, json, sys, sd
from sd.weights.tokenizer import tokenizer_texts
from sd.weights.source import find
from sd.weights.vaes import find_vae
for name, source, options in json.loads(sys.argv[1]):
    try:
        if name == "info":
            found = sd.info(source, **options)
            answer = {"parts": {p: f["tensors"] for p, f in found["parts"].items()}, "kind": found["kind"]}
        else:
            digest = hashlib.sha256()
            if name == "load":
                model = sd.load(source, **options)
                model.text.texts  # looked for now
                unet = model.unet.state_dict()
            elif name == "vae":
                unet = find_vae(source, **options).tensors
            else:  # all that concerns the Hub, without the seconds in which transformers is imported
                found = find(source, **options)
                unet = found.parts["unet"]
                tokenizer_texts(found, None, None)
            for key in sorted(unet):
                digest.update(unet[key].contiguous().numpy())
            answer = digest.hexdigest()
    except ValueError as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    """Calls in a process of their own, for the client reads its settings when it is imported."""
    folder = tmp_path_factory.mktemp("hub")
    full = write_hub(folder / "tiny", tiny)
    for name in ("unet/diffusion_pytorch_model.bin", "safety_checker/model.safetensors", "v1.ckpt", "README.md"):
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(b"not needed")
    other = shutil.copytree(full, folder / "sdxl")
    config = json.loads((other / "unet/config.json").read_text())
    config |= {"cross_attention_dim": 2048, "use_linear_projection": True}
    (other / "unet/config.json").write_text(json.dumps(config))
    loose = folder / "loose"
    loose.mkdir()
    (loose / "model.ckpt").write_bytes(b"x")
    checkpoint = write_ckpt(folder / "model.ckpt", compvis_tensors(tiny))
    split = shutil.copytree(full, folder / "split")
    for where in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        tensors = list(load_file(split / f"{where}.safetensors").items())
        for number, half in ((1, tensors[::2]), (2, tensors[1::2])):
            save_file(dict(half), split / f"{where}-{number:05}-of-00002.safetensors")
        (split / f"{where}.safetensors").unlink()
    vae = shutil.copytree(full / "vae", folder / "vae")  # at the top, as stabilityai/sd-vae-ft-mse
    folders = {"a/vae": vae, "a/tiny": full, "a/gated": full, "a/sdxl": other, "a/loose": loose, "a/split": split}
    folders[CLIP] = write_tokenizer(folder / "clip")

    with serve(folders) as (address, served):

        def ask(*calls, cache="cache", url=None, **env):
            served.fetched.clear()
            env |= {"HF_ENDPOINT": url or address, "HF_HUB_DISABLE_XET": "1"}
            env |= {"HF_HOME": str(folder / cache), "HF_TOKEN": "", "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(
                [sys.executable, "-c", DRIVER, json.dumps(calls)],
                capture_output=True,
                text=True,
                env=os.environ | env,
            )
            assert done.returncode == 0, done.stderr
            return [json.loads(line) for line in done.stdout.splitlines()]

        ask.fetched, ask.checkpoint, ask.folder = served.fetched, str(checkpoint), str(full)
        ask.split = str(split)
        yield ask


@pytest.fixture(scope="module")
def online(hub):
    """What was answered, what was fetched; the cache is then as these calls left it."""
    calls = [
        ["load", hub.folder, {}],
        ["load", "a/tiny", {}],
        ["load", "a/tiny", {"revision": COMMIT}],
        ["load", hub.checkpoint, {}],
        ["find", hub.split, {}],
        ["find", "a/split", {}],
    ]
    return hub(*calls), sorted(hub.fetched)


def test_a_repository_gives_the_same_tensors(online):
    assert len(online[0][0]) == 64, online[0][0]
    assert online[0] == [online[0][0]] * 6


def test_only_needed_files_are_fetched_and_once(online):
    got = [name.removeprefix("a/tiny/") for name in online[1] if name.startswith("a/tiny/")]
    assert [n for n in got if not n.endswith(("json", "txt"))] == WEIGHTS
    assert len(got) == len(set(got)) == 11


def test_the_tokenizer_of_clip_for_a_file_without(online):
    assert [n for n in online[1] if n.startswith(CLIP)] == [f"{CLIP}/merges.txt", f"{CLIP}/vocab.json"]


def test_a_vae_of_a_repository(online, hub):
    """At the top or in vae/; no other weights are fetched."""
    paths = [str(Path(hub.folder) / "vae"), "a/vae", "a/tiny"]
    first, *others = hub(*(["vae", path, {}] for path in paths), cache="vaes")
    assert len(first) == 64, first
    assert others == [first, first]
    weights = "diffusion_pytorch_model.safetensors"
    assert sorted(hub.fetched) == ["a/tiny/vae/config.json", f"a/tiny/vae/{weights}", "a/vae/config.json",
                                   f"a/vae/{weights}"]  # fmt: skip
    *cached, none, variant = hub(["vae", "a/vae", {}], ["vae", "a/loose", {}], ["vae", "a/tiny", {"variant": "fp16"}],
        cache="vaes", HF_HUB_OFFLINE="1")  # fmt: skip
    assert cached == [first]
    assert none.startswith("HubError: a/loose is not in the cache and the Hub cannot be reached")
    assert "has no weights vae/diffusion_pytorch_model.fp16.safetensors" in variant


@pytest.mark.slow
def test_from_the_cache_alone(online, hub):
    calls = [["find", "a/tiny", {}], ["find", hub.checkpoint, {}], ["find", "a/gated", {}]]
    same, tokenizer_too, other = hub(*calls, HF_HUB_OFFLINE="1")
    assert same == tokenizer_too == online[0][0]
    assert other.startswith("HubError: a/gated is not in the cache and the Hub cannot be reached")
    assert hub.fetched == []


def test_out_of_reach(online, hub):
    calls = [["find", "a/tiny", {}], ["find", "a/none", {}]]
    cached, new = hub(*calls, url="http://127.0.0.1:9")  # where nobody listens
    assert cached == online[0][0]
    assert new.startswith("HubError: a/none is not in the cache and the Hub cannot be reached")


def test_no_tokenizer_to_be_had(hub):
    (answer,) = hub(["find", hub.checkpoint, {}], cache="empty", HF_HUB_OFFLINE="1")
    assert answer.startswith("LoadError: model.ckpt brings no tokenizer")
    for way in ("tokenizer=", CLIP, "converted file"):
        assert way in answer


@pytest.mark.slow
def test_refusals(hub):
    calls = [
        ["load", "a/none", {}],
        ["load", "a/gated", {}],
        ["load", "a/gated", {"token": "hf_wrong"}],
        ["load", "a/tiny", {"revision": "nope"}],
        ["load", "a/tiny", {"variant": "fp16"}],
        ["load", "a/sdxl", {}],
        ["load", "a/loose", {}],
        ["info", "a/tiny", {}],
        ["info", "a/split", {}],
    ]
    *answers, facts, split = hub(*calls, cache="refusals")
    gated = "a/gated is gated: accept its licence at https://huggingface.co/a/gated, then log in with `hf auth"
    expected = ["There is no repository a/none on the Hub", gated, gated, "a/tiny has no revision 'nope'"]
    expected += ["a/tiny has no weights unet/diffusion_pytorch_model.fp16.safetensors", "it holds SDXL weights"]
    expected += ["download model.ckpt and give its path"]
    for answer, part in zip(answers, expected, strict=True):
        assert part in answer
        assert "\n" not in answer
    # No weights came: other models are refused by their configs, and info fetches headers only.
    assert not [name for name in hub.fetched if name.endswith((".safetensors", ".bin", ".ckpt"))]
    assert (facts["kind"], set(facts["parts"])) == ("Stable Diffusion v1", {"unet", "vae", "text"})
    assert split == facts


@pytest.mark.slow
def test_a_token_opens_the_gate(online, hub):
    (answer,) = hub(["find", "a/gated", {"token": "hf_right"}], cache="gated")
    assert answer == online[0][0]

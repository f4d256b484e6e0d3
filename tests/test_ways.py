"""The table of docs/ways.md: what it says of a feature in a way to run is what happens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

import sd
from sd import study
from sd.adapt.taesd import TinyVAE
from sd.compare.reference import random_controlnet, random_model_of
from sd.weights.checkpoint import read, write_safetensors
from tests.layouts import make_model, random_tensors
from tests.loras import attention_of, lora_tensors, write_lora
from tests.worlds import in_world

TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[1] / "docs/ways.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and "---" not in line
]
WAYS = TABLE[0][1:]
CELLS = {
    (row[0], way): cell
    for row in TABLE[1:]
    if len(row) == len(TABLE[0])
    for way, cell in zip(WAYS, row[1:], strict=True)
}
CALL = {"num_inference_steps": 2, "output_type": "latent"}


def sampler_of(way, model):
    if way == "simple":
        return sd.SimpleSampler(model)
    if way == "fast":
        return sd.SimpleSampler(sd.fast(model))
    if way == "lean":
        return sd.LeanSampler(model)
    return sd.ParallelSampler(model, {{"images": "image"}.get(name := way.rsplit(" ", 1)[1], name): 2})


def texts(way, model):
    sampler, prompts = sampler_of(way, model), ["a star", "a ring"]
    one = sampler(prompts, negative_prompt="red", **CALL)
    context, negative = model.encode_prompt(prompts), model.encode_prompt(["red"])
    torch.testing.assert_close(one, sampler(context, negative_prompt_embeds=negative, **CALL), atol=1e-3, rtol=1e-3)


def styles(way, model):
    prompts = ["a (red:1.4) star BREAK a [blue] ring", "a ring"]
    call = {
        "negative_prompt": "text " * 40,
        "prompt_style": "a1111",
        "clip_skip": 1,
        "guidance_rescale": 0.5,
        "rng": "cuda",
    }
    latents = sampler_of(way, model)(prompts, **CALL, **call)
    torch.testing.assert_close(latents, sd.SimpleSampler(model)(prompts, **CALL, **call), atol=1e-3, rtol=1e-3)


def solvers(way, model):
    for name in ("pndm", "ddim", "lms", "euler_a", "dpmpp_2m", "dpmpp_sde", "unipc"):
        assert torch.isfinite(sampler_of(way, model)(["a star", "a ring"], scheduler=name, **CALL)).all()


def pictures_in(way, model):
    x = torch.linspace(0, 1, 64)
    picture, mask = x.expand(2, 3, 64, 64), (x > 0.5).float().expand(1, 1, 64, 64)
    call = CALL | {"image": picture, "mask_image": mask, "num_inference_steps": 3}
    latents = sampler_of(way, model)(["a star", "a ring"], **call)
    wanted = sd.SimpleSampler(model)(["a star", "a ring"], **call)
    torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)


def with_lora(way, model):
    adapted = a_lora(model)
    latents = sampler_of(way, adapted)(["a star", "a ring"], **CALL)
    torch.testing.assert_close(latents, sd.SimpleSampler(adapted)(["a star", "a ring"], **CALL), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(latents, sd.SimpleSampler(model)(["a star", "a ring"], **CALL), atol=1e-2)


def scale_of_lora(way, model):
    adapted = a_lora(model)
    sampler, textbook = sampler_of(way, adapted), sd.SimpleSampler(a_lora(model))
    before = sampler(["a star", "a ring"], **CALL)
    for value in (0.4, lambda step: 1.0 - step):
        with study.scale(sampler, "ways", value), study.scale(textbook, "ways", value):
            latents = sampler(["a star", "a ring"], **CALL)
            wanted = textbook(["a star", "a ring"], **CALL)
        torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)
    assert torch.equal(sampler(["a star", "a ring"], **CALL), before)


def a_lora(model):
    with tempfile.TemporaryDirectory() as folder:
        tensors, _ = lora_tensors(model, list(attention_of(model)))
        return sd.lora(
            model, write_lora(Path(folder) / "ways.safetensors", {n: t.float() for n, t in tensors.items()})
        )


def own_words(way, model):
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"<cat>": torch.ones(2, 64)}, Path(folder) / "cat.bin")
        knows = sd.textual_inversion(model, Path(folder) / "cat.bin")
    latents = sampler_of(way, knows)(["a <cat>", "a ring"], **CALL)
    torch.testing.assert_close(latents, sd.SimpleSampler(knows)(["a <cat>", "a ring"], **CALL), atol=1e-3, rtol=1e-3)


def other_vae(way, model, vae=None):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vae.safetensors"
        write_safetensors(path, {n: 1.1 * t for n, t in model.vae.state_dict().items()} if vae is None else vae)
        other = sd.with_vae(model, path)
        other.vae.state_dict()  # read while the file is there
    call = CALL | {"output_type": "pt"}
    images = sampler_of(way, other)(["a star", "a ring"], **call)
    torch.testing.assert_close(images, sd.SimpleSampler(other)(["a star", "a ring"], **call), atol=1e-3, rtol=1e-3)


def taesd(way, model):
    c = sd.VAEConfig(ch=8, ch_mult=(1,) * 4, num_res_blocks=1, scale_factor=1.0, num_groups=1)
    shapes = {name: t.shape for name, t in TinyVAE(c, model.vae.config).state_dict().items()}
    other_vae(way, model, random_tensors(shapes, 3, torch.float32))


def control_nets(way, model):
    x = torch.linspace(0, 1, 64)
    pictures = [x.expand(1, 3, 64, 64), (1 - x).square().expand(1, 3, 64, 64)]
    nets = [random_controlnet(model, seed) for seed in (3, 4)]
    call = CALL | {"control_image": pictures, "num_inference_steps": 3, "control_guidance_end": [0.7, 1.0]}
    for guess in (False, True):
        wanted = sd.SimpleSampler(model)(["a star", "a ring"], controlnet=nets, guess_mode=guess, **call)
        own = [sd.fast(net) for net in nets] if way == "fast" else nets
        latents = sampler_of(way, model)(["a star", "a ring"], controlnet=own, guess_mode=guess, **call)
        torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(latents, sampler_of(way, model)(["a star", "a ring"], **CALL), atol=1e-2)


def in_float8(way, model):
    with tempfile.TemporaryDirectory() as folder:
        sd.save(model, Path(folder) / "a.safetensors")
        file = read(Path(folder) / "a.safetensors")
        small = {name: t.to(torch.float8_e4m3fn) for name, t in file.tensors.items()}
        write_safetensors(Path(folder) / "b.safetensors", small, file.metadata)
        one, two = (sd.load(Path(folder) / "b.safetensors") for _ in range(2))
        latents = sampler_of(way, one)(["a star", "a ring"], **CALL)
        wanted = sd.SimpleSampler(two)(["a star", "a ring"], **CALL)
    torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)


def relative(kind):
    def draw(way, model):
        other = random_model_of(kind, model.dtype)
        latents = sampler_of(way, other)(["a star", "a ring"], guidance_scale=3.0, **CALL)
        wanted = sd.SimpleSampler(other)(["a star", "a ring"], guidance_scale=3.0, **CALL)
        torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)

    return draw


def invert(way, model):
    sd.invert(sampler_of(way, model), torch.rand(1, 3, 64, 64), "a star", num_inference_steps=2)


def stream(way, model):
    steps = list(sampler_of(way, model).stream(["a star", "a ring"], num_inference_steps=2, scheduler="ddim"))
    assert [step.index for step in steps] == [0, 1]


def fast_model(way, model):
    latents = sampler_of(way, sd.fast(model))(["a star", "a ring"], **CALL)
    wanted = sd.SimpleSampler(model)(["a star", "a ring"], **CALL)
    torch.testing.assert_close(latents, wanted, atol=1e-3, rtol=1e-3)


def edit(way, model):
    sampler, rows = sampler_of(way, model), []
    with study.edit(sampler, {"middle_block": lambda out, at: rows.append(len(out)) or 0.5 * out}):
        changed = sampler(["a star", "a ring"], **CALL)
    assert rows
    assert not torch.equal(changed, sampler(["a star", "a ring"], **CALL))


def maps(way, model):
    sampler = sampler_of(way, model)
    half = "uncond" if way == "parallel by guidance" and torch.distributed.get_rank() == 0 else "cond"
    with study.attention_maps(sampler, half=half) as seen:
        sampler(["a star", "a ring"], **CALL)
    assert seen.tokens([1]).shape == (64, 64)


def text_attention(way, model):
    assert study.text_attention(sampler_of(way, model), "a star").word("star").shape == (77,)


def gradients(way, model):
    latents = sampler_of(way, model)(["a star", "a ring"], **CALL)
    assert not latents.requires_grad


FEATURES = {
    "prompts, negative prompts, embeddings": texts,
    "weights and prompts of any length, `clip_skip`, `guidance_rescale`, `rng`": styles,
    "every solver": solvers,
    "pictures in, masks, weights of 9 channels": pictures_in,
    "`sd.lora`, several, of every kind": with_lora,
    "`sd.study.scale`, for a block and by step": scale_of_lora,
    "`sd.textual_inversion`": own_words,
    "`sd.with_vae`": other_vae,
    "TAESD as the VAE": taesd,
    "ControlNets, several, with guess mode": control_nets,
    "weights in float8": in_float8,
    "Stable Diffusion 2, with v": relative("small-sd2"),
    "LCM's UNets, which are told their guidance": relative("small-lcm"),
    "`sd.invert`": invert,
    "`stream`, step by step": stream,
    "a model that `sd.fast` made": fast_model,
    "`sd.study.edit`": edit,
    "`sd.study.attention_maps`": maps,
    "`sd.study.text_attention`": text_attention,
    "gradients": gradients,
}
ONE_PROCESS = ["simple", "fast", "lean"]


def tried(way, feature, dtype=torch.float32):
    """What came of it: the message of a ValueError, or nothing."""
    try:
        FEATURES[feature](way, make_model(dtype=dtype))
    except ValueError as error:
        return str(error)
    return ""


def check(way, feature, message):
    refused = CELLS[feature, way].startswith("Refused")
    assert bool(message) == refused, f"{feature}, {way}: {CELLS[feature, way]!r}, and what happened: {message!r}"


def test_the_table_is_whole():
    assert [*ONE_PROCESS, "parallel by images", "parallel by guidance", "parallel by rows"] == WAYS
    assert {feature for feature, _ in CELLS} >= set(FEATURES)
    assert not any("not tested" in cell or not cell for cell in CELLS.values())


@pytest.mark.parametrize("way", ONE_PROCESS)
@pytest.mark.parametrize("feature", FEATURES)
def test_in_one_process(feature, way):
    check(way, feature, tried(way, feature))


def every_feature(rank, way):
    return {feature: tried(way, feature) for feature in FEATURES}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["parallel by images", "parallel by guidance", "parallel by rows"])
def test_over_ranks(way):
    for found in in_world(2, every_feature, way):
        for feature, message in found.items():
            check(way, feature, message)


@pytest.mark.parametrize("way", ONE_PROCESS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(way, dtype):
    assert tried(way, "`stream`, step by step", dtype) == ""

"""ControlNets: beside diffusers' pipelines, in every way to draw, from every file, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sd
from sd.adapt.control_files import config_from
from sd.adapt.controlnet import ControlNetConfig, controlnet_for
from sd.cli import main
from sd.compare.reference import (
    diffusers_controlnet,
    diffusers_scheduler,
    hub_controlnet,
    random_controlnet,
    random_model,
    random_tensors,
)
from sd.pictures.canny import canny_edges
from sd.weights.configs import LoadError
from sd.weights.controlnets import METADATA
from sd.weights.hub import HubError
from sd.weights.unread import target
from tests.hub_server import serve
from tests.layouts import UNET, compvis_tensors, diffusers_images, make_model, write_ckpt
from tests.test_pictures import noise_picture, square_mask
from tests.test_sampler import pixels
from tests.worlds import in_world

PROMPT = "a red star above a blue ring"
CALL = {"scheduler": "ddim", "num_inference_steps": 5, "seed": 3}
EDGES, POSE = noise_picture(seed=1), noise_picture(seed=2)
TEXT, IMG2IMG, INPAINT = (f"StableDiffusionControlNet{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))


@pytest.fixture(scope="module")
def nets(tiny):
    """Two ControlNets for the small model, with random weights where training begins with zeros, too."""
    return [random_controlnet(tiny, seed) for seed in (3, 4)]


def theirs(model, nets, kind=TEXT, prompt=PROMPT, seeds=(3,), **options):
    others = [diffusers_controlnet(net) for net in nets]
    parts = {"controlnet": others if len(others) > 1 else others[0]}
    options = {"num_inference_steps": 5, **options}
    return diffusers_images(model, diffusers_scheduler("ddim"), prompt, kind, seeds, parts, **options)


# ---- beside diffusers


def test_the_network_is_diffusers_in_float64():
    model = make_model(dtype=torch.float64)
    net = random_controlnet(model)
    x, context = torch.randn(2, 4, 9, 7).double(), torch.randn(2, 77, 64).double()
    t, picture = torch.tensor([981.0, 17.25]), torch.rand(2, 3, 72, 56).double()
    with torch.no_grad():
        ours = net(x, t, context, net.hint(picture))
        other, middle = diffusers_controlnet(net)(x, t, context, picture, return_dict=False)
        for got, wanted in zip(ours, [*other, middle], strict=True):
            assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
        added = model.unet(x, t, context, control=ours)
        assert (added - model.unet(x, t, context)).abs().max() > 1e-3 * added.abs().max()


def test_full_size_has_the_paper_s_number_of_parameters():
    with torch.device("meta"):
        net = sd.ControlNet()
    assert sum(p.numel() for p in net.parameters()) == 361_279_120
    assert len(net.state_dict()) == 340


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"guess_mode": True},
        {"guess_mode": True, "guidance_scale": 1.0, "controlnet_conditioning_scale": 0.6},
        {"controlnet_conditioning_scale": 0.7, "control_guidance_start": 0.2, "control_guidance_end": 0.8},
    ],
    ids=["plain", "guess", "guess without guidance", "scale, start, end"],
)
def test_one_net_draws_what_diffusers_draws(tiny, nets, how):
    sampler = sd.SimpleSampler(tiny)
    ours = sampler(PROMPT, controlnet=nets[0], control_image=EDGES, **CALL, **how)
    expected = theirs(tiny, nets[:1], image=EDGES, **how)
    assert np.array_equal(pixels(ours), pixels(expected))
    without = sampler(PROMPT, **CALL, **{k: v for k, v in how.items() if k == "guidance_scale"})
    assert not np.array_equal(pixels(ours), pixels(without))


def test_two_nets_draw_what_diffusers_draws(tiny, nets):
    how = {
        "controlnet_conditioning_scale": [0.5, 1.2],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.7, 1.0],
    }
    ours = sd.SimpleSampler(tiny)(PROMPT, controlnet=nets, control_image=[EDGES, POSE], **CALL, **how)
    assert np.array_equal(pixels(ours), pixels(theirs(tiny, nets, image=[EDGES, POSE], **how)))


def test_a_picture_for_each_prompt_and_for_all_images_of_it(tiny, nets):
    call = {"num_images_per_prompt": 2, "output_type": "latent"}
    prompts = ["a red star", "a blue ring"]
    ours = sd.SimpleSampler(tiny)(prompts, controlnet=nets[0], control_image=[EDGES, POSE], **CALL, **call)
    expected = theirs(tiny, nets[:1], prompt=prompts, seeds=(3, 4, 5, 6), image=[EDGES, POSE], **call)
    assert torch.equal(ours, expected)
    alone = sd.SimpleSampler(tiny)(prompts[1], controlnet=nets[0], control_image=POSE, **CALL | {"seed": 6})
    again = sd.SimpleSampler(tiny).decode(ours[3:])
    assert np.abs(pixels(alone).astype(int) - pixels(again)).max() <= 1


def test_means_over_the_picture(tiny, nets):
    """Of ControlNets for "shuffle": guess mode comes with them."""
    pooling = random_controlnet(tiny)
    pooling.config = replace(pooling.config, global_pool=True)
    ours = sd.SimpleSampler(tiny)(PROMPT, controlnet=pooling, control_image=EDGES, **CALL)
    assert np.array_equal(pixels(ours), pixels(theirs(tiny, [pooling], image=EDGES)))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (IMG2IMG, {"strength": 0.6}),
        (INPAINT, {"strength": 0.6, "mask_image": square_mask()}),
        (INPAINT, {"strength": 1.0, "mask_image": square_mask()}),
    ],
)
def test_with_a_picture_to_draw_from(tiny, nets, kind, more):
    more = more | {"image": POSE, "control_image": EDGES, "controlnet_conditioning_scale": 0.8}
    ours = sd.SimpleSampler(tiny)(PROMPT, controlnet=nets[0], paste=False, **CALL, **more)
    assert np.array_equal(pixels(ours), pixels(theirs(tiny, nets[:1], kind, **more)))


def test_weights_for_inpainting(nets):
    """A ControlNet is told the latents alone, not the mask beside them."""
    model = random_model(unet=replace(UNET, in_channels=9))
    net = random_controlnet(model)
    assert net.config.in_channels == 4
    more = {"image": POSE, "control_image": EDGES, "mask_image": square_mask(), "strength": 1.0}
    more |= {"controlnet_conditioning_scale": 1.0}  # there, this pipeline has another default
    ours = sd.SimpleSampler(model)(PROMPT, controlnet=net, paste=False, **CALL, **more)
    assert np.array_equal(pixels(ours), pixels(theirs(model, [net], INPAINT, **more)))


def test_nothing_is_learned_yet(tiny):
    net = controlnet_for(tiny.unet)
    assert torch.equal(net.input_blocks[1][0].in_layers[2].weight, tiny.unet.input_blocks[1][0].in_layers[2].weight)
    call = CALL | {"output_type": "latent", "height": 64, "width": 64}
    drawn = sd.SimpleSampler(tiny)(PROMPT, controlnet=net, control_image=EDGES, **call)
    assert torch.equal(drawn, sd.SimpleSampler(tiny)(PROMPT, **call))
    unread = sd.load("shapes", dtype=torch.float64)  # of a file in float16: what it computes in is what counts
    assert controlnet_for(unread.unet, (2, 2)).place == (torch.device("cpu"), torch.float64)


# ---- every way to draw


def control_call(nets, **more):
    x = torch.linspace(0, 1, 56)
    pictures = [x.expand(1, 3, 72, 56), (1 - x).square().expand(1, 3, 72, 56)]
    call = {"num_inference_steps": 3, "scheduler": "ddim", "output_type": "latent", "controlnet": nets}
    call |= {"control_image": pictures[: len(nets)], "control_guidance_end": [0.7, 1.0][: len(nets)]}
    return call | more


@pytest.mark.parametrize("how", [{}, {"guess_mode": True}, {"guidance_scale": 1.0}])
def test_lean_draws_what_simple_draws(how):
    model = make_model(dtype=torch.float64)
    call = control_call([random_controlnet(model, seed) for seed in (3, 4)], **how)
    wanted = sd.SimpleSampler(model)(["a", "b"], **call)
    sampler = sd.LeanSampler(model)
    for memory in (10**12, sampler_least(sampler, call)):  # both halves of guidance together, and one by one
        sampler.memory = memory
        assert (sampler(["a", "b"], **call) - wanted).abs().max() < 1e-10


def plan(sampler, prompt="a", **call):
    return sampler.plan(prompt, **{k: v for k, v in call.items() if k != "output_type"})


def sampler_least(sampler, call):
    sampler.memory = 1
    with pytest.raises(ValueError, match=r"the least is (\d+) MB") as caught:
        plan(sampler, ["a", "b"], **call)
    return (1 + int(str(caught.value).split("the least is ")[1].split(" MB")[0])) * 1_000_000


def test_lean_leaves_the_weights_in_the_file(tiny, nets, tmp_path):
    sd.save_controlnet(nets[0], tmp_path / "net.safetensors", torch.float16)
    net = sd.load_controlnet(tmp_path / "net.safetensors")
    call = {**control_call([net]), "negative_prompt": "blue"}
    small = plan(sd.LeanSampler(tiny), **call)
    assert "1 ControlNet" in str(small)
    assert small.job.streamable > sum(w.numel() for n, w in net.named_parameters() if "zero_convs" in n)
    latents = sd.LeanSampler(tiny)("a", **call)
    assert target(net) is not None  # nobody has read it
    assert (latents - sd.SimpleSampler(tiny)("a", **call)).abs().max() < 1e-3
    assert target(net) is None


def test_a_plan_counts_what_is_added(tiny, nets):
    sampler = sd.LeanSampler(tiny)
    none = sampler.plan("a", height=72, width=56, num_inference_steps=3).peaks["UNet"]
    one, two = (plan(sampler, **control_call(nets[:n])).peaks["UNet"] for n in (1, 2))
    assert none < one < two


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fast_models_and_fast_nets(dtype):
    model = make_model(dtype=dtype)
    nets = [random_controlnet(model, seed) for seed in (3, 4)]
    wanted = sd.SimpleSampler(model)("a", **control_call(nets))
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    for its in (nets, [sd.fast(nets[0]), sd.fast(nets[1])]):
        got = sd.SimpleSampler(sd.fast(model))("a", **control_call(its))
        assert (got - wanted).abs().max() < bound * wanted.abs().max()
    assert type(sd.fast(nets[0])) is type(nets[0])


def over_ranks(rank, splits):
    model = make_model(dtype=torch.float64)
    nets = [random_controlnet(model, seed) for seed in (3, 4)]
    worst = {}
    for guess in (False, True):
        call = control_call(nets, guess_mode=guess, num_images_per_prompt=2)
        wanted = sd.SimpleSampler(model)("a b", **call)
        for split in splits:
            found = sd.ParallelSampler(model, split)("a b", **call)
            worst[str(split), guess] = (found - wanted).abs().max().item()
    nets[0].config = replace(nets[0].config, global_pool=True)
    try:
        sd.ParallelSampler(model, {"rows": 2})("a b", **control_call(nets[:1]))
    except ValueError as error:
        return worst, str(error)
    return worst, ""


@pytest.mark.slow
def test_over_ranks():
    for worst, refused in in_world(2, over_ranks, [{"image": 2}, {"guidance": 2}, {"rows": 2}]):
        assert max(worst.values()) < 1e-10, worst
        assert "split by image or guidance" in refused


def disagree(rank):
    model = make_model(dtype=torch.float64)
    net = random_controlnet(model, seed=3 + rank)
    try:
        sd.ParallelSampler(model, {"image": 2})("a", **control_call([net], num_images_per_prompt=2))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_agree_on_their_control_nets():
    assert all("disagree on the ControlNets" in message for message in in_world(2, disagree))


# ---- files


def write_hub(folder, net, **config):
    diffusers_controlnet(net).save_config(folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    save_file(hub_controlnet(net), folder / "diffusion_pytorch_model.safetensors")
    return folder


FORMS = ["prefixed", "bare", "pickle", "beside a model", "Hub", "Hub's names alone", "ours"]


def written(form, folder, net, model):
    tensors = {n: t.clone() for n, t in net.state_dict().items()}
    prefixed = {f"control_model.{n}": t for n, t in tensors.items()}
    path = folder / "net.safetensors"
    if form == "Hub":
        return write_hub(folder, net)
    if form == "pickle":
        torch.save(prefixed, folder / "net.pth")
        return folder / "net.pth"
    if form == "beside a model":
        return write_ckpt(folder / "net.ckpt", compvis_tensors(model) | prefixed)
    if form == "ours":
        sd.save_controlnet(net, path)
        return path
    save_file({"prefixed": prefixed, "bare": tensors, "Hub's names alone": hub_controlnet(net)}[form], path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors(form, tmp_path, tiny, nets):
    path = written(form, tmp_path, nets[0], tiny)
    net = sd.load_controlnet(path)
    assert net.config == nets[0].config
    wanted = nets[0].state_dict()
    assert net.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in net.state_dict().items())
    assert len(net.hash) == 10
    facts = sd.info(path)
    assert facts["kind"] == "ControlNet"
    with pytest.raises(LoadError, match=r"ControlNet.*sd.load_controlnet \(--controlnet\)"):
        sd.load(path)


def test_differences_are_added_to_the_unet_s_weights(tmp_path, tiny, nets):
    unet, wanted = tiny.unet.state_dict(), nets[0].state_dict()
    apart = {n: t - unet[n] if n in unet else t for n, t in wanted.items()}
    save_file(apart | {"difference": torch.zeros(0)}, tmp_path / "net.safetensors")
    net = sd.load_controlnet(tmp_path / "net.safetensors", model=tiny)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)
    assert sd.info(tmp_path / "net.safetensors")["difference"]
    with pytest.raises(LoadError, match=r"differences from the weights of a UNet: give the model.*model="):
        sd.load_controlnet(tmp_path / "net.safetensors")
    wide = random_model(unet=replace(UNET, model_channels=64, context_dim=64))
    with pytest.raises(LoadError, match="differences from another UNet"):
        sd.load_controlnet(tmp_path / "net.safetensors", model=wide)
    for_inpainting = random_model(unet=replace(UNET, in_channels=9))
    assert sd.load_controlnet(tmp_path / "net.safetensors", model=for_inpainting).config.in_channels == 4


def test_what_a_file_does_not_tell_is_the_model_s_or_given(tmp_path, nets):
    model = random_model(unet=replace(UNET, num_heads=4), dtype=torch.float64)
    save_file(nets[0].state_dict(), tmp_path / "net.safetensors")
    net = sd.load_controlnet(tmp_path / "net.safetensors", model=model)
    assert net.config.num_heads == 4
    assert net.place == (torch.device("cpu"), torch.float64)
    net = sd.load_controlnet(tmp_path / "net.safetensors", config={"num_heads": 2, "global_pool": True})
    assert net.config.num_heads == 2
    assert net.config.global_pool
    assert write_hub(tmp_path, nets[0], global_pool_conditions=True)
    assert sd.load_controlnet(tmp_path).config.global_pool


def test_weights_stay_in_the_file_until_the_first_call(tmp_path, tiny, nets):
    sd.save_controlnet(nets[0], tmp_path / "net.safetensors", torch.float16)
    net = sd.load_controlnet(tmp_path / "net.safetensors")
    assert target(net) == (torch.device("cpu"), torch.float32)
    sd.SimpleSampler(tiny)(PROMPT, controlnet=net, control_image=EDGES, **CALL)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_a_file_that_is_changed_is_one_sentence(tmp_path, tiny, nets):
    path = tmp_path / "net.safetensors"
    sd.save_controlnet(nets[0], path)
    steps = sd.SimpleSampler(tiny).stream(
        PROMPT, controlnet=sd.load_controlnet(path), control_image=EDGES, num_inference_steps=4
    )
    next(steps)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(LoadError, match="has shrunk"):
        next(steps)


def test_an_existing_file_is_not_written_over(tmp_path, nets):
    (tmp_path / "net.safetensors").write_text("x")
    with pytest.raises(LoadError, match="exists: choose another name"):
        sd.save_controlnet(nets[0], tmp_path / "net.safetensors")
    with pytest.raises(LoadError, match=r"must end in \.safetensors"):
        sd.save_controlnet(nets[0], tmp_path / "net.pth")
    assert (tmp_path / "net.safetensors").read_text() == "x"


FROM_THE_HUB = """
import json, sys, sd
answers = []
for name in ("a/canny", "a/loose", "a/model"):
    for ask in (sd.info, sd.load_controlnet):
        try:
            found = ask(name)
            answers.append([found["kind"], found["problem"]] if ask is sd.info else found.hash)
        except ValueError as error:
            answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_repositories(tmp_path, tiny, nets):
    """In a process of its own, for the Hub's client reads its settings when it is imported."""
    write_hub(tmp_path / "canny", nets[0])
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose/control.pth").write_bytes(b"x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"_class_name": "T2IAdapter"}')
    with serve({f"a/{name}": tmp_path / name for name in ("canny", "loose", "model")}) as (address, served):
        env = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB], capture_output=True, text=True, env=os.environ | env, check=False
        )
        assert done.returncode == 0, done.stderr
        (kind, problem), digest, *others = json.loads(done.stdout.splitlines()[-1])
    assert kind == "ControlNet"
    assert problem.startswith("a/canny is not in the layout of diffusers")
    assert digest == sd.load_controlnet(tmp_path / "canny").hash
    weights = "a/canny/diffusion_pytorch_model.safetensors"
    assert served.fetched.count(weights) == 1  # `info` reads the header alone
    assert "download control.pth and give its path" in others[1]
    assert "its config.json is of 'T2IAdapter'" in others[3]


# ---- what is refused


def without(tensors, *beginnings):
    return {name: t for name, t in tensors.items() if not name.startswith(beginnings)}


WRONG_FILES = {
    "no ControlNet": (lambda t: {"x": torch.zeros(1)}, "not recognised, and no ControlNet"),
    "a UNet": (lambda t: without(t, "input_hint", "zero", "middle_block_out"), "and no ControlNet of Stable Diff"),
    "a LoRA": (lambda t: {"lora_unet_a.lora_down.weight": torch.zeros(1)}, "LoRA weights, and no ControlNet"),
    "a Control-LoRA": (lambda t: t | {"lora_controlnet": torch.zeros(0)}, "Control-LoRA weights"),
    "SDXL's": (lambda t: t | {"label_emb.0.0.weight": torch.zeros(2, 2)}, "SDXL's ControlNet weights"),
    "a Union": (lambda t: t | {"task_embedding": torch.zeros(2, 2)}, "ControlNet Union weights"),
    "incomplete": (lambda t: without(t, "zero_convs.3"), r"is missing \(zero_convs\.3\.0\.weight"),
    "without its hint": (lambda t: without(t, "input_hint_block.0."), "incomplete, or not of Stable"),
    "surplus": (lambda t: t | {"more": torch.zeros(1)}, r"a tensor is surplus \(more\)"),
    "another shape": (lambda t: t | {"zero_convs.0.0.bias": torch.zeros(3)}, "wrong shape"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_files_that_are_none(kind, tmp_path, nets):
    make, message = WRONG_FILES[kind]
    save_file(make(dict(nets[0].state_dict())), tmp_path / "net.safetensors")
    with pytest.raises(LoadError, match=message) as caught:
        sd.load_controlnet(tmp_path / "net.safetensors")
    assert str(caught.value).endswith(".")


def test_places_that_hold_none(tmp_path, nets, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match=r"There is no file or folder no\.pth: give a ControlNet's"):
        sd.load_controlnet("no.pth")
    with pytest.raises(LoadError, match=r"folder without a ControlNet \(it has no config.json\)"):
        sd.load_controlnet(tmp_path)
    for config, message in (
        ({"_class_name": "AutoencoderKL"}, "its config.json is of 'AutoencoderKL'"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "channels in another order"),
        ({"conditioning_embedding_out_channels": 7}, "are no widths"),
        ({"conditioning_embedding_out_channels": [0]}, "give usable sizes"),
        ({"cross_attention_dim": 2048}, "SDXL"),
    ):
        write_hub(tmp_path, nets[0], **config)
        with pytest.raises(LoadError, match=message):
            sd.load_controlnet(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    write_hub(tmp_path / "sub", nets[0])
    (tmp_path / "sub/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(HubError, match=r"has no weights diffusion_pytorch_model\.safetensors"):
        sd.load_controlnet(tmp_path / "sub")
    save_file(nets[0].state_dict(), tmp_path / "odd.safetensors", {METADATA: "["})
    with pytest.raises(LoadError, match="damaged metadata"):
        sd.load_controlnet(tmp_path / "odd.safetensors")
    with pytest.raises(LoadError, match="has no 'width'"):
        config_from("x", {"width": 3})
    with pytest.raises(LoadError, match="dtype must be"):
        sd.load_controlnet(tmp_path / "odd.safetensors", dtype=torch.int8)
    assert config_from("x", asdict(ControlNetConfig())) == ControlNetConfig()


def wrong_calls(tiny, nets):
    other = random_model(unet=replace(UNET, context_dim=128, model_channels=64))
    no_hints = random_controlnet(tiny, hint_widths=(16, 32))
    double = random_controlnet(make_model(dtype=torch.float64))
    one = {"controlnet": nets[0], "control_image": EDGES}
    two = {"controlnet": nets, "control_image": [EDGES, POSE]}
    return [
        ({"controlnet": nets[0]}, "A ControlNet needs a picture to follow: give it as control_image"),
        ({"control_image": EDGES}, "control_image is for a ControlNet, and there is none"),
        (
            {**two, "control_image": EDGES},
            "There are 2 ControlNets and 1 control image: give control_image as a list",
        ),
        ({**two, "control_image": [EDGES] * 3}, "There are 2 ControlNets and 3 control images"),
        ({**one, "controlnet": []}, "controlnet is an empty list"),
        ({**one, "controlnet": "canny.pth"}, r"must be what sd.load_controlnet gives.*'canny.pth'"),
        (
            {**one, "controlnet": random_controlnet(other)},
            "for another model: its model_channels is 64, and this.*32",
        ),
        ({**one, "controlnet": no_hints}, "makes a picture 2 times smaller, and this model's VAE 8"),
        ({**one, "controlnet": double}, "computes in float64 on cpu, and the UNet in float32 on cpu: load it with"),
        ({**one, "control_image": []}, "control_image is an empty list"),
        ({**one, "control_image": [[EDGES]]}, "list of lists"),
        ({**one, "control_image": [EDGES] * 3}, "control_image has 3 pictures for 1 prompts"),
        ({**one, "control_image": 7}, "control_image must be a picture"),
        ({**one, "control_image": torch.zeros(1, 3, 8, 8)}, "shape .images, 3, 64, 64"),
        ({**one, "control_image": torch.full((1, 3, 64, 64), 2.0)}, "values from 0 to 1"),
        ({**one, "controlnet_conditioning_scale": "a"}, "controlnet_conditioning_scale must be a number"),
        ({**one, "controlnet_conditioning_scale": float("nan")}, "controlnet_conditioning_scale must be a number"),
        ({**two, "controlnet_conditioning_scale": [1.0]}, "has 1 numbers for 2 ControlNets"),
        ({**one, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, "start below the end, not 0.5 and 0.5"),
        ({**one, "control_guidance_end": 1.5}, "from 0 to 1"),
        ({**one, "guess_mode": 1}, "guess_mode must be True or False"),
        ({**two, "control_image": [EDGES, noise_picture(72, 64)]}, "several sizes"),
        ({**one, "control_net": 1}, "take no argument control_net"),
    ]


def test_calls_that_cannot_be(tiny, nets):
    sampler = sd.SimpleSampler(tiny)
    for options, message in wrong_calls(tiny, nets):
        size = {} if message == "several sizes" else {"height": 64, "width": 64}
        with pytest.raises(ValueError, match=message) as caught:
            sampler.stream(PROMPT, **size, **options)
        assert str(caught.value).endswith("."), message
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"sd\.invert takes no argument controlnet"):
        sd.invert(sampler, POSE, controlnet=nets[0], control_image=EDGES)


def test_pictures_of_other_sizes_are_cut_like_the_picture_that_is_drawn_from(tiny, nets):
    wide = noise_picture(160, 80)
    call = {**CALL, "controlnet": nets[0], "output_type": "latent"}
    sampler = sd.SimpleSampler(tiny)
    cut = sampler(PROMPT, control_image=wide, height=64, width=64, **call)
    same = wide.resize((128, 64), Image.Resampling.LANCZOS).crop((32, 0, 96, 64))
    assert torch.equal(cut, sampler(PROMPT, control_image=same, **call))
    assert sampler(PROMPT, control_image=wide, **call).shape[-2:] == (10, 20)  # its own size
    assert sampler(PROMPT, control_image=wide, image=POSE, **call).shape[-2:] == (8, 8)  # that of `image`
    assert sampler(PROMPT, control_image=noise_picture(64, 5), **call).shape[-2:] == (8, 8)  # too small to say one
    masked = torch.rand(1, 3, 64, 64)
    masked[..., :32] = -1  # as ControlNets for inpainting are told
    assert not torch.equal(cut, sampler(PROMPT, control_image=masked, **call))


# ---- instruments


def test_instruments_reach_into_a_control_net(tiny, nets):
    sampler, call = sd.SimpleSampler(tiny), {**CALL, "output_type": "latent"}
    one = {"controlnet": nets[0], "control_image": EDGES}
    seen = []

    def look(out, at):
        seen.append((at.step, at.timestep, out.shape, at.cond, at.uncond))

    with sd.study.edit(sampler, {"control.zero_convs.3": look}, controlnet=nets[0]):
        drawn = sampler(PROMPT, **call, **one)
    assert [s[0] for s in seen] == [0, 1, 2, 3, 4]
    assert seen[0][1] == 801.0
    assert seen[0][2] == (2, 64, 4, 4)
    assert seen[0][3:] == (slice(1, 2), slice(0, 1))
    assert torch.equal(drawn, sampler(PROMPT, **call, **one))
    everything = {
        "control.zero_convs.?": lambda out, at: 0 * out,
        "control.middle_block_out": lambda out, at: 0 * out,
    }
    with sd.study.edit(sampler, everything, controlnet=nets[0]):
        nothing = sampler(PROMPT, **call, **one)
    assert torch.equal(nothing, sampler(PROMPT, height=64, width=64, **call))
    assert "control.input_hint_block.14" in sd.study.names(tiny, controlnet=nets[0])
    assert "control.1.middle_block" in sd.study.names(tiny, controlnet=nets)
    with (
        pytest.raises(ValueError, match=r"No module is called 'control\.zero_convs\.3'"),
        sd.study.edit(sampler, {"control.zero_convs.3": look}),
    ):
        pass
    seen.clear()
    with sd.study.edit(sampler, {"control.zero_convs.3": look}, controlnet=nets[0]):
        sampler(PROMPT, guess_mode=True, **call, **one)
    assert seen[0][2:] == ((1, 64, 4, 4), slice(0, 1), slice(0, 0))
    seen.clear()
    with sd.study.edit(tiny, {"control.zero_convs.3": look}, controlnet=nets[0]):
        sd.LeanSampler(tiny)(PROMPT, **call, **one)
    assert {s[0] for s in seen} == {0, 1, 2, 3, 4}


def test_a_trace_says_what_was_followed(tiny, nets):
    call = {"controlnet": nets[0], "control_image": EDGES, "num_inference_steps": 2}
    trace = sd.study.trace(sd.SimpleSampler(tiny), PROMPT, **call)
    assert trace.settings["controlnet"] == ["random weights"]
    assert trace.settings["controlnet_conditioning_scale"] == [1.0]
    with sd.study.attention_maps(sd.SimpleSampler(tiny)) as maps:
        sd.SimpleSampler(tiny)(PROMPT, **call)
    assert maps.tokens([1]).shape == (64, 64)


# ---- the command


@pytest.fixture
def folder(tmp_path, monkeypatch, shapes):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 4):
        sd.save_controlnet(random_controlnet(shapes, seed), tmp_path / f"net{seed}.safetensors")
    noise_picture(128, 128).save("edges.png")
    noise_picture(128, 128, seed=1).save("pose.png")
    return tmp_path


def artist(*words, capsys):
    code = main([*words, "--quiet"])
    return code, capsys.readouterr().err


def test_the_command_draws_and_draws_again(folder, capsys):
    nets = ["--controlnet", "net3.safetensors:0.5", "--controlnet", "net4.safetensors"]
    images = ["--control-image", "edges.png", "--control-image", "pose.png"]
    call = ["a red star", "--steps", "2", "--guess-mode", "--control-end", "0.6", *nets, *images]
    assert artist(*call, "-o", "a.png", capsys=capsys) == (0, "")
    model = sd.load("shapes")
    options = {
        "controlnet": [sd.load_controlnet(f"net{seed}.safetensors", model=model) for seed in (3, 4)],
        "control_image": ["edges.png", "pose.png"],
        "controlnet_conditioning_scale": [0.5, 1.0],
        "control_guidance_end": 0.6,
    }
    (wanted,) = sd.SimpleSampler(model)("a red star", num_inference_steps=2, guess_mode=True, **options)
    drawn = Image.open("a.png")
    assert np.array_equal(np.asarray(drawn), np.asarray(wanted))
    told = json.loads(drawn.text["sd"])
    assert [entry["file"] for entry in told["controlnet"]] == ["net3.safetensors", "net4.safetensors"]
    assert told["controlnet"][0] | {"scale": 0.5, "end": 0.6, "image": "edges.png"} == told["controlnet"][0]
    assert len(told["controlnet"][0]["digest"]) == len(told["controlnet"][0]["image_digest"]) == 10
    assert artist("--again", "a.png", *images, "-o", "b.png", capsys=capsys) == (0, "")
    assert np.array_equal(np.asarray(Image.open("b.png")), np.asarray(wanted))
    code, said = artist("--again", "a.png", *images[:2], "--control-image", "a.png", "-o", "c.png", capsys=capsys)
    assert code == 0
    assert "drawn with another control image than a.png" in said
    assert not np.array_equal(np.asarray(Image.open("c.png")), np.asarray(wanted))
    code, said = artist("--again", "a.png", capsys=capsys)
    assert (code, "add --control-image edges.png --control-image pose.png" in said) == (2, True)
    (folder / "net3.safetensors").rename(folder / "moved.safetensors")
    code, said = artist("--again", "a.png", *images, capsys=capsys)
    assert (code, "which is no file here" in said) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--control-image", "edges.png"], "--control-image is for a ControlNet, and there is none"),
        (["--canny"], "--canny is for a ControlNet"),
        (
            ["--controlnet", "net3.safetensors"],
            "1 ControlNet and 0 control images: give --control-image once for each",
        ),
        (["--controlnet", "net3.safetensors", "--control-image", "net3.safetensors"], "--control-image net3.safet"),
        (
            ["--controlnet", "net3.safetensors", "--control-image", "net3.safetensors", "--canny"],
            "--control-image net3.safet",
        ),
        (["--lora", "net3.safetensors"], "holds ControlNet weights, and no LoRA: give it with"),
        (["--controlnet", "no.pth", "--control-image", "edges.png"], "There is no file or folder no.pth"),
        (["--model", "net3.safetensors"], "ControlNet weights: give it beside a model, with sd.load_controlnet"),
    ],
)
def test_what_the_command_refuses(words, message, folder, capsys):
    code, said = artist("a red star", *words, capsys=capsys)
    assert code == 2
    assert message in said
    assert not list(folder.glob("artist*"))


def test_study_and_info_and_plan_know_of_it(folder, capsys):
    call = ["a red star", "--controlnet", "net3.safetensors", "--control-image", "edges.png", "--steps", "2"]
    assert artist("study", *call, capsys=capsys) == (0, "")
    assert (folder / "report.html").exists()
    assert main(["info", "net3.safetensors"]) == 0
    assert "ControlNet, self-contained file" in capsys.readouterr().out
    assert main([*call, "--variant", "lean", "--plan"]) == 0
    assert "1 ControlNet" in capsys.readouterr().out


def test_canny_s_edges():
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste((0, 0, 0), (8, 8, 24, 24))
    pytest.importorskip("cv2")
    edges = np.asarray(canny_edges(picture))
    assert edges.shape == (32, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert not edges[12:20, 12:20].any()
    assert edges[8:24, 7:9].any(1).all()
    with pytest.raises(ValueError, match="the first not above the second"):
        canny_edges(picture, 3, 2)


def test_without_opencv_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r"pip install 'artificial-artist\[canny\]'"):
        canny_edges(Image.new("RGB", (8, 8)))


def test_random_weights_are_no_zeros(nets):
    assert random_tensors({"a.weight": torch.Size([4, 4])}, 0, torch.float32)["a.weight"].abs().max() > 0
    assert all(p.abs().max() > 0 for p in nets[0].zero_convs.parameters())

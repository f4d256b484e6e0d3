"""`sd.to_diffusers` and `sd.from_diffusers`: the same tensors in both libraries, and what cannot be shared."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sd
from sd.compare.drawings import mask_of, picture_of
from sd.compare.measure import Peak, relative
from sd.compare.reference import CLASSES, CompareError, diffusers_scheduler
from sd.schedule import NoiseSchedule
from sd.scheduler import SCHEDULERS, make_scheduler
from sd.weights.defaults import Defaults
from sd.weights.scheduler_config import scheduler_from_config
from tests.layouts import TEXT, UNET, make_model, write_hub

diffusers = pytest.importorskip("diffusers")

PROMPT, STEPS = "a red star above a blue ring", 2
PARTS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
NINE = replace(UNET, in_channels=9)


def modules_of(model):
    return {"unet": model.unet, "vae": model.vae, "text": model.text.model}


def memory(module):
    """Where each parameter lies, with its storage and its number of elements: in any order, for names differ."""
    return sorted((p.data_ptr(), p.untyped_storage().data_ptr(), p.numel()) for p in module.parameters())


def shared(model, pipe):
    return all(memory(m) == memory(getattr(pipe, PARTS[part])) for part, m in modules_of(model).items())


def theirs(pipe, seed=3, **call):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)} | call
    return np.asarray(pipe(PROMPT, **call).images[0])


def ours(model, seed=3, **call):
    return np.asarray(sd.SimpleSampler(model)(PROMPT, seed=seed, **{"num_inference_steps": STEPS} | call)[0])


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="module")
def made(tiny):
    """A pipeline of the small model; leave it as it is."""
    return sd.to_diffusers(tiny)


@pytest.fixture
def pipe(made):
    """One with tensors of its own, to be changed."""
    return copy.deepcopy(made)


# ---- the same tensors


@pytest.mark.parametrize(("unet", "dtype"), [(UNET, torch.float32), (NINE, torch.bfloat16)])
def test_no_bytes_are_copied_on_the_way_there(unet, dtype):
    model = make_model(unet=unet, dtype=dtype)
    before = {part: memory(module) for part, module in modules_of(model).items()}
    with Peak() as made:
        pipe = sd.to_diffusers(model)
    assert shared(model, pipe)
    assert made.peak < 50_000  # of 10 MB and more: noise schedule, positions
    assert {part: memory(module) for part, module in modules_of(model).items()} == before
    kind = "StableDiffusionInpaintPipeline" if unet is NINE else "StableDiffusionPipeline"
    assert type(pipe).__name__ == kind
    assert (pipe.dtype, pipe.device) == (dtype, model.device)
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None
    for part in PARTS.values():
        module = getattr(pipe, part)
        assert not any(m.training for m in module.modules())
        assert all(p.requires_grad for p in module.parameters())
        assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def test_no_bytes_are_copied_on_the_way_back():
    model = make_model(unet=NINE)
    pipe = sd.to_diffusers(model)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.train()
    with Peak() as made:
        back = sd.from_diffusers(pipe)
    assert shared(back, pipe)
    assert shared(model, pipe)
    assert made.peak < 50_000
    for part in ("unet", "vae"):
        assert getattr(back, part).config == getattr(model, part).config
        assert list(getattr(back, part).state_dict()) == list(getattr(model, part).state_dict())
    assert back.text.config == model.text.config
    assert back.text.tokenizer.ids(PROMPT) == model.text.tokenizer.ids(PROMPT)
    assert (back.size, back.defaults, back.hash) == (model.size, model.defaults, None)
    assert back.name == "StableDiffusionInpaintPipeline"
    assert not back.unet.training
    assert pipe.unet.training  # what was given stays as it is
    assert all(p.requires_grad for p in pipe.unet.parameters())
    assert not any(p.requires_grad for p in pipe.text_encoder.parameters())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_weights_that_are_still_in_their_file(tmp_path, tiny, dtype):
    """Read first, and then shared; those that are of the dtype already stay mapped, and can be changed and saved."""
    sd.save(tiny, tmp_path / "half.safetensors", torch.float16)
    model = sd.load(tmp_path / "half.safetensors", dtype=dtype)
    pipe = sd.to_diffusers(model)
    assert pipe.dtype == model.dtype == (dtype or torch.float32)
    assert shared(model, pipe)
    with torch.no_grad():
        pipe.vae.decoder.mid_block.attentions[0].to_q.weight[0, 0] = 7
    assert model.vae.decoder.mid.attn_1.q.weight[0, 0] == 7
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=model.dtype)
    assert again.vae.decoder.mid_block.attentions[0].to_q.weight[0, 0] == 7
    assert again.scheduler.config.steps_offset == 1


def test_a_pipeline_out_of_a_folder_is_what_load_makes_of_it(tmp_path, tiny):
    folder = write_hub(tmp_path / "hub", tiny)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    with Peak() as made:
        model = sd.from_diffusers(pipe)
    assert shared(model, pipe)
    assert made.peak < 50_000
    loaded = sd.load(folder)
    assert (model.name, model.size, model.defaults) == (loaded.name, loaded.size, loaded.defaults)
    assert json.loads(model.text.texts["vocab.json"]) == json.loads(loaded.text.texts["vocab.json"])
    assert np.array_equal(ours(model), ours(loaded))
    assert np.array_equal(ours(model), theirs(pipe))


def test_linear_layers_around_the_transformers(tmp_path):
    """As SD 2 has them: they are linear here, too, and compute what convolutions of 1 x 1 do, up to rounding."""
    model = make_model(dtype=torch.float64)
    pipe = sd.to_diffusers(model)
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config | {"use_linear_projection": True}).eval()
    state = pipe.unet.state_dict()
    unet.load_state_dict({key: state[key].reshape(t.shape) for key, t in unet.state_dict().items()}, assign=True)
    assert unet.mid_block.attentions[0].proj_in.weight.ndim == 2
    pipe.register_modules(unet=unet)
    back = sd.from_diffusers(pipe)
    assert shared(back, pipe)
    assert shared(model, pipe)
    arguments = (
        torch.randn(2, 4, 8, 8, dtype=torch.float64),
        torch.tensor([981.0, 17.25]),
        model.encode_prompt(["", "a"]),
    )
    with torch.no_grad():
        assert torch.equal(back.unet(*arguments), unet(*arguments).sample)
        assert relative(back.unet(*arguments), model.unet(*arguments)) < 1e-10
    pipe.save_pretrained(tmp_path / "linear")  # and a folder of such weights is loaded
    loaded = sd.load(tmp_path / "linear", dtype=torch.float64)
    assert all(torch.equal(t, back.unet.state_dict()[name]) for name, t in loaded.unet.state_dict().items())


def test_a_tokenizer_that_fills_up_with_another_token(pipe):
    """As SD 2's does."""
    pipe.tokenizer.pad_token = "!"
    model = sd.from_diffusers(pipe)
    assert model.text.config.padding == 0
    assert model.text.chunks("a")[0].ids[-1] == 0


# ---- the same results


@pytest.mark.parametrize("scheduler", ["pndm", "euler_a", "dpmpp_2m_karras", "lcm"])
def test_whole_pictures_are_identical(model, scheduler):
    model.defaults = Defaults(scheduler, 3, 4.0)
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": "a ring"}
    pipe = sd.to_diffusers(model)
    wanted = ours(model, **call)
    assert wanted.std() > 10
    assert np.array_equal(theirs(pipe, **call), wanted)
    assert np.array_equal(ours(sd.from_diffusers(pipe), **call), wanted)


def test_inpainting_and_pipelines_made_of_one_another(model):
    """Other pipelines of diffusers are made of this one by from_pipe, and share the tensors."""
    model.defaults = Defaults("ddim")  # diffusers' PNDM is wrong where it begins in the middle
    given = {"image": picture_of(64), "strength": 0.8, "num_inference_steps": 4}
    pipe = sd.to_diffusers(model)
    second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=pipe.dtype)
    assert shared(model, second)
    assert np.array_equal(theirs(second, **given), ours(sd.from_diffusers(second), **given))
    nine = make_model(unet=NINE)
    nine.defaults = model.defaults
    given |= {"mask_image": mask_of(64), "height": 64, "width": 64}
    assert np.array_equal(theirs(sd.to_diffusers(nine), **given), ours(nine, paste=False, **given))


def test_half_precision_stays_shared_where_from_pipe_is_told_the_dtype():
    model = make_model(dtype=torch.bfloat16)
    pipe = sd.to_diffusers(model)
    second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=pipe.dtype)
    assert shared(model, second)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_to_the_last_timestep(model, prediction):
    """With zero SNR at the end, trailing steps, another picture size: all that defaults say goes with it."""
    schedule = NoiseSchedule(prediction_type=prediction, rescale_betas_zero_snr=True, beta_schedule="linear")
    options = {"timestep_spacing": "trailing"}
    model.defaults = Defaults("ddim", 4, 5.0, 48, 72, prediction, schedule, options)
    pipe = sd.to_diffusers(model)
    config = pipe.scheduler.config
    assert (config.prediction_type, config.timestep_spacing) == (prediction, "trailing")
    assert (config.rescale_betas_zero_snr, config.beta_schedule) == (True, "linear")
    assert tuple(pipe.unet.config.sample_size) == (6, 9)
    back = sd.from_diffusers(pipe)
    assert back.defaults == replace(model.defaults, num_inference_steps=50, guidance_scale=7.5)
    call = {"num_inference_steps": 4, "guidance_scale": 5.0}
    assert theirs(pipe, **call).shape == (48, 72, 3)
    assert np.array_equal(theirs(pipe, **call), ours(model, **call))
    assert np.array_equal(theirs(pipe, **call), ours(back, **call))


def test_parts_in_float64(model):
    model.to(dtype=torch.float64)
    pipe, generator = sd.to_diffusers(model), torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([981.0, 17.25])
    with torch.no_grad():
        context = model.encode_prompt([PROMPT, ""])
        tokens = pipe.tokenizer([PROMPT, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(pipe.text_encoder(tokens)[0], context)
        assert torch.equal(pipe.unet(x, t, context).sample, model.unet(x, t, context))
        image = model.vae.decode(x)
        assert torch.equal(pipe.vae.decode(x / model.vae.config.scale_factor).sample, image)
        assert torch.equal(pipe.vae.encode(image).latent_dist.mean, model.vae.moments(image)[0])


# ---- trained on one side, seen on the other


def train(modules, loss):
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=1e-2)
    loss.backward()
    optimizer.step()


def test_training_there_is_seen_here(model):
    pipe, fast, before = sd.to_diffusers(model), sd.fast(model), ours(model)
    assert np.abs(ours(fast).astype(int) - before).max() <= 1
    weights = {part: [p.clone() for p in module.parameters()] for part, module in modules_of(model).items()}
    tokens = pipe.tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids
    context = pipe.text_encoder(tokens)[0]
    noise = pipe.unet(torch.ones(1, 4, 8, 8), 500, context).sample
    image = pipe.vae.decode(noise).sample
    train(
        [getattr(pipe, part) for part in PARTS.values()], image.square().mean() + pipe.vae.encode(image)[0].mean.sum()
    )
    after = theirs(pipe)
    assert shared(model, pipe)
    assert shared(fast, sd.to_diffusers(fast))
    assert not np.array_equal(after, before)
    assert np.array_equal(ours(model), after)
    assert np.abs(ours(fast).astype(int) - after).max() <= 1  # what it had prepared is made anew
    for part, module in modules_of(model).items():
        changed = [not torch.equal(p, old) for p, old in zip(module.parameters(), weights[part], strict=True)]
        assert sum(changed) > 0.9 * len(changed), part


def test_training_here_is_seen_there(model):
    pipe = sd.to_diffusers(model)
    theirs_too = sd.from_diffusers(pipe)
    before = theirs(pipe)
    noise = model.unet(torch.ones(1, 4, 8, 8), torch.tensor([500]), model.encode_prompt(PROMPT))
    train([model.unet, model.vae], model.vae.decode(noise).square().mean())
    after = ours(model)
    assert not np.array_equal(after, before)
    assert np.array_equal(theirs(pipe), after)
    assert np.array_equal(ours(theirs_too), after)


def test_what_a_side_moves_is_its_own_from_then_on(model):
    pipe = sd.to_diffusers(model)
    pipe.unet.to(torch.float64)
    assert model.dtype == torch.float32
    assert memory(model.unet) != memory(pipe.unet)
    assert memory(model.vae) == memory(pipe.vae)


def test_a_copy_by_fast_of_a_file_in_half_precision_is_refused(tmp_path, tiny):
    sd.save(tiny, tmp_path / "half.safetensors", torch.float16)
    model = sd.load(tmp_path / "half.safetensors", dtype=torch.float32)
    fast = sd.fast(model)
    if len({p.dtype for p in fast.unet.parameters()}) == 1:
        pytest.skip("here sd.fast reads the weights")
    with pytest.raises(CompareError, match=r"weights in float16 on cpu and in float32 on cpu.*sd\.load returned"):
        sd.to_diffusers(fast)


def test_a_lora_goes_over_merged(tmp_path, tiny):
    """And a scale that is studied here is seen there, for it is merged anew in place."""
    name, generator = (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v",
        torch.Generator().manual_seed(0),
    )
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 64, generator=generator),
        f"{name}.lora_up.weight": torch.randn(64, 4, generator=generator),
    }
    save_file(tensors, tmp_path / "style.safetensors")
    model = sd.lora(tiny, tmp_path / "style.safetensors", 0.5)
    pipe = sd.to_diffusers(model)
    assert shared(model, pipe)
    wanted = ours(model)
    assert not np.array_equal(wanted, ours(tiny))
    assert np.array_equal(theirs(pipe), wanted)
    with sd.study.scale(model, "style", 0.0):
        assert np.array_equal(theirs(pipe), ours(tiny))
    assert np.array_equal(ours(sd.from_diffusers(pipe)), wanted)


# ---- schedulers


def named():
    """Every solver by each of its names: with the spacings of sigmas that it has."""
    for name in SCHEDULERS:
        for suffix in ("", "_karras", "_exponential", "_beta"):
            try:
                yield make_scheduler(name + suffix, 9)
            except ValueError:
                continue


def test_every_solver_goes_there_and_back():
    refused = []
    for solver in named():
        try:
            made = diffusers_scheduler(solver)
        except CompareError:
            refused.append((solver.name, solver.sigma_spacing))
            continue
        assert type(made).__name__ == CLASSES[solver.name]
        assert scheduler_from_config(made.config, 9) == solver
        made.set_timesteps(9)
        assert made.timesteps.tolist() == pytest.approx(solver.timesteps, abs=1e-3)
        for other in (diffusers.DDIMScheduler, diffusers.PNDMScheduler):  # as people change schedulers
            config = other.from_config(made.config).config
            assert not config.get("clip_sample")
            assert (config.set_alpha_to_one, config.steps_offset) == (False, 1)
            assert config.get("skip_prk_steps", True)
            assert config.timestep_spacing == "leading"  # the class's own, unless it was said
    assert refused == [("euler_a", spacing) for spacing in ("karras", "exponential", "beta")]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("euler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"euler_at_final": True, "lower_order_final": False, "timestep_spacing": "leading"}),
        ("unipc", {"solver_order": 3, "solver_type": "bh1"}),
        ("lcm", {"original_inference_steps": 25}),
        ("ddim", {"timestep_spacing": "linspace"}),
    ],
)
def test_options_of_a_solver(tiny, name, options):
    model, steps = copy.copy(tiny), 4 if name == "lcm" else 50
    model.defaults = Defaults(name, steps, schedule=NoiseSchedule(steps_offset=0), options=options)
    back = sd.from_diffusers(sd.to_diffusers(model)).defaults
    assert back == model.defaults  # the offset too, which the pipeline's constructor would have changed


def test_schedulers_that_people_put_into_a_pipeline(pipe):
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    defaults = sd.from_diffusers(pipe).defaults
    assert (defaults.scheduler, defaults.options) == ("dpmpp_2m_karras", {})
    # Made without v1's numbers: those that are there count.
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    schedule = sd.from_diffusers(pipe).defaults.schedule
    assert (schedule.beta_start, schedule.beta_schedule, schedule.steps_offset) == (0.0001, "linear", 0)
    assert schedule.set_alpha_to_one
    call = {"num_inference_steps": 3}
    assert np.array_equal(theirs(pipe, **call), ours(sd.from_diffusers(pipe), **call))


def test_a_scheduler_that_is_not_here_is_said(pipe):
    pipe.scheduler = diffusers.DEISMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.warns(UserWarning, match=r"StableDiffusionPipeline asks for a scheduler.*DEIS.*drawn with pndm"):
        assert sd.from_diffusers(pipe).defaults.scheduler == "pndm"
    pipe.scheduler = diffusers.DDIMScheduler()  # which clips, and so draws otherwise
    with pytest.warns(UserWarning, match="clip_sample"):
        sd.from_diffusers(pipe)


@pytest.mark.parametrize(
    ("name", "schedule", "options", "message"),
    [
        ("euler_a_karras", {}, {}, "EulerAncestralDiscreteScheduler of diffusers has no use_karras_sigmas = True"),
        (
            "heun",
            {"rescale_betas_zero_snr": True},
            {},
            "HeunDiscreteScheduler of diffusers has no rescale_betas_zero",
        ),
        ("lms", {}, {"final_sigmas_type": "sigma_min"}, "LMSDiscreteScheduler of diffusers has no final_sigmas_type"),
    ],
)
def test_what_diffusers_schedulers_do_not_have(tiny, name, schedule, options, message):
    model = copy.copy(tiny)
    model.defaults = Defaults(name, schedule=NoiseSchedule(**schedule), options=options)
    with pytest.raises(CompareError, match=message) as caught:
        sd.to_diffusers(model)
    assert str(caught.value).endswith("choose another scheduler in model.defaults.")


def test_a_solver_of_ones_own_is_none_of_diffusers(tiny, monkeypatch):
    model = copy.copy(tiny)
    monkeypatch.setitem(SCHEDULERS, "half", type("Half", (sd.DDIM,), {"name": "half"}))
    model.defaults = Defaults("half")
    with pytest.raises(CompareError, match="diffusers has no scheduler for 'half'"):
        sd.to_diffusers(model)


def test_a_scheduler_whose_package_is_missing(monkeypatch):
    def fails(*_, **__):
        raise ImportError("DPMSolverSDEScheduler requires the torchsde library but it was not found")

    monkeypatch.setattr(diffusers.DPMSolverSDEScheduler, "__init__", fails)
    with pytest.raises(CompareError, match="needs torchsde, which is not installed: pip install torchsde"):
        diffusers_scheduler("dpmpp_sde")


# ---- words


def test_words_that_were_added(model):
    pipe = sd.to_diffusers(make_model(text=replace(TEXT, vocab_size=520)))
    pipe.tokenizer.add_tokens(["<cat>", "<dog>"])
    back = sd.from_diffusers(pipe)
    text = "a <cat> and a <dog>"
    assert back.text.chunks(text)[0].ids == tuple(pipe.tokenizer(text, padding="max_length").input_ids)
    assert 517 in back.text.tokenizer.ids(text)
    there = sd.to_diffusers(back)
    assert there.tokenizer(text).input_ids == pipe.tokenizer(text).input_ids


# ---- what is no such pipeline


def without(key, value=None):
    return lambda pipe: setattr(pipe, key, value)


def add_lora(pipe):
    """As PEFT does it, by hand: the layer becomes the base of another one."""
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    layer = torch.nn.Module()
    layer.base_layer, layer.lora_A = attention.to_q, torch.nn.ModuleDict({"default": torch.nn.Linear(64, 2)})
    attention.to_q = layer


def quantise(pipe):
    pipe.unet.conv_in.weight = torch.nn.Parameter(pipe.unet.conv_in.weight.to(torch.int8), requires_grad=False)


def store_in_float8(pipe):
    pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data.to(torch.float8_e4m3fn)


def adapt(pipe):
    pipe.unet.encoder_hid_proj = torch.nn.Linear(4, 4)


def cut_otherwise(pipe):
    pipe.tokenizer.padding_side = "left"


def control(pipe):
    net = diffusers.ControlNetModel.from_unet(pipe.unet)
    return diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=net, requires_safety_checker=False
    )


def set_config(part, **changes):
    return lambda pipe: getattr(pipe, part).register_to_config(**changes)


def flux(pipe):
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    return diffusers.FluxPipeline(**dict.fromkeys(names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: "CompVis/stable-diffusion-v1-4", r"takes a pipeline of diffusers.*not 'str'.*sd\.load"),
        (lambda pipe: pipe.unet, "not 'UNet2DConditionModel'"),
        (flux, "FluxPipeline is no whole pipeline of Stable Diffusion v1: its unet is none"),
        (without("text_encoder"), "its text_encoder is none, where CLIPTextModel is expected"),
        (without("tokenizer"), "its tokenizer is none, where CLIPTokenizer is expected"),
        (without("scheduler"), "its scheduler is none"),
        (without("vae", torch.nn.Identity()), "its vae is Identity, where AutoencoderKL is expected"),
        (without("tokenizer", torch.nn.Identity()), "has a tokenizer that cannot be read"),
        (cut_otherwise, "numbers the text .* otherwise than CLIP's"),
        (set_config("unet", addition_embed_type="text_time"), r"it holds SDXL weights \(addition_embed_type"),
        (set_config("unet", cross_attention_dim=2048), "it holds SDXL weights"),
        (set_config("unet", in_channels=8), "it holds InstructPix2Pix weights"),
        (lambda _: sd.to_diffusers(make_model(unet=replace(UNET, in_channels=5))), "holds 5-channel weights"),
        (set_config("unet", time_cond_proj_dim=16), r"UNet: a tensor is missing \(time_embed\.cond_proj\.weight\)"),
        (set_config("unet", attention_head_dim=[5, 10, 20]), "its UNet has head counts"),
        (set_config("unet", layers_per_block=2), "UNet: a tensor is missing"),
        (set_config("vae", shift_factor=0.1), "its VAE is of a newer kind"),
        (set_config("scheduler", prediction_type="flow"), "prediction_type = 'flow'"),
        (add_lora, r"a LoRA that is loaded and not merged.*UNet: call pipe\.fuse_lora\(\).*unload_lora_weights"),
        (quantise, r"a UNet with quantised weights \(conv_in\.weight is int8\)"),
        (store_in_float8, "conv_in.weight is float8_e4m3fn"),
        (lambda pipe: pipe.vae.to("meta") and None, "has its VAE offloaded"),
        (lambda pipe: setattr(pipe.unet, "_hf_hook", object()), "has its UNet offloaded"),
        (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), r"FreeU switched on.*pipe\.disable_freeu\(\)"),
        (adapt, r"an IP-Adapter loaded.*pipe\.unload_ip_adapter\(\)"),
        (control, r"StableDiffusionControlNetPipeline has a controlnet.*from_pipe\(pipe, torch_dtype=pipe\.dtype\)"),
    ],
)
def test_what_cannot_be_shared_is_named(pipe, change, message):
    changed = change(pipe)
    with pytest.raises(sd.LoadError, match=message) as caught:
        sd.from_diffusers(pipe if changed is None else changed)
    said = str(caught.value)
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 500


class Compiled(torch.nn.Module):
    """As torch.compile wraps a module, whose compiler takes seconds to import."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name):
        return getattr(super().__getattr__("_orig_mod"), name) if name != "_orig_mod" else super().__getattr__(name)


def test_what_does_no_harm(pipe):
    """A safety checker is left out; a compiled UNet has the same weights; FreeU that is off again is off."""
    unet = pipe.unet
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    pipe.disable_freeu()
    pipe.safety_checker = torch.nn.Identity()
    pipe.text_encoder.config.architectures = ["CLIPModel"]  # out of whose file it came
    pipe.unet = Compiled(unet)
    assert memory(sd.from_diffusers(pipe).unet) == memory(unet)


@pytest.mark.parametrize("call", [sd.to_diffusers, sd.from_diffusers])
def test_without_diffusers_it_is_said_what_to_install(tiny, monkeypatch, call):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"needs diffusers.*pip install 'artificial-artist\[compare\]'\.$"):
        call(tiny)


def test_sizes_that_v1_does_not_have():
    """Every field of the three configs, each with a value of its own."""
    unet = sd.UNetConfig(4, 4, 48, (1, 2), 1, (2,), 4, 32, transformer_depth=2, num_groups=16)
    vae = sd.VAEConfig(3, 3, 48, (1, 1, 2), 1, 4, 0.5, num_groups=16)
    text = replace(TEXT, hidden_size=32, num_attention_heads=2, hidden_act="gelu", layer_norm_eps=1e-4)
    model = make_model(unet, vae, text, size=32)
    pipe = sd.to_diffusers(model)
    assert pipe.vae.config.scaling_factor == 0.5
    assert np.array_equal(theirs(pipe), ours(model))
    back = sd.from_diffusers(pipe)
    assert (back.unet.config, back.vae.config, back.text.config, back.size) == (unet, vae, text, 32)
    assert np.array_equal(ours(back), ours(model))


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(sd.__file__).parents[1] / "docs/diffusers.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["the same pixels: True", "ddim {'timestep_spacing': 'trailing'}", "True"]
    assert shared(names["model"], names["painter"])
    assert not np.array_equal(names["trained"], names["ours"])
    (drawn,) = sd.SimpleSampler(sd.load("trained.safetensors"))(names["prompt"], seed=7, **names["call"])
    assert np.array_equal(drawn, names["trained"])

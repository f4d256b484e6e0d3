"""Stable Diffusion 2, SD-Turbo and LCM: beside diffusers' own pipelines, and their files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sd
from sd.compare.reference import (
    SMALL_TEXT_2,
    SMALL_UNET_2,
    diffusers_controlnet,
    diffusers_scheduler,
    random_controlnet,
    random_model_of,
    transformers_text,
)
from sd.prompts.words import words_of
from sd.schedule import NoiseSchedule
from sd.study.description import describe
from sd.study.maps import attention_maps
from sd.study.traces import trace
from sd.time_embedding import guidance_embedding
from sd.weights import names
from sd.weights.configs import config_of, infer_unet, unet_from_hub
from sd.weights.contents import format_info, info
from sd.weights.defaults import Defaults, as_turbo, is_turbo
from sd.weights.predictions import STATISTIC
from sd.weights.source import called
from tests.layouts import (
    TEXT,
    UNET,
    VAE,
    compvis_tensors,
    diffusers_images,
    diffusers_unet,
    make_model,
    sd2_tensors,
    write_hub,
    write_tokenizer,
)

PROMPT = "a red star above a blue ring"
V = NoiseSchedule(prediction_type="v_prediction")
EPS = NoiseSchedule()
# Twelve output blocks, as many as the full size has, and heads of 64 channels: what a single file can tell
FILE_UNET = replace(UNET, model_channels=64, channel_mult=(1, 1, 1, 2), num_res_blocks=2, attention_resolutions=(1,),
                    num_head_channels=64, use_linear_in_transformer=True)  # fmt: skip
BIAS = names.PREFIXES["unet"] + STATISTIC


def sd2(prediction="epsilon", dtype=torch.float32, unet=SMALL_UNET_2):
    model = make_model(unet=unet, text=SMALL_TEXT_2, dtype=dtype)
    schedule = V if prediction == "v_prediction" else EPS
    model.defaults = Defaults(prediction_type=prediction, schedule=schedule)
    return model


@pytest.fixture(scope="module")
def lcm():
    return random_model_of("small-lcm", torch.float32)


def pixels(images):
    return [np.asarray(image) for image in images]


def same_pixels(a, b):
    return all(np.array_equal(x, y) for x, y in zip(pixels(a), pixels(b), strict=True))


# ---- whole pictures


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_sd2_draws_the_pixels_of_diffusers(prediction, scheduler):
    model = sd2(prediction)
    call = {"num_inference_steps": 3, "guidance_scale": 6.0, "negative_prompt": "blue"}
    theirs = diffusers_scheduler(model.defaults.make_scheduler(scheduler, 3))
    expected = diffusers_images(model, theirs, PROMPT, height=64, width=48, **call)
    drawn = sd.SimpleSampler(model)(PROMPT, seed=3, scheduler=scheduler, height=64, width=48, **call)
    assert same_pixels(drawn, expected)
    other = sd2("epsilon" if prediction == "v_prediction" else "v_prediction")
    assert not same_pixels(drawn, sd.SimpleSampler(other)(PROMPT, seed=3, scheduler=scheduler, height=64, width=48,
                                                          **call))  # fmt: skip


def test_turbo_draws_in_one_step():
    model = sd2()
    model.defaults = as_turbo(model.defaults)
    theirs = diffusers_scheduler(model.defaults.make_scheduler())
    expected = diffusers_images(model, theirs, PROMPT, num_inference_steps=1, guidance_scale=0.0)
    steps = list(sd.SimpleSampler(model).stream(PROMPT, seed=3))
    assert [step.timestep for step in steps] == [999.0]
    assert same_pixels(sd.SimpleSampler(model)(PROMPT, seed=3), expected)


@pytest.mark.parametrize("kind", ["LatentConsistencyModelPipeline", "StableDiffusionPipeline"])
def test_lcm_draws_the_pixels_of_diffusers(lcm, kind):
    call = {"num_inference_steps": 4, "guidance_scale": 8.5}
    theirs = diffusers_scheduler(lcm.defaults.make_scheduler())
    expected = diffusers_images(lcm, theirs, PROMPT, kind, **call)
    sampler = sd.SimpleSampler(lcm)
    drawn = sampler(PROMPT, seed=3, **call)
    assert same_pixels(drawn, expected)
    two = call | {"num_images_per_prompt": 2, "output_type": "latent"}
    expected = diffusers_images(lcm, theirs, PROMPT, kind, seeds=(3, 4), **two)
    assert torch.equal(sampler(PROMPT, seed=3, **two), expected)
    assert not same_pixels(drawn, sampler(PROMPT, seed=3, **call | {"guidance_scale": 2.0}))
    assert same_pixels(drawn, sampler(PROMPT, seed=3, negative_prompt="blue", **call))  # there is no second half


def test_lcm_takes_four_steps():
    assert sd.make_scheduler("lcm", 4).timesteps == (999, 759, 499, 259)
    assert sd.make_scheduler("lcm", 4).original_inference_steps == 50


def test_a_lora_with_lcms_solver(tiny, tmp_path):
    """As LCM-LoRA comes: kohya's names, all layers of the UNet, drawn with LCM's solver and little guidance."""
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in diffusers_unet(tiny).state_dict().items():
        if weight.ndim > 1 and name.endswith(("to_q.weight", "to_out.0.weight", "conv1.weight", "proj_in.weight")):
            stem = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            ones = (1, 1) if weight.ndim == 4 else ()
            down = torch.randn(4, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            tensors[stem + ".lora_down.weight"] = down
            tensors[stem + ".lora_up.weight"] = torch.randn(weight.shape[0], 4, *ones, generator=generator) / 2
            tensors[stem + ".alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "lcm.safetensors")
    model = sd.lora(tiny, tmp_path / "lcm.safetensors")
    call = {"num_inference_steps": 4, "guidance_scale": 1.5}
    from diffusers import LCMScheduler, StableDiffusionPipeline

    pipe = sd.to_diffusers(tiny)
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.register_modules(scheduler=LCMScheduler.from_config(pipe.scheduler.config))
    pipe.unet = diffusers_unet(tiny, assign=False)  # its own memory: what is fused would change ours
    pipe.load_lora_weights(dict(tensors))
    pipe.fuse_lora()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(3), height=64, width=64, **call).images
    drawn = sd.SimpleSampler(model)(PROMPT, seed=3, scheduler="lcm", **call)
    assert max(abs(a.astype(int) - b).max() for a, b in zip(pixels(drawn), pixels(expected), strict=True)) <= 1
    assert not same_pixels(drawn, sd.SimpleSampler(tiny)(PROMPT, seed=3, scheduler="lcm", **call))


def test_a_controlnet_of_sd2():
    model = sd2("v_prediction")
    net = random_controlnet(model, hint_widths=(16, 32, 48, 64))
    picture = Image.fromarray(torch.arange(64 * 64 * 3).reshape(64, 64, 3).remainder(251).byte().numpy())
    call = {"num_inference_steps": 2, "guidance_scale": 4.0}
    theirs = diffusers_scheduler(model.defaults.make_scheduler("ddim", 2))
    kind, parts = "StableDiffusionControlNetPipeline", {"controlnet": diffusers_controlnet(net)}
    expected = diffusers_images(model, theirs, PROMPT, kind, parts=parts, image=picture, **call)
    sampler = sd.SimpleSampler(model)
    drawn = sampler(PROMPT, seed=3, scheduler="ddim", controlnet=net, control_image=picture, **call)
    assert same_pixels(drawn, expected)


def test_a_lora_of_sd2(tmp_path):
    """Its projections are linear; some trainers write them as convolutions of 1 x 1 all the same."""
    model, stem = sd2(), "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    for shape in ((), (1, 1)):
        parts = {"lora_down": down.reshape(4, 64, *shape), "lora_up": up.reshape(64, 4, *shape)}
        save_file({f"{stem}.{part}.weight": t for part, t in parts.items()}, tmp_path / "a.safetensors")
        adapted = sd.lora(model, tmp_path / "a.safetensors")
        got, plain = (m.unet.state_dict()["middle_block.1.proj_in.weight"] for m in (adapted, model))
        torch.testing.assert_close(got, plain + up @ down)


# ---- the ways to run


@pytest.mark.parametrize("kind", ["small-sd2", "small-lcm"])
def test_other_ways_draw_the_same(kind):
    model = random_model_of(kind, torch.float64)
    call = {"num_inference_steps": 3, "seed": 3, "output_type": "latent", "guidance_scale": 4.0, "height": 48}
    expected = sd.SimpleSampler(model)(PROMPT, **call)
    for name, sampler in {
        "fast": sd.SimpleSampler(sd.fast(model)),
        "lean": sd.LeanSampler(model, "600MB"),
        "parallel": sd.ParallelSampler(model),
    }.items():
        got = sampler(PROMPT, **call)
        assert (got - expected).abs().max() / expected.abs().max() < 1e-10, name


def test_logits_beyond_float16(tmp_path):
    """As in SD 2.1: a product of q and k that float16 cannot hold, in each way to run."""
    unet = replace(SMALL_UNET_2, num_head_channels=32)
    model = sd2(unet=unet)
    with torch.no_grad():
        for name, weight in model.unet.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                weight.mul_(150.0)
    model.to(dtype=torch.float16).to(dtype=torch.float32)  # values that float16 has
    sd.save(model, tmp_path / "m.safetensors")
    half = sd.load(tmp_path / "m.safetensors", dtype=torch.float16)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half(), torch.tensor([981.0])
    seen = []

    def attend(q, k, v):
        seen.append((q.float() @ k.float().mT).abs().max().item())
        return sd.attention.attention(q, k, v)

    context = half.encode_prompt([PROMPT])
    with torch.no_grad(), sd.attention.use_attention(half.unet, attend):
        half.unet(x, t, context)
    assert max(seen) > 2 * torch.finfo(torch.float16).max
    with torch.no_grad():
        expected = model.unet(x.float(), t, context.float())
        for unet in (half.unet, sd.fast(half).unet):
            got = unet(x, t, context)
            assert got.isfinite().all()
            assert (got.float() - expected).abs().max() / expected.abs().max() < 0.05
    call = {"latents": x, "guidance_scale": 1.0, "scheduler": "ddim"}
    first = next(sd.SimpleSampler(model).stream(PROMPT, **call)).noise
    lean = next(sd.LeanSampler(half, "600MB").stream(PROMPT, **call)).noise
    assert (lean.float() - first).abs().max() / first.abs().max() < 0.05


# ---- LCM's guidance


def test_a_guidance_that_is_not_said(lcm):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"^This UNet is told its guidance scale \(LCM\).*give guidance=.*\.$"):
        lcm.unet(x, torch.tensor([5.0]), lcm.encode_prompt([""]))


@pytest.mark.parametrize("scale", [1.0, 7.5, 8.5])
def test_guidance_embedding(scale):
    from diffusers import LatentConsistencyModelPipeline

    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    assert torch.equal(guidance_embedding(scale, 256), embed(None, torch.tensor([scale - 1]), 256))


def test_maps_and_edits_of_lcm(lcm):
    """Instruments hear one half."""
    with attention_maps(lcm) as maps:
        sd.SimpleSampler(lcm)(PROMPT, num_inference_steps=2, output_type="latent")
    assert maps.word("star").shape == (64, 64)


# ---- texts


def test_texts_are_filled_up_with_another_token():
    """As transformers' tokenizer does it with "!" for its pad token, in every style."""
    model, plain = sd2(), make_model()
    end = plain.text.ids("")[-1]
    ids, old = model.text.chunks("a star")[0].ids, plain.text.chunks("a star")[0].ids
    assert ids[: ids.index(end) + 1] == old[: old.index(end) + 1]
    assert set(ids[ids.index(end) + 1 :]) == {0}
    for style in ("a1111", "comfy", "compel"):
        assert model.text.chunks("a star", style)[0].ids == ids
    words = [word for word, _ in words_of(model.text, "a red star")]
    assert words == ["a", "red", "star"]
    assert torch.equal(model.encode_prompt(["a star"]), transformers_text(model.text)(torch.tensor([ids]))[0])


# ---- files


def write_file(folder, model, name="sd2.safetensors", bias=0.03, metadata=None, **more):
    tensors = sd2_tensors(model)
    if bias is not None:
        half = len(tensors[BIAS]) // 2
        tensors[BIAS] = torch.tensor([bias, -bias]).repeat(half)  # whose standard deviation this is
    save_file({n: t.contiguous() for n, t in (tensors | more).items()}, folder / name, metadata)
    return folder / name


@pytest.fixture(scope="module")
def of_file():
    return sd2(unet=FILE_UNET)


def test_a_single_file_and_a_folder_have_the_same_tensors(of_file, tmp_path):
    file, folder = (
        write_file(tmp_path, of_file, bias=0.2),
        write_hub(tmp_path / "hub", sd2("v_prediction", unet=FILE_UNET)),
    )
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with pytest.warns(UserWarning, match="a statistic of its weights"):
        one = sd.load(file, tokenizer=tokenizer)
    two = sd.load(folder)
    for part in ("unet", "vae", "text"):
        ours, theirs = (getattr(model, part).state_dict() for model in (one, two))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours if n != STATISTIC), part
    assert one.unet.config == two.unet.config == FILE_UNET
    assert one.text.config == two.text.config == SMALL_TEXT_2
    assert one.defaults.make_scheduler() == two.defaults.make_scheduler()
    assert one.defaults.prediction_type == "v_prediction"
    assert one.size == 768  # what was made of 512 pixels predicts the noise
    sd.convert(file, tmp_path / "ours.safetensors", tokenizer=tokenizer)
    three = sd.load(tmp_path / "ours.safetensors")
    assert (three.unet.config, three.text.config, three.size, three.defaults) == (
        one.unet.config, one.text.config, 768, one.defaults)  # fmt: skip
    assert all(torch.equal(t, one.unet.state_dict()[n]) for n, t in three.unet.state_dict().items())
    assert all(torch.equal(t, one.text.state_dict()[n]) for n, t in three.text.state_dict().items())


V_YAML = 'model:\n  params:\n    parameterization: "v"\n'
SAYS = {  # bias, metadata, yaml, more tensors -> what it predicts, and what decided
    "a statistic, v": (0.12, {}, "", (), "v_prediction", "statistic"),
    "a statistic, epsilon": (0.05, {}, "", (), "epsilon", "statistic"),
    "metadata, against the statistic": (
        0.12,
        {"modelspec.prediction_type": "epsilon"},
        V_YAML,
        (),
        "epsilon",
        "header",
    ),
    "a yaml, against the statistic": (0.05, {}, V_YAML, (), "v_prediction", "sd2.yaml"),
    "a key": (0.05, {}, "", ("v_pred",), "v_prediction", "v_pred"),
    "another key": (0.05, {}, "", ("ztsnr",), "v_prediction", "ztsnr"),
    "nothing, near the limit": (0.091, {}, "", (), None, ""),
    "nothing, and no statistic": (0.0, {}, "", (), None, ""),
}


@pytest.mark.parametrize("case", SAYS)
@pytest.mark.filterwarnings("ignore:.*a statistic")
def test_what_a_file_predicts(of_file, tmp_path, case):
    bias, metadata, yaml, keys, expected, by = SAYS[case]
    file = write_file(tmp_path, of_file, bias=bias, metadata=metadata, **{key: torch.zeros(1) for key in keys})
    if yaml:
        (tmp_path / "sd2.yaml").write_text(yaml)
    facts, tokenizer = info(file), write_tokenizer(tmp_path / "tokenizer")
    assert facts["kind"] == "Stable Diffusion 2"
    if expected is None:
        with pytest.raises(sd.LoadError, match=r'does not say whether.*"prediction_type": "epsilon"') as caught:
            sd.load(file)
        assert facts["problem"] == str(caught.value)
    else:
        assert (facts["prediction_type"], facts["problem"]) == (expected, None)
        assert by in facts["prediction_by"]
        assert by in format_info(facts)
        model = sd.load(file, tokenizer=tokenizer)
        assert model.defaults.prediction_type == model.defaults.schedule.prediction_type == expected
        assert model.size == (768 if expected == "v_prediction" else 512)
    for said in ("epsilon", "v_prediction"):  # an option stands before all
        (tmp_path / "c.json").write_text(json.dumps({"defaults": {"prediction_type": said}}))
        for config in (tmp_path / "c.json", {"defaults": {"prediction_type": said}}):
            model = sd.load(file, tokenizer=tokenizer, config=config)
            assert model.defaults.prediction_type == model.defaults.schedule.prediction_type == said
            assert model.size == (768 if said == "v_prediction" else 512)


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"steps": 3}, "no default called 'steps'"),
        ({"num_inference_steps": "3"}, "num_inference_steps cannot be '3'"),
        ({"schedule": 3}, "defaults"),
    ],
)
def test_defaults_that_cannot_be(defaults, message):
    with pytest.raises(sd.LoadError, match=message) as caught:
        sd.load("shapes", config={"defaults": defaults})
    assert str(caught.value).startswith("config: ")


def test_turbo_is_told_by_its_name(of_file, tmp_path):
    file = write_file(tmp_path, of_file, "sd_turbo.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    folder = write_hub(tmp_path / "sd-turbo", of_file)
    for source in (file, folder):
        model = sd.load(source, tokenizer=write_tokenizer(tmp_path / "tokenizer"))
        usual = model.defaults
        assert (usual.scheduler, usual.num_inference_steps, usual.guidance_scale) == ("euler", 1, 0.0)
        assert usual.make_scheduler().timesteps == (999.0,)
    assert sd.load(write_hub(tmp_path / "turbot", of_file)).defaults.num_inference_steps == 50


def test_the_last_layer_is_left_out_where_it_is_there(tmp_path):
    """Of 24; some converters have written 23."""
    text = {f"a.{i}": torch.zeros(1) for i in range(24)}
    for count, kept in ((24, 23), (23, 23), (3, 2)):
        tensors = {f"transformer.resblocks.{i}.ln_1.weight": text[f"a.{i}"] for i in range(count)}
        assert len(names.from_open_clip(tensors)) == kept


def test_lcm_as_a_folder_and_a_file(lcm, tmp_path):
    folder = write_hub(tmp_path / "hub", lcm)
    sd.save(lcm, tmp_path / "m.safetensors")
    save_file({n: t.contiguous() for n, t in compvis_tensors(lcm).items()}, tmp_path / "c.safetensors")
    for source in (folder, tmp_path / "m.safetensors", tmp_path / "c.safetensors"):
        model = sd.load(source, tokenizer=write_tokenizer(tmp_path / "tokenizer"), config={"unet": {"num_heads": 8}})
        assert model.unet.config == lcm.unet.config
        assert all(torch.equal(t, lcm.unet.state_dict()[n]) for n, t in model.unet.state_dict().items())
        assert "told its guidance" in format_info(info(source))


@pytest.mark.parametrize("kind", ["small-sd2", "small-lcm"])
def test_the_bridge_goes_both_ways(kind):
    model = random_model_of(kind, torch.float32)
    pipe = sd.to_diffusers(model)
    back = sd.from_diffusers(pipe)
    assert (back.unet.config, back.text.config, back.vae.config) == (
        model.unet.config, model.text.config, VAE)  # fmt: skip
    assert back.defaults.prediction_type == model.defaults.prediction_type
    pointers = {t.data_ptr() for t in model.unet.state_dict().values()}
    assert {t.data_ptr() for t in back.unet.state_dict().values()} == pointers
    call = {"num_inference_steps": 2, "output_type": "latent", "scheduler": "ddim", "guidance_scale": 3.0}
    assert torch.equal(sd.SimpleSampler(back)(PROMPT, **call), sd.SimpleSampler(model)(PROMPT, **call))


def test_what_they_are_not():
    """Sizes that cannot be, in one sentence each."""
    for unet, message in (
        ({"num_head_channels": 7}, "split by num_head_channels = 7"),
        ({"num_head_channels": 0}, "num_head_channels = 0"),
        ({"guidance_dim": 3}, "guidance_dim must be even"),
        ({"use_linear_in_transformer": 1}, "use_linear_in_transformer = 1"),
    ):
        with pytest.raises(sd.LoadError, match=message):
            sd.load("shapes", config={"unet": unet})
    assert TEXT.padding is None


def test_the_full_sizes():
    """Of SD 2.1 and of LCM_Dreamshaper_v7, by the configs of their repositories, where these are not v1's."""
    from diffusers import UNet2DConditionModel

    common = {"block_out_channels": (320, 640, 1280, 1280), "sample_size": 96}
    two = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True,
           "upcast_attention": True, "dual_cross_attention": False, "only_cross_attention": False}  # fmt: skip
    one = {"attention_head_dim": 8, "cross_attention_dim": 768, "time_cond_proj_dim": 256}
    for options, count in ((two, 865_910_724), (one, 859_520_964 + 256 * 320)):
        with torch.device("meta"):
            theirs = UNet2DConditionModel(**common, **options)
            config = unet_from_hub(json.loads(theirs.to_json_string()))
            ours = sd.UNet(config_of(sd.UNetConfig, config))
        assert sum(p.numel() for p in ours.parameters()) == count
        shapes, expected = ({n: t.shape for n, t in unet.state_dict().items()} for unet in (ours, theirs))
        assert {hub: shapes[n] for n, hub in names.unet_to_hub(shapes, ours.config).items()} == expected
        assert infer_unet(ours.state_dict()).items() <= {**vars(ours.config)}.items()
        assert ours.config.heads(1280) == (20 if options is two else 8)


@pytest.mark.parametrize("kind", ["small-sd2", "small-lcm"])
def test_a_relative_is_described_and_traced(kind):
    model = random_model_of(kind, torch.float32)
    assert describe(model).whole("UNet").parameters == sum(p.numel() for p in model.unet.parameters())
    sampler, call = sd.SimpleSampler(model), {"num_inference_steps": 2, "guidance_scale": 3.0}
    assert torch.equal(trace(sampler, PROMPT, **call).latents, sampler(PROMPT, output_type="latent", **call))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_folder_that_says_nothing_is_judged_by_its_weights(tmp_path):
    """As a single file is; v1 predicts the noise where nothing is said."""
    for spread in (0.03, 0.2, 0.09):
        model = sd2(unet=FILE_UNET)
        bias = model.unet.get_parameter(STATISTIC)
        bias.data = torch.tensor([spread, -spread]).repeat(len(bias) // 2)
        folder = write_hub(tmp_path / str(spread), model)
        (folder / "scheduler/scheduler_config.json").unlink()
        if spread == 0.09:
            with pytest.raises(sd.LoadError, match="prediction_type"):
                sd.load(folder)
        else:
            with pytest.warns(UserWarning, match="a statistic of its weights"):
                kind = sd.load(folder).defaults.prediction_type
            assert kind == ("v_prediction" if spread > 0.09 else "epsilon")
    model = sd.load(folder, config={"defaults": {"prediction_type": "v_prediction"}})
    assert model.defaults.prediction_type == "v_prediction"
    model = sd.load(folder, config={"defaults": {"schedule": {"prediction_type": "v_prediction"}}})
    assert model.defaults.prediction_type == "v_prediction"


def test_a_folder_without_a_tokenizer_fills_texts_up_all_the_same(of_file, tmp_path):
    folder = write_hub(tmp_path / "sd2", of_file)
    words = (folder / "tokenizer").rename(tmp_path / "words")
    (words / "tokenizer_config.json").unlink(missing_ok=True)
    (words / "special_tokens_map.json").unlink(missing_ok=True)
    assert sd.load(folder, tokenizer=words).text.model.config.padding == 0


def test_a_padding_beyond_the_vocabulary(of_file, tmp_path):
    with pytest.raises(sd.LoadError, match="padding is token 120000"):
        sd.load(write_file(tmp_path, of_file), config={"text": {"padding": 120_000}})


def test_a_joined_tensor_without_a_shape(of_file, tmp_path):
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias"
    with pytest.raises(sd.LoadError):
        sd.load(write_file(tmp_path, of_file, **{name: torch.tensor(1.0)}))


NAMES = {"sd-turbo": True, "sdturbo": True, "SD_Turbo_fp16.safetensors": True, "turbo2x-v2-1": False, "turbot": False}


@pytest.mark.parametrize(("name", "turbo"), NAMES.items())
def test_what_is_called_turbo(name, turbo):
    assert is_turbo(name) == turbo
    assert is_turbo(called(f"/x/models--stabilityai--{name}/snapshots/0123")) == turbo

"""Models draw with what their files say: solver, spacing, and what it is that they predict; as diffusers does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sd
from sd.model import Defaults
from sd.schedule import PREDICTIONS
from sd.scheduler import SCHEDULERS, find_name
from tests.layouts import (
    compvis_tensors,
    diffusers_images,
    write_ckpt,
    write_hub,
    write_tokenizer,
)
from tests.test_sampler import pixels
from tests.test_solvers import config, theirs_of

PROMPT = "a red star above a blue ring"
V = {"prediction_type": "v_prediction"}


def theirs(model, settings, steps, guidance_scale=4.0, **options):
    how = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    return diffusers_images(model, theirs_of(settings), **how, **options)


# DPM++ SDE's noise is that of a Brownian tree in diffusers: its steps are compared in test_solvers.py.
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS.keys() - {"dpmpp_sde"}))
def test_a_picture_by_each_solver_is_that_of_diffusers(tiny, scheduler):
    expected = theirs(tiny, config(scheduler), 8)
    call = {"seed": 3, "num_inference_steps": 8, "guidance_scale": 4.0}
    got = sd.SimpleSampler(tiny)(PROMPT, scheduler=scheduler, **call)
    # LMS integrates its polynomials by an adaptive rule in diffusers, exactly here; and the fractional timesteps of
    # DPM2's midpoints come from NumPy's logarithms there, a last bit of float32 away.
    assert np.abs(pixels(got) - pixels(expected)).max() <= (scheduler in ("lms", "dpm2", "dpm2_a"))


TRAILING = {"timestep_spacing": "trailing"}
FOLDERS = {  # what scheduler_config.json says -> what it becomes
    "v by PNDM": (config("pndm", **V), "pndm"),
    "v by DDIM": (config("ddim", **V), "ddim"),
    "v, to noise alone": (config("ddim", **V, **TRAILING, rescale_betas_zero_snr=True), "ddim"),
    "v by Euler": (config("euler", **V, **TRAILING), "euler"),
    "v by Euler, to noise alone": (config("euler", **V, **TRAILING, rescale_betas_zero_snr=True), "euler"),
    "v by DPM++ 2M Karras": (config("dpmpp_2m", **V, use_karras_sigmas=True), "dpmpp_2m_karras"),
    "v by UniPC": (config("unipc", **V), "unipc"),
    "x0 by DDIM": (config("ddim", prediction_type="sample"), "ddim"),
    "epsilon by Euler a, leading": (config("euler_a", timestep_spacing="leading"), "euler_a"),
    "epsilon by Heun, exponential": (config("heun", use_exponential_sigmas=True), "heun_exponential"),
    "even betas": (config("ddim", beta_schedule="linear"), "ddim"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_draws_as_its_scheduler_config_says(name, tiny, tmp_path):
    settings, solver = FOLDERS[name]
    folder = write_hub(tmp_path / "hub", tiny)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(settings))
    model = sd.load(folder)
    assert model.defaults.scheduler == solver
    assert model.defaults.prediction_type == settings.get("prediction_type", "epsilon")
    expected = theirs(tiny, settings, 7)
    got = sd.SimpleSampler(model)(PROMPT, seed=3, num_inference_steps=7, guidance_scale=4.0)
    # diffusers computes exponential sigmas in float32, which shows once in ten thousand pixels.
    assert np.abs(pixels(got) - pixels(expected)).max() <= ("exponential" in name)
    sd.convert(folder, tmp_path / "a.safetensors")
    again = sd.load(tmp_path / "a.safetensors")
    assert again.defaults == model.defaults
    assert np.array_equal(
        pixels(sd.SimpleSampler(again)(PROMPT, seed=3, num_inference_steps=7, guidance_scale=4.0)), pixels(got)
    )


def test_a_spacing_of_the_files_holds_for_other_solvers(tiny, tmp_path):
    folder = write_hub(tmp_path / "hub", tiny)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config("euler", **TRAILING)))
    model = sd.load(folder)
    request = sd.SimpleSampler(model).request(PROMPT, scheduler="dpmpp_2m", num_inference_steps=4)
    assert request.timesteps == sd.make_scheduler("dpmpp_2m", 4, **TRAILING).timesteps
    assert request.timesteps != sd.make_scheduler("dpmpp_2m", 4).timesteps


def test_a_scheduler_that_is_not_here_is_said(tiny, tmp_path):
    folder = write_hub(tmp_path / "hub", tiny)
    file = folder / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "DEISMultistepScheduler"}))
    with pytest.warns(UserWarning, match=r"'DEISMultistepScheduler'.*drawn with pndm"):
        assert sd.load(folder).defaults.scheduler == "pndm"
    to_noise = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    file.write_text(json.dumps({"_class_name": "DEISMultistepScheduler", **to_noise}))
    with pytest.warns(UserWarning, match="drawn with ddim"):
        assert sd.load(folder).defaults.make_scheduler(None, 4).timesteps[0] == 999


MARKS = {  # what marks a single file -> whether its last timestep is noise alone
    "a tensor": ({"v_pred": torch.zeros(0)}, {}, False),
    "two tensors": ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, True),
    "modelspec": ({}, {"modelspec.prediction_type": "v"}, False),
    "kohya's trainer": ({}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, True),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_single_file_that_predicts_v(name, tiny, tmp_path):
    tensors, metadata, to_noise = MARKS[name]
    weights = {n: t.contiguous() for n, t in compvis_tensors(tiny).items()}
    save_file(weights | tensors, tmp_path / "a.safetensors", metadata)
    model = sd.load(tmp_path / "a.safetensors", tokenizer=write_tokenizer(tmp_path))
    noise = sd.NoiseSchedule(prediction_type="v_prediction", rescale_betas_zero_snr=to_noise)
    assert model.defaults.schedule == noise
    settings = config("ddim" if to_noise else "pndm", **V, **(TRAILING if to_noise else {}))
    settings |= {"rescale_betas_zero_snr": True} if to_noise else {}
    call = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 4.0, "height": 64, "width": 64}
    got = sd.SimpleSampler(model)(PROMPT, **call)
    assert np.array_equal(pixels(got), pixels(theirs(tiny, settings, 6)))
    sd.save(model, tmp_path / "b.safetensors")
    assert sd.load(tmp_path / "b.safetensors").defaults == model.defaults


def test_a_yaml_beside_a_checkpoint_says_v(tiny, tmp_path):
    path = write_ckpt(tmp_path / "a.ckpt", compvis_tensors(tiny))
    (tmp_path / "a.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert sd.load(path).defaults.prediction_type == "v_prediction"


WORKS = [(name, prediction) for name, kind in SCHEDULERS.items() for prediction in kind.predictions]
REFUSED = [(name, prediction) for name in SCHEDULERS for prediction in PREDICTIONS if (name, prediction) not in WORKS]


@pytest.mark.parametrize(("name", "prediction"), REFUSED)
def test_what_diffusers_refuses_is_refused(name, prediction):
    """diffusers raises where it is asked to step; ours where the solver is made."""
    with pytest.raises(ValueError, match=f"cannot work with a model that predicts '{prediction}'"):
        sd.make_scheduler(name, 3, schedule=sd.NoiseSchedule(prediction_type=prediction))
    theirs = theirs_of(config(name, prediction_type=prediction))
    theirs.set_timesteps(3)
    with pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
        theirs.step(torch.zeros(1, 4, 2, 2), theirs.timesteps[0], torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize(("name", "prediction"), WORKS)
def test_what_a_step_says_of_the_noise_is_the_noise(name, prediction):
    """With the noise and the clean latents that a prediction stands for, x is what it was."""
    solver = sd.make_scheduler(name, 7, schedule=sd.NoiseSchedule(prediction_type=prediction))
    x, guess = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i in range(len(solver.timesteps)):
        again = solver.add_noise(solver.denoised(i, guess, x), solver.noise(i, guess, x), i)
        torch.testing.assert_close(again, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"timestep_spacing": "sideways"}}, "timestep_spacing must be"),
        ({"options": {"nothing": 1}}, "cannot have the options"),
        ({"scheduler": "euler_a", "prediction_type": "sample"}, "cannot work with a model that predicts"),
        ({"prediction_type": "flow"}, "prediction_type cannot be 'flow'"),
    ],
)
def test_defaults_that_cannot_be(changes, message):
    noise = sd.NoiseSchedule(prediction_type="sample") if changes.get("prediction_type") == "sample" else None
    with pytest.raises(ValueError, match=message):
        Defaults(**changes | ({"schedule": noise} if noise else {}))


def test_a_name_with_a_spacing_can_be_a_default(tiny):
    model = sd.StableDiffusion(tiny.unet, tiny.vae, tiny.text, defaults=Defaults("dpmpp_2m_karras", 9))
    request = sd.SimpleSampler(model).request(PROMPT)
    assert request.scheduler == sd.make_scheduler("DPM++ 2M Karras", 9)
    assert find_name(model.defaults.scheduler) == ("dpmpp_2m", "karras")


@pytest.mark.parametrize("variant", ["simple", "lean"])
@pytest.mark.parametrize("scheduler", ["pndm", "euler_a"])
def test_guidance_rescale_is_that_of_diffusers(tiny, scheduler, variant):
    expected = theirs(tiny, config(scheduler), 6, guidance_scale=9.0, guidance_rescale=0.7)
    sampler = sd.SimpleSampler(tiny) if variant == "simple" else sd.LeanSampler(tiny)
    call = {"seed": 3, "num_inference_steps": 6, "scheduler": scheduler, "guidance_scale": 9.0}
    got = sampler(PROMPT, **call, guidance_rescale=0.7)
    assert np.abs(pixels(got) - pixels(expected)).max() <= (variant == "lean")
    assert np.abs(pixels(got) - pixels(sampler(PROMPT, **call))).max() > 10


def test_guidance_is_rescaled_for_each_image_alone(tiny):
    call = {"num_inference_steps": 4, "guidance_scale": 9.0, "guidance_rescale": 0.7, "output_type": "latent"}
    both = sd.SimpleSampler(tiny)([PROMPT, "a blue cross"], seed=3, **call)
    alone = sd.SimpleSampler(tiny)("a blue cross", seed=4, **call)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescale", [-0.1, 1.1, "x", float("nan"), True])
def test_a_rescale_that_cannot_be(tiny, rescale):
    with pytest.raises(ValueError, match="guidance_rescale must be a number from 0 to 1"):
        sd.SimpleSampler(tiny)(PROMPT, guidance_rescale=rescale)

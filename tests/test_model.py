"""`StableDiffusion` beside its parts: what its files say of how to draw."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

import sd
from sd.model import Defaults
from tests.layouts import compvis_tensors, write_hub


@pytest.fixture(scope="module")
def hub(tiny, tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("model") / "hub", tiny)


def scheduler_config(folder, **changes):
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_defaults_are_those_of_v1(tiny):
    assert tiny.defaults == Defaults("pndm", 50, 7.5, None, None, "epsilon", sd.NoiseSchedule())


def test_the_built_in_model_draws_best_with_what_it_names():
    defaults = sd.load("shapes").defaults
    assert (defaults.scheduler, defaults.num_inference_steps, defaults.guidance_scale) == ("ddim", 30, 7.5)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("PNDMScheduler", "pndm"),
        ("DDIMScheduler", "ddim"),
        ("LMSDiscreteScheduler", "lms"),
        (None, "pndm"),
    ],
)
def test_the_hubs_scheduler_config_names_solver_and_schedule(hub, name, scheduler):
    scheduler_config(hub, _class_name=name, beta_end=0.02, num_train_timesteps=900, set_alpha_to_one=True)
    defaults = sd.load(hub).defaults
    assert defaults.scheduler == scheduler
    assert defaults.schedule == sd.NoiseSchedule(0.00085, 0.02, 900, 1, True)


def test_a_converted_file_keeps_them(tiny, hub, tmp_path):
    scheduler_config(hub, _class_name="DDIMScheduler")
    sd.convert(hub, tmp_path / "a.safetensors")
    assert sd.load(tmp_path / "a.safetensors").defaults == sd.load(hub).defaults
    model = sd.StableDiffusion(tiny.unet, tiny.vae, tiny.text, defaults=Defaults("lms", 20, 3, 64, 128))
    sd.save(model, tmp_path / "b.safetensors")
    assert sd.load(tmp_path / "b.safetensors").defaults == model.defaults


@pytest.mark.parametrize(
    "defaults",
    [
        {"scheduler": "nothing"},
        {"scheduler": ["ddim"]},
        {"num_inference_steps": 0},
        {"num_inference_steps": True},
        {"guidance_scale": "x"},
        {"guidance_scale": 1e9},
        {"height": -8},
        {"prediction_type": "v_prediction"},
        {"schedule": {"beta_end": 2.0}},
        {"schedule": {"num_train_timesteps": 10**9}},
        {"schedule": {"set_alpha_to_one": 1}},
        {"schedule": {"prediction_type": "v_prediction"}},
        {"schedule": {"beta_schedule": "cosine"}},
        {"schedule": {"rescale_betas_zero_snr": 1}},
        {"schedule": []},
        {"more": 1},
    ],
)
def test_defaults_that_cannot_be_are_refused_in_one_sentence(tiny, tmp_path, defaults):
    path = tmp_path / "a.safetensors"
    sd.save(tiny, path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        ours = json.loads(file.metadata()["sd"])
    save_file(compvis_tensors(tiny), path, metadata={"sd": json.dumps(ours | {"defaults": defaults})})
    with pytest.raises(sd.LoadError, match="defaults that cannot be used") as caught:
        sd.load(path)
    assert "\n" not in str(caught.value)

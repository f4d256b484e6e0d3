"""The solvers of sd/solvers.py, and the older ones with other spacings and predictions, beside diffusers' classes."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch

from sd.scheduler import SCHEDULERS, find_name, make_scheduler, scheduler_name
from sd.weights.scheduler_config import scheduler_from_config
from tests import ALL

diffusers = pytest.importorskip("diffusers")

CLASSES = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_sde": "DPMSolverSDEScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "ddpm": "DDPMScheduler",
}
OWN = {
    "pndm": {"skip_prk_steps": True},
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
    "ddpm": {"clip_sample": False},
}
V1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}
SINGLE = ("euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde")  # which diffusers computes in float32 in any case
SIGMAS = [name for name, kind in SCHEDULERS.items() if "sigma_spacing" in kind.__dataclass_fields__]
REFUSED = ["euler_a"]  # diffusers' class has no other spacings of sigmas; here it has those of Euler


def config(name, **changes):
    if name == "dpmpp_sde":
        pytest.importorskip("torchsde")
    accepted = getattr(diffusers, CLASSES[name])._get_init_keys(getattr(diffusers, CLASSES[name]))
    wanted = V1 | OWN.get(name, {}) | changes
    assert changes.keys() <= accepted, "diffusers would not look at it"
    return {"_class_name": CLASSES[name]} | {key: value for key, value in wanted.items() if key in accepted}


def theirs_of(settings):
    kind = getattr(diffusers, settings["_class_name"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**{key: value for key, value in settings.items() if not key.startswith("_")})


def noise(seed, dtype=torch.float64):
    return torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(x, t):
    """A smooth prediction that depends on all that it is given."""
    return 0.7 * torch.sin(1.3 * x + 0.001 * t) + 0.2 * x.roll(1, 1)


class Draws:
    """diffusers' randn_tensor, and a Brownian tree's place: what both sides draw, one after the other."""

    def __init__(self):
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return noise(1000 + self.count, kwargs.get("dtype") or torch.float64)


def run(settings, n, monkeypatch, dtype=torch.float64):
    """The x of each call, of diffusers and of ours, from the same noise; ours is told diffusers' timesteps."""
    theirs, ours = theirs_of(settings), scheduler_from_config(settings, n)
    draws = Draws()
    monkeypatch.setattr(f"{type(theirs).__module__}.randn_tensor", draws, raising=False)
    theirs.set_timesteps(n)
    if hasattr(theirs, "set_begin_index"):  # else it looks for the timestep, and takes the wrong one of two alike
        theirs.set_begin_index(0)
    assert len(theirs.timesteps) == len(ours.timesteps)
    t = theirs.timesteps.double()
    torch.testing.assert_close(torch.tensor(ours.timesteps, dtype=torch.float64), t, rtol=0, atol=2e-3)
    assert float(theirs.init_noise_sigma) == pytest.approx(ours.init_noise_sigma, rel=1e-6)
    x = noise(0, dtype) * float(theirs.init_noise_sigma)
    wanted, found, state, y = [], [], ours.init_state(), x
    if hasattr(theirs, "noise_sampler"):
        theirs.noise_sampler = Brownian(ours)
    for step in theirs.timesteps:
        prediction = model(theirs.scale_model_input(x, step), float(step))
        x = theirs.step(prediction, step, x, return_dict=False)[0]
        wanted.append(x)
    draws.count = 0
    for i, step in enumerate(theirs.timesteps):
        prediction = model(ours.scale_input(i, y), float(step))
        fresh = None
        if ours.draws(i):
            kind = torch.float32 if "sde-" in settings.get("algorithm_type", "") else dtype  # which diffusers draws
            fresh = draws(dtype=kind) if not hasattr(theirs, "noise_sampler") else noise(3000 + i, dtype)
        y, state = ours.step(i, prediction, y, state, variance_noise=fresh)
        found.append(y)
    return wanted, found


class Brownian:
    """In place of the Brownian tree of torchsde: the path in sigma of which our draws are the pieces.

    Its pieces are as long as our sigmas say. diffusers asks with its own, which have been to logarithms and back.
    """

    def __init__(self, ours):
        self.ours, self.call = ours, 0

    def __call__(self, sigma, after):
        i, self.call = self.call, self.call + 1
        if i % 2 == 0:
            return noise(3000 + i)
        start, middle, end = (self.ours.sigmas[i // 2], self.ours.level(i)[1], self.ours.sigmas[i // 2 + 1])
        assert (float(sigma), float(after)) == pytest.approx((start, end), rel=1e-5)
        ways = start - middle, middle - end
        return (ways[0] ** 0.5 * noise(2999 + i) + ways[1] ** 0.5 * noise(3000 + i)) / sum(ways) ** 0.5


def check(settings, n, monkeypatch, bound):
    wanted, found = run(settings, n, monkeypatch)
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        assert a.isfinite().all(), i
        apart = ((a - b).abs().max() / a.abs().max()).item()
        assert apart < bound, (i, apart)


def bound_of(name):
    return 1e-5 if name in SINGLE else 3e-6 if name == "lms" else 1e-10


COUNTS = (1, 2, 3, 7, 14, 15, 20, 50)
MANY = (99, 501, 999)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", CLASSES)
def test_predictions(name, prediction, monkeypatch):
    settings = config(name, prediction_type=prediction)
    if prediction not in SCHEDULERS[name].predictions:
        with pytest.raises(ValueError, match="cannot work with a model that predicts"):
            scheduler_from_config(settings, 5)
        return
    for n in COUNTS:
        check(settings, n, monkeypatch, bound_of(name))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [name for name in CLASSES if name != "lcm"])
def test_spacings(name, spacing, monkeypatch):
    for n in COUNTS:
        check(config(name, timestep_spacing=spacing), n, monkeypatch, bound_of(name))


@pytest.mark.parametrize(("sigmas", "spacing"), product(FLAGS, ["leading", "linspace"]))
@pytest.mark.parametrize("name", [name for name in SIGMAS if name not in REFUSED])
def test_sigmas(name, sigmas, spacing, monkeypatch):
    if sigmas == "beta":
        pytest.importorskip("scipy")
    settings = config(name, timestep_spacing=spacing, **{FLAGS[sigmas]: True})
    for n in COUNTS if ALL else (1, 2, 3, 15, 20):
        check(settings, n, monkeypatch, bound_of(name))


OPTIONS = {  # of single classes
    "euler": [{"final_sigmas_type": "sigma_min"}],
    "dpmpp_2m": [
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
    ],
    "dpmpp_2m_sde": [{"final_sigmas_type": "sigma_min"}],
    "unipc": [
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        *({"solver_order": order} for order in (1, 3)),
        *({"solver_order": order, "final_sigmas_type": "sigma_min"} for order in (1, 3)),
        *({"solver_order": n, "solver_type": "bh1", "final_sigmas_type": "sigma_min"} for n in (1, 2, 3)),
    ],
    "lcm": [{"original_inference_steps": 100}],
    "ddim": [{"set_alpha_to_one": True}],
    "pndm": [{"set_alpha_to_one": True}],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in OPTIONS for change in OPTIONS[name]])
def test_options(name, change, monkeypatch):
    for n in COUNTS:
        check(config(name, **change), n, monkeypatch, bound_of(name))


def test_bh1_ends_at_zero():
    """diffusers returns NaN there, for it multiplies an infinite B(h) by nothing."""
    for n in COUNTS:
        ours = scheduler_from_config(config("unipc", solver_type="bh1"), n)
        other = scheduler_from_config(config("unipc"), n)
        m, x = noise(1), noise(2)
        last, _state = ours.step(n - 1, m, x, ours.init_state())
        assert torch.equal(last, other.step(n - 1, m, x, ())[0])
        assert last.isfinite().all()


ZERO = ["ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm", "ddpm"]  # whose classes have it


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", ZERO)
def test_zero_terminal_snr(name, spacing, monkeypatch):
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for n in COUNTS:
        settings = config(name, **changes, **({} if name == "lcm" else {"timestep_spacing": spacing}))
        check(settings, n, monkeypatch, bound_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, *({flag: True} for flag in FLAGS.values()), {"timestep_spacing": "leading"}])
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("lcm", "lms")])  # 50 at most; slow there
def test_many_steps(name, change, monkeypatch):
    own = change.keys() <= set(FLAGS.values())
    if change and own and (name not in SIGMAS or name in REFUSED):
        return
    for n in MANY if not change or ALL else (500,):
        if n == 999 and "timestep_spacing" in change and name in ("dpmpp_2m", "dpmpp_2m_sde", "unipc"):
            # diffusers' offset leads past the last timestep of the training; ours is left out
            assert scheduler_from_config(config(name, **change), n).timesteps[0] == 999
            continue
        check(config(name, **change), n, monkeypatch, bound_of(name))


@pytest.mark.parametrize("sigmas", FLAGS)
def test_sigmas_that_diffusers_does_not_have_are_those_of_the_same_family(sigmas):
    for n in COUNTS:
        ancestral, plain = (make_scheduler(f"{name}_{sigmas}", n) for name in ("euler_a", "euler"))
        assert (ancestral.sigmas, ancestral.timesteps) == (plain.sigmas, plain.timesteps)


@pytest.mark.parametrize(
    ("name", "ours"),
    {
        "DPM++ 2M Karras": "dpmpp_2m_karras",
        "DPM++ 2M SDE Exponential": "dpmpp_2m_sde_exponential",
        "DPM++ SDE": "dpmpp_sde",
        "Euler a": "euler_a",
        "DPM2 a Karras": "dpm2_a_karras",
        "PLMS": "pndm",
        "UniPC": "unipc",
        "LMS Karras": "lms_karras",
        "EulerAncestralDiscreteScheduler": "euler_a",
        "DDPMScheduler": "ddpm",
        "heun_beta": "heun_beta",
    }.items(),
)
def test_names_of_others(name, ours):
    assert scheduler_name(make_scheduler(name, 7)) == ours
    assert make_scheduler(ours, 7) == make_scheduler(name, 7)


@pytest.mark.parametrize("solver", CLASSES.values())
def test_names_of_classes(solver):
    assert CLASSES[find_name(solver)[0]] == solver


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no scheduler is called 'FlowMatchEuler"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "algorithm_type = 'dpmsolver'",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas = True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample = True"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding = True"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_start": "0.1"}, "another type"),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "prediction_type": "sample"}, "cannot work"),
        ({"_class_name": "DDPMScheduler", "use_karras_sigmas": True}, "use_karras_sigmas = True, which ddpm"),
        ({"_class_name": "EulerDiscreteScheduler", "new_setting": 3}, "new_setting = 3"),
    ],
)
def test_a_config_that_asks_for_something_else(changes, message):
    with pytest.raises(ValueError, match=message):
        scheduler_from_config(V1 | changes, 20)


def test_default_values_of_a_config_are_those_of_the_class():
    """As from_config: what the file's own class had by default says nothing of another class."""
    config = V1 | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    assert scheduler_from_config(config, 20).timestep_spacing == "leading"
    config["_use_default_values"] = ["timestep_spacing"]
    assert scheduler_from_config(config, 20).timestep_spacing == "linspace"

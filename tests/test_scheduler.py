"""The solvers against diffusers, against exact solutions, and against misuse."""

from __future__ import annotations

import ast
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sd.schedule
import sd.scheduler
import sd.solvers
from sd.scheduler import DDIM, LMS, PNDM, SCHEDULERS, V1, NoiseSchedule, Scheduler, make_scheduler
from tests import ALL

FEW = [*range(1, 31), 50, *range(61, 500, 38), 499, 500, 501, 777, 998, 999]
FEW_LMS = [*range(1, 13), 20, 30, 50, 99, 333]  # diffusers takes 2 ms a step here
V1_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OTHER = NoiseSchedule(beta_start=0.0005, beta_end=0.02, steps_offset=0, set_alpha_to_one=True)
OTHER_BETAS = {"beta_start": 0.0005, "beta_end": 0.02, "beta_schedule": "scaled_linear"}

SOLVERS = {"pndm": PNDM, "ddim": DDIM, "ddim with eta": lambda n: DDIM(n, 0.6), "lms": LMS}
FIRST = ("pndm", "ddim", "lms")  # which Stable Diffusion v1 came with; the others are in test_solvers.py
every_solver = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS)
counts = st.integers(1, 1000)


def reference(name, **changes):
    """diffusers' scheduler with the settings of the v1-4 weights."""
    diffusers = pytest.importorskip("diffusers")
    pndm = diffusers.PNDMScheduler(
        **{**V1_BETAS, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False, **changes}
    )
    if name == "pndm":
        return pndm
    if name == "lms":
        return diffusers.LMSDiscreteScheduler.from_config(pndm.config)  # as a pipeline's user makes it
    return diffusers.DDIMScheduler.from_config(pndm.config, clip_sample=False)


def model(x, t):
    """A stand-in for the UNet: bounded, bent, and different at each timestep."""
    return torch.sin(0.9 * x + float(t) / 300)


def start(dtype=torch.float32):
    return torch.linspace(-2, 2, 8, dtype=dtype).reshape(1, 2, 2, 2)


def fresh_noise(i, like):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(i), dtype=like.dtype)


def trajectory(scheduler, model=model, x=None, first=0):
    """x before each step and after the last."""
    x = start() * scheduler.init_noise_sigma if x is None else x
    state, xs = scheduler.init_state(), [x]
    for i in range(first, len(scheduler.timesteps)):
        noise = model(scheduler.scale_input(i, x), scheduler.timesteps[i])
        fresh = fresh_noise(i, x) if scheduler.eta else None
        x, state = scheduler.step(i, noise, x, state, variance_noise=fresh)
        xs.append(x)
    return xs


def reference_trajectory(theirs, n, dtype=torch.float32, eta=0.0):
    theirs.set_timesteps(n)
    x = start(dtype) * theirs.init_noise_sigma
    xs = [x]
    for i, t in enumerate(theirs.timesteps):
        extra = {"eta": eta, "variance_noise": fresh_noise(i, x)} if eta else {}
        x = theirs.step(model(theirs.scale_model_input(x, t), t), t, x, return_dict=False, **extra)[0]
        xs.append(x)
    return xs


def worst(ours, theirs):
    """Largest difference over the trajectory, relative to the largest value at that step."""
    assert len(ours) == len(theirs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# against diffusers


@pytest.mark.parametrize("name", FIRST)
def test_timesteps_of_every_count(name):
    theirs = reference(name)
    for n in range(1, 1001 if name == "lms" else 1000):
        theirs.set_timesteps(n)
        ours = make_scheduler(name, n)
        assert list(ours.timesteps) == theirs.timesteps.tolist(), n
        assert ours.init_noise_sigma == float(theirs.init_noise_sigma)
        if name == "lms":
            assert list(ours.sigmas) == theirs.sigmas.tolist(), n
        else:
            assert all(type(t) is int for t in ours.timesteps)


@pytest.mark.parametrize("name", ["pndm", "ddim"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_whole_trajectories(name, dtype):
    theirs = reference(name)
    for n in FEW:
        assert_same(trajectory(make_scheduler(name, n), x=start(dtype)), reference_trajectory(theirs, n, dtype))


@pytest.mark.parametrize("eta", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_with_eta(eta, dtype):
    theirs = reference("ddim")
    for n in FEW[::2]:
        assert_same(trajectory(DDIM(n, eta), x=start(dtype)), reference_trajectory(theirs, n, dtype, eta))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.float64, 5e-8)])
def test_lms_trajectories(dtype, bar):
    theirs = reference("lms")
    for n in FEW_LMS:
        ours = LMS(n)
        xs = trajectory(ours, x=start(dtype) * ours.init_noise_sigma)
        assert worst(xs, reference_trajectory(theirs, n, dtype)) < bar, n


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pndm", "ddim"])
def test_bits_of_every_count(name):
    """With SD_TEST_ALL in the environment of every one from 1 to 999: six minutes, for what a part shows as well."""
    theirs = reference(name)
    for n in range(1, 1000) if ALL else [*range(1, 40), *range(40, 1000, 53), 999]:
        assert_same(trajectory(make_scheduler(name, n))[-1:], reference_trajectory(theirs, n)[-1:])


@pytest.mark.slow
def test_lms_of_many_counts():
    theirs = reference("lms")
    for n in range(1, 1001) if ALL else [*range(1, 16), 50, 333]:
        assert worst(trajectory(LMS(n)), reference_trajectory(theirs, n)) < 3e-6, n


@pytest.mark.parametrize("name", FIRST)
def test_other_schedules(name):
    changes = {**OTHER_BETAS, "steps_offset": 0, "set_alpha_to_one": True}
    for n in (1, 2, 7, 30):
        ours = trajectory(make_scheduler(name, n, schedule=OTHER))
        theirs = reference_trajectory(reference(name, **changes), n)
        assert worst(ours, theirs) <= (2e-6 if name == "lms" else 0), n


@pytest.mark.parametrize("name", ["pndm", "ddim"])
def test_thousand_steps_are_those_without_the_offset(name):
    with pytest.raises(IndexError):  # if this goes, take diffusers' rule
        reference_trajectory(reference(name), 1000)
    ours = make_scheduler(name, 1000)
    assert (max(ours.timesteps), min(ours.timesteps)) == (999, 0)
    assert_same(trajectory(ours), reference_trajectory(reference(name, steps_offset=0), 1000))


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoised_and_add_noise(name, dtype):
    ours, theirs = make_scheduler(name, 20), reference(name)
    x0, noise = start(dtype), fresh_noise(0, start(dtype))
    for i in range(len(ours.timesteps)):
        theirs.set_timesteps(20)
        t = theirs.timesteps[i]
        x = ours.add_noise(x0, noise, i)
        assert torch.equal(x, theirs.add_noise(x0, noise, t[None]))
        # float32's levels in `denoised`, as in diffusers' step, even for float64: so 1e-6
        torch.testing.assert_close(ours.denoised(i, noise, x), x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.denoised(i, noise, x.double()), x0.double(), rtol=0, atol=1e-5)
        if name != "pndm":  # whose step does not tell in diffusers
            theirs.scale_model_input(x, t)
            x_0 = theirs.step(model(x, t), t, x).pred_original_sample
            assert torch.equal(ours.denoised(i, model(x, t), x), x_0)


# against what is known without diffusers


def test_schedule():
    abar = NoiseSchedule().alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # as CompVis has it
    torch.testing.assert_close(abar.double(), (1 - betas).cumprod(0), rtol=0, atol=5e-7)
    assert abar.dtype == torch.float32
    assert abar.shape == (1000,)
    assert abar[0].item() == pytest.approx(0.99914998, abs=1e-7)
    assert abar[999].item() == pytest.approx(0.00466010, abs=1e-7)
    assert LMS(50).sigmas[0] == pytest.approx(14.61465, abs=1e-4)
    assert LMS(50).sigmas[-2:] == (pytest.approx(0.029168, abs=1e-5), 0.0)


def test_timesteps_of_fifty():
    assert DDIM(50).timesteps == tuple(range(981, 0, -20))
    assert PNDM(50).timesteps == (981, 961, *range(961, 0, -20))
    assert len(PNDM(50).timesteps) == 51
    assert LMS(50).timesteps[:2] == (999.0, pytest.approx(978.61224))
    assert (PNDM(1).timesteps, PNDM(2).timesteps, DDIM(1).timesteps) == ((1,), (501, 1, 1), (1,))
    assert LMS(1).timesteps == (0.0,)


@pytest.mark.parametrize("name", FIRST)
def test_every_count_is_usable(name):
    for n in range(1, 1001):
        s = make_scheduler(name, n)
        t = s.timesteps
        assert len(t) == n + (name == "pndm" and n > 1)
        assert 0 <= t[-1] <= t[0] <= 999
        assert list(t) == sorted(t, reverse=True)
        if name != "lms":
            tables = [s._coefficients] if name == "pndm" else [s._coefficients, DDIM(n, 1.0)._coefficients]
            assert all(math.isfinite(c) for table in tables for row in table for c in row)


@pytest.mark.slow
@every_solver
@given(n=counts, seed=st.integers(0, 2**32), schedule=st.sampled_from([V1, OTHER]))
@settings(max_examples=25 if ALL else 8, deadline=None)
def test_true_noise_leads_back_to_the_image(make, n, seed, schedule):
    """Whoever always predicts the noise that is there gets, from any count, the image it was added to."""
    plain = make(n)
    eta = {"eta": plain.eta} if plain.eta else {}
    s = type(plain)(n, schedule=schedule, **eta)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    x, state = s.add_noise(x0, noise, 0), s.init_state()
    # PNDM's and DDIM's coefficients are rounded to float32: each step errs by a few parts in 2**24 of x, and what is
    # wrong already grows as the signal in x does. LMS's are exact.
    rounding, bound = 0 if isinstance(s, LMS) else 2**-22, 1e-10
    for i in range(len(s.timesteps)):
        signal, before = s.level(i)[0], s.level(max(i - 1, 0))[0]
        bound = bound * max(1, signal / before) + rounding * x.abs().max().item()
        torch.testing.assert_close(x, s.add_noise(x0, noise, i), rtol=0, atol=bound)
        torch.testing.assert_close(s.denoised(i, noise, x), x0, rtol=0, atol=bound / signal)
        fresh = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        if s.eta:  # what is drawn anew is then part of the noise that is there
            z, _ = s.step(i, noise, x, state, variance_noise=fresh)
            a, b = s._coefficients[i][1:]
            total = (a**2 + b**2) ** 0.5
            x, noise = z, (a * noise + b * fresh) / total if total else noise
        else:
            x, state = s.step(i, noise, x, state)
    final = 1.0 if isinstance(s, LMS) or schedule.set_alpha_to_one else V1.alphas_cumprod[0].item()
    torch.testing.assert_close(x, final**0.5 * x0 + (1 - final) ** 0.5 * noise, rtol=0, atol=bound / signal)


def gaussian_error(scheduler, spread=0.5):
    """How far off the end is, where the data are N(0, spread^2): there the noise and the path are known."""
    abar = V1.alphas_cumprod.double()

    def level(t):  # abar at any t, as LMS interpolates it: linearly in sigma
        sigma = ((1 - abar) / abar) ** 0.5
        low = min(int(t), 998)
        s = sigma[low] + (sigma[low + 1] - sigma[low]) * (t - low)
        return 1 / (1 + s**2)

    def exact_model(x, t):
        a = level(t)
        return (1 - a) ** 0.5 * x / (a * spread**2 + 1 - a)

    a = level(scheduler.timesteps[0])
    x = start(torch.float64)
    final = 1.0 if isinstance(scheduler, LMS) else abar[0]
    true = x * ((final * spread**2 + 1 - final) / (a * spread**2 + 1 - a)) ** 0.5
    x = x * (1 if scheduler.init_noise_sigma == 1 else a**-0.5)  # LMS has x_t / sqrt(abar)
    return worst(trajectory(scheduler, exact_model, x)[-1:], [true])


@pytest.mark.parametrize("make", [PNDM, DDIM, LMS])
def test_more_steps_come_nearer_to_the_exact_path(make):
    errors = [gaussian_error(make(n)) for n in (10, 20, 50, 200, 1000)]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 4e-3, errors


def test_fourth_order_beats_first():
    for n in (20, 50, 100):
        assert gaussian_error(PNDM(n)) < 0.25 * gaussian_error(DDIM(n))


@given(n=counts, where=st.floats(0, 1), order=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_lms_integrates_polynomials_exactly(n, where, order):
    s = LMS(n)
    i = round(where * (n - 1))
    order = min(order, i + 1)
    a, b = s.sigmas[i : i + 2]
    for power in range(order):
        # about a and in units of the step, lest large sigmas hide the error
        nodes = [(s.sigmas[i - k] - a) / (b - a) for k in range(order)]
        total = sum(w / (b - a) * node**power for w, node in zip(s._weights(i, order), nodes, strict=True))
        assert total == pytest.approx(1 / (power + 1), abs=1e-11)


def test_lms_weights_are_adams_bashforths_where_steps_are_equal():
    s = LMS(50)
    vars(s)["sigmas"] = tuple(float(k) for k in range(50, -1, -1))
    assert s._weights(9, 4) == pytest.approx([-55 / 24, 59 / 24, -37 / 24, 9 / 24])
    assert s._weights(9, 2) == pytest.approx([-3 / 2, 1 / 2])


def test_pndm_and_ddim_are_the_same_map():
    for n in (3, 50, 999):
        pndm, ddim = PNDM(n), DDIM(n)
        x = start(torch.float64)
        for i in range(2, n, 7):  # at order 1, which is how PNDM starts anywhere
            ours, _ = pndm.step(i + 1, model(x, i), x, pndm.init_state())
            torch.testing.assert_close(ours, ddim.step(i, model(x, i), x, ())[0], rtol=1e-5, atol=1e-6)


# purity, immutability, refusals


@every_solver
@given(n=st.integers(1, 60), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_a_step_depends_on_its_arguments_only(make, n, seed):
    s = make(n)
    generator = torch.Generator().manual_seed(seed)
    x, state = torch.randn(2, 3, generator=generator), s.init_state()
    assert state == ()
    for i in range(len(s.timesteps)):
        noise, fresh = torch.randn(2, 2, 3, generator=generator)
        before = [a.clone() for a in (x, noise, fresh, *state)]
        versions = [a._version for a in (x, noise, fresh, *state)]
        assert s.init_noise_sigma == 1 or not torch.equal(s.scale_input(i, x), x)
        s.denoised(i, noise, x), s.add_noise(x, noise, i)
        y, new = s.step(i, noise, x, state, variance_noise=fresh)
        again, new_again = make(n).step(i, noise, x, state, variance_noise=fresh)
        assert_same([y, *new], [again, *new_again])
        assert_same([x, noise, fresh, *state], before)
        assert [a._version for a in (x, noise, fresh, *state)] == versions
        assert isinstance(new, tuple)
        assert len(new) <= 3
        assert y is not x
        assert y.data_ptr() not in {a.data_ptr() for a in (x, noise, fresh, *state, *new)}
        x, state = y, new


@pytest.mark.parametrize("make", [PNDM, DDIM])
def test_scale_input_is_x_itself(make):
    x = start()
    assert make(5).scale_input(3, x) is x


@every_solver
def test_any_step_can_come_again(make):
    """A stored (x, state) continues to the same end, bit for bit, after other images have been drawn."""
    s = make(12)
    xs = trajectory(s)
    x, state = start() * s.init_noise_sigma, s.init_state()
    for i in range(5):
        x, state = s.step(i, model(s.scale_input(i, x), s.timesteps[i]), x, state, variance_noise=fresh_noise(i, x))
    trajectory(s, x=start() * -3)
    for i in range(5, len(s.timesteps)):
        x, state = s.step(i, model(s.scale_input(i, x), s.timesteps[i]), x, state, variance_noise=fresh_noise(i, x))
    assert torch.equal(x, xs[-1])


@pytest.mark.parametrize("make", [PNDM, DDIM, LMS])
def test_start_in_the_middle(make):
    """From noise added at a later step, no history: to the image that this noise was added to."""
    s = make(20)
    x0, noise = start(), fresh_noise(7, start())
    end = trajectory(s, lambda x, t: noise, s.add_noise(x0, noise, 0))[-1]
    for first in (2, 9, len(s.timesteps) - 1):
        x = trajectory(s, lambda x, t: noise, s.add_noise(x0, noise, first), first)[-1]
        torch.testing.assert_close(x, end, rtol=0, atol=1e-4)


@every_solver
def test_immutable(make):
    s = make(5)
    for name in ("num_inference_steps", "eta", "schedule", "timesteps", "init_noise_sigma", "new"):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(s, name, 1)
    with pytest.raises(FrozenInstanceError):
        s.schedule.beta_start = 0.5
    assert isinstance(s.timesteps, tuple)
    assert s == make(5)
    assert hash(s) == hash(make(5))
    assert s != make(6)
    V1.alphas_cumprod.zero_()  # a tensor can be written into, so each reader has his own
    assert V1.alphas_cumprod[0] > 0.99


@pytest.mark.parametrize("make", [PNDM, DDIM, LMS])
def test_batches_are_images_side_by_side(make):
    s, a, b = make(7), start(), start() * 0.3 + 1
    assert_same(trajectory(s, x=torch.cat([a, b]))[-1].split(1), [trajectory(s, x=x)[-1] for x in (a, b)])


@every_solver
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_shape_stay(make, dtype):
    s = make(7)
    x = trajectory(s, x=start(dtype) * s.init_noise_sigma)[-1]
    assert (x.dtype, x.shape) == (dtype, start().shape)
    assert s.denoised(0, x, x).dtype == s.add_noise(x, x, 0).dtype == dtype
    assert x.isfinite().all()


@every_solver
def test_no_device_is_waited_for(make):
    """On the meta device nothing has a value, so whatever asked for one would raise."""
    s, x = make(6), torch.empty(1, 4, 2, 2, device="meta")
    state = s.init_state()
    for i in range(len(s.timesteps)):
        x = s.scale_input(i, x)
        s.denoised(i, x, x), s.add_noise(x, x, i)
        x, state = s.step(i, x, x, state, variance_noise=x)
    assert x.device.type == "meta"


@pytest.mark.parametrize("name", FIRST)
def test_process_wide_defaults_do_not_matter(name):
    expected = trajectory(make_scheduler(name, 9), x=start())
    x = start()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as where a model is being built
            s = make_scheduler(name, 9)
            state = s.init_state()
            for i, t in enumerate(s.timesteps):
                x, state = s.step(i, model(s.scale_input(i, x), t), x, state)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(x, expected[-1])


@pytest.mark.parametrize("n", [0, -1, 1001, 10**9, 50.0, "50", None, True, math.nan, [50]])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_refused_counts(name, n):
    with pytest.raises(
        ValueError, match=r"num_inference_steps must be a whole number from 1 to (1000|999|50),"
    ) as error:
        make_scheduler(name, n)
    assert repr(n) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf, "0.5", None, True])
def test_refused_eta(eta):
    with pytest.raises(ValueError, match="eta must be a number from 0 to 1, not "):
        DDIM(50, eta)
    with pytest.raises(ValueError, match="eta must be"):
        make_scheduler("ddim", 50, eta)
    for name in ("pndm", "lms"):
        with pytest.raises(ValueError, match=f"eta must be 0 for {name}"):
            make_scheduler(name, 50, eta)


@pytest.mark.parametrize("name", ["eulr", "PNDM2", "ddim_karras", "", None, 3, ["pndm"]])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="there are pndm, ddim, lms"):
        make_scheduler(name, 50)


def test_make_scheduler():
    assert make_scheduler("pndm", 50) == PNDM(50)
    assert make_scheduler("ddim", 50, 0.5) == DDIM(50, eta=0.5)
    assert make_scheduler("lms", 50, eta=0.0) == LMS(50)
    for name in ("PNDM", "PLMS", "PNDMScheduler"):  # as people write it, ldm and diffusers
        assert make_scheduler(name, 50) == PNDM(50)
    assert make_scheduler("lms", 50, schedule=OTHER).schedule is OTHER
    assert all(issubclass(s, Scheduler) for s in SCHEDULERS.values())


def test_eta_needs_noise_and_nothing_else_does():
    x = start()
    with pytest.raises(ValueError, match="needs variance_noise"):
        DDIM(50, eta=0.5).step(0, x, x, ())
    for s in (PNDM(50), DDIM(50), LMS(50)):
        assert s.eta == 0
        assert torch.equal(s.step(0, x, x, ())[0], s.step(0, x, x, (), variance_noise=x)[0])


@every_solver
@pytest.mark.parametrize("i", [-1, 100, 10**6])
def test_steps_that_do_not_exist(make, i):
    s, x = make(50), start()
    last = len(s.timesteps) - 1
    calls = [
        lambda: s.step(i, x, x, (), variance_noise=x),
        lambda: s.denoised(i, x, x),
        lambda: s.add_noise(x, x, i),
    ]
    for call in calls:
        with pytest.raises(IndexError, match=f"there is no step {i}: the steps are 0 to {last}"):
            call()


def test_pndm_cannot_start_at_its_second_step():
    with pytest.raises(ValueError, match="needs the state that step 0 returned"):
        PNDM(50).step(1, start(), start(), ())


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 0},
        {"beta_end": 1},
        {"beta_start": 0.5},
        {"num_train_timesteps": 1},
        {"steps_offset": -1},
    ],
)
def test_refused_schedules(settings):
    with pytest.raises(ValueError, match="a noise schedule needs"):
        NoiseSchedule(**settings)


def test_short_training_schedules():
    for n in (1, 2, 3):
        for name in FIRST:
            s = make_scheduler(name, n, schedule=NoiseSchedule(num_train_timesteps=3))
            assert 0 <= s.timesteps[-1] <= s.timesteps[0] <= 2
            assert trajectory(s)[-1].isfinite().all()
    with pytest.raises(ValueError, match="from 1 to 3, not 4"):
        PNDM(4, schedule=NoiseSchedule(num_train_timesteps=3))


def test_imports_torch_only():
    modules = set()
    folder = Path(sd.solvers.__file__).parent
    for file in (Path(sd.scheduler.__file__), Path(sd.schedule.__file__), *folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
    known = {"__future__", "math", "collections.abc", "dataclasses", "functools", "typing", "torch"}
    assert modules <= known | {"schedule", "solvers", "solvers.table", "table", "sigma", "log_snr", "timesteps"}

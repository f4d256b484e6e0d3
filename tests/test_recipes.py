"""`--recipe NAME`: what it sets, what overrides it, and what is said of it."""

from __future__ import annotations

import pytest
from PIL import Image

from sd.cli import main
from sd.cli.recipes import RECIPES, with_recipe
from sd.cli.settings import Drawing
from sd.image import read_settings
from sd.scheduler import make_scheduler

CALL = ["a red star", "--device", "cpu"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_settings_are(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*CALL, "--recipe", name, "--seed", "3", "-o", "a.png"]) == 0
    said = capsys.readouterr().err
    assert f"--recipe {name}: {RECIPES[name].says}" in said
    given = Drawing("a", **RECIPES[name].settings)
    solver = make_scheduler(given.scheduler, given.num_inference_steps, **given.solver_options or {})
    options = ["--scheduler", given.scheduler, "--steps", str(given.num_inference_steps)]
    if given.guidance_scale is not None:
        options += ["--guidance", str(given.guidance_scale)]
    found = read_settings("a.png")
    assert "recipe" not in found  # what it says is there in its place
    assert (found["num_inference_steps"], found["scheduler"]) == (given.num_inference_steps, given.scheduler)
    assert found["solver_options"].get("timestep_spacing") == (given.solver_options or {}).get("timestep_spacing")
    if given.solver_options is None:
        assert main([*CALL, *options, "--seed", "3", "-o", "b.png"]) == 0
        assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    else:
        assert solver.timesteps == (999.0,)


def test_what_is_given_overrides_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*CALL, "--recipe", "turbo", "--steps", "2", "--quiet", "-o", "a.png"]) == 0
    found = read_settings("a.png")
    assert (found["num_inference_steps"], found["guidance_scale"]) == (2, 0.0)
    assert "--recipe" not in capsys.readouterr().err
    assert main(["--again", "a.png", "--recipe", "quick", "--steps", "2", "--quiet", "-o", "b.png"]) == 0
    found = read_settings("b.png")
    assert (found["scheduler"], found["solver_options"].get("timestep_spacing")) == ("dpmpp_2m", None)
    drawn = {"scheduler": "ddim", "eta": 0.5, "seed": 3}
    assert "eta" not in with_recipe(drawn, {"recipe": "quick"})  # the recipe's solver has none
    other = with_recipe({}, {"recipe": "turbo", "scheduler": "ddim"})
    assert other == {"recipe": "turbo", "scheduler": "ddim", "num_inference_steps": 1, "guidance_scale": 0.0}


def test_an_unknown_recipe_is_refused(capsys):
    assert main([*CALL, "--recipe", "fast"]) == 2
    assert "--recipe must be quick, draft, lcm or turbo, not fast." in capsys.readouterr().err

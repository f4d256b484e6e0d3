"""`--recipe NAME`: settings that draw with fewer calls of the UNet, by name, with what each of them costs.

What is given on the command line beside a recipe overrides what the recipe says. A picture records the settings, not
the recipe's name. The shares of captions drawn right are those of docs/solvers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .words import say


@dataclass(frozen=True)
class Recipe:
    settings: Mapping[str, Any]  # fields of `Drawing`
    says: str  # what it does and what it costs; sentences


RECIPES = {
    "quick": Recipe(
        {"scheduler": "dpmpp_2m", "num_inference_steps": 15},
        "15 steps of DPM++ 2M. The built-in model draws 99.8 % of captions right with it, as with its own 30 "
        "steps; what it costs other models was not measured.",
    ),
    "draft": Recipe(
        {"scheduler": "ddim", "num_inference_steps": 8},
        "8 steps of DDIM, for a look at what a seed draws. The built-in model draws 99.5 % of captions right with "
        "it, 99.8 % with its own 30 steps; what it costs other models was not measured.",
    ),
    "lcm": Recipe(
        {"scheduler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0},
        "4 steps of LCM without guidance. It needs a model with an LCM LoRA (--lora), or LCM's full UNet, for which "
        "--guidance 8 is usual.",
    ),
    "turbo": Recipe(
        {
            "scheduler": "euler",
            "solver_options": {"timestep_spacing": "trailing"},
            "num_inference_steps": 1,
            "guidance_scale": 0.0,
        },
        "A single step without guidance. It needs a model that was made for it, such as SD-Turbo.",
    ),
}


def explain(drawing: Any) -> None:
    """Say what the recipe of a drawing does."""
    if drawing.recipe and not drawing.quiet:
        say(f"--recipe {drawing.recipe}: {RECIPES[drawing.recipe].says}")


def with_recipe(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a picture that is drawn again says, what a recipe says, and what is given: the later ones override."""
    recipe = RECIPES[given["recipe"]].settings if "recipe" in given else {}
    if "scheduler" in given:  # the options of another solver mean nothing to it
        recipe = {name: value for name, value in recipe.items() if name != "solver_options"}
    elif "scheduler" in recipe:
        settings = {name: value for name, value in settings.items() if name not in ("solver_options", "eta")}
    return {**settings, **recipe, **given}

"""Which noise levels the solvers go through: their steps on the noise schedule, as a picture and a table.

    python examples/lab/paths.py --steps 10 --plot solver-paths.png

sigma is the noise by the signal of x_t: 14.6 at the start, where there is next to no picture, 0.03 at the last
timestep. All solvers can be told any of these levels; what differs by default are the timesteps ("leading",
"linspace", "trailing") and, with a name that ends in karras, exponential or beta, the levels themselves.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw

import sd

PATHS = {  # what is drawn: a solver that shows it, and how it is made
    "leading (PNDM, DDIM, DDPM)": ("ddim", {}),
    "linspace (Euler, Heun, DPM2, LMS)": ("euler", {}),
    "linspace, last dropped (DPM++ 2M)": ("dpmpp_2m", {}),
    "trailing": ("euler", {"timestep_spacing": "trailing"}),
    "karras": ("euler_karras", {}),
    "exponential": ("euler_exponential", {}),
    "beta": ("euler_beta", {}),
    "LCM": ("lcm", {}),
}
COLOURS = ("#1f6fb2", "#b3370f", "#2c8a4b", "#8c3cb4", "#c98a00", "#00899b", "#d63c86", "#555555")


def levels(name: str, steps: int, options: dict) -> list[float]:
    """sigma / signal at each step."""
    solver = sd.make_scheduler(name, steps, **options)
    return [sigma / signal for signal, sigma in map(solver.level, range(len(solver.timesteps)))]


def plot(paths: dict[str, list[float]]) -> Image.Image:
    """A row for each path; its steps are dots, and the noise falls from left to right."""
    wide, left, row, top = 860, 260, 34, 30
    image = Image.new("RGB", (wide, top + row * len(paths) + 30), "white")
    canvas = ImageDraw.Draw(image)
    most, least = math.log(15), math.log(0.02)

    def at(sigma: float) -> float:
        return left + (wide - left - 20) * (most - math.log(sigma)) / (most - least)

    for sigma in (10, 3, 1, 0.3, 0.1, 0.03):
        canvas.line((at(sigma), top - 8, at(sigma), top + row * len(paths)), "lightgrey")
        canvas.text((at(sigma) - 8, top + row * len(paths) + 8), f"{sigma:g}", "grey")
    canvas.text((left - 60, top + row * len(paths) + 8), "sigma", "grey")
    for i, (label, path) in enumerate(paths.items()):
        y = top + row * i + 8
        canvas.text((10, y - 6), label, COLOURS[i])
        canvas.line((at(path[0]), y, at(path[-1]), y), COLOURS[i])
        for sigma in path:
            canvas.ellipse((at(sigma) - 3, y - 3, at(sigma) + 3, y + 3), COLOURS[i])
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plot", type=Path, help="write the picture here, as PNG")
    args = parser.parse_args()
    paths = {label: levels(name, args.steps, options) for label, (name, options) in PATHS.items()}
    for label, path in paths.items():
        print(f"{label:38} {' '.join(f'{sigma:6.3f}' for sigma in path)}")
    if args.plot:
        plot(paths).save(args.plot)


if __name__ == "__main__":
    main()

"""Watch a picture come about: the clean picture that each step points to, side by side in one strip.

python examples/steps.py "a green ring on a yellow background" steps.png
"""

from __future__ import annotations

import sys

import torch
from PIL import Image

import sd


def strip(prompt: str, shown: int = 8, steps: int = 30) -> Image.Image:
    model = sd.load("shapes")
    sampler = sd.SimpleSampler(model)
    previews = [step.denoised for step in sampler.stream(prompt, num_inference_steps=steps, seed=0)]
    chosen = torch.linspace(0, len(previews) - 1, shown).round().int().tolist()
    images = sampler.decode(torch.cat([previews[i] for i in chosen]))
    result = Image.new("RGB", (model.size * shown, model.size))
    for i, image in enumerate(images):
        result.paste(image, (i * model.size, 0))
    return result


if __name__ == "__main__":
    prompt, out = sys.argv[1:] if len(sys.argv) == 3 else ("a green ring on a yellow background", "steps.png")
    strip(prompt).save(out)
    print(out)

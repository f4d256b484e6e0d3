"""Draw the picture at the head of the README: captions, and what the built-in model makes of them.

python examples/gallery.py docs/pictures/shapes.png
"""

from __future__ import annotations

import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

import sd

CAPTIONS = [
    "a red star above a blue ring on a white background",
    "a large yellow circle on a purple background",
    "a green cross to the left of an orange square on a black background",
    "a small white triangle on a red background",
    "a purple ring below a black triangle on a yellow background",
    "a blue square to the right of a red circle on an orange background",
]


def gallery(captions: list[str], steps: int = 50, seed: int = 0) -> Image.Image:
    model = sd.load("shapes")
    images = sd.SimpleSampler(model)(captions, num_inference_steps=steps, seed=seed)
    side, gap, text = model.size, 12, 44
    result = Image.new("RGB", (len(images) * (side + gap) + gap, side + gap + text), "white")
    canvas = ImageDraw.Draw(result)
    font = ImageFont.load_default(size=11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = gap + i * (side + gap)
        result.paste(image, (x, gap))
        canvas.rectangle((x - 1, gap - 1, x + side, gap + side), outline="silver")
        canvas.multiline_text((x, side + gap + 3), textwrap.fill(caption, 24), "black", font, spacing=1)
    return result


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "gallery.png"
    gallery(CAPTIONS).save(out)
    print(out)

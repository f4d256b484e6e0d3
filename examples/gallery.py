"""Draw the picture at the head of the README: captions, and what the built-in model makes of them.

    python examples/gallery.py docs/pictures/shapes.png

Nothing is chosen: picture k is of the caption that `random_scene` draws from the seed k, drawn with the seed k and
the model's own defaults.
"""

from __future__ import annotations

import random
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import sd

sys.path.insert(0, str(Path(__file__).parent / "shapes"))
from scenes import random_scene


def gallery(count: int = 12, columns: int = 6) -> Image.Image:
    model = sd.load("shapes")
    captions = [random_scene(random.Random(seed)).caption() for seed in range(count)]
    images = sd.SimpleSampler(model)(captions, seed=0)  # the seed of picture k is k
    side, gap, text = model.size, 12, 44
    rows = -(-count // columns)
    result = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + gap + text)), "white")
    canvas = ImageDraw.Draw(result)
    font = ImageFont.load_default(size=11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + gap + text)
        result.paste(image, (x, y))
        canvas.rectangle((x - 1, y - 1, x + side, y + side), outline="silver")
        canvas.multiline_text((x, y + side + 3), textwrap.fill(caption, 24), "black", font, spacing=1)
    return result


if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "gallery.png"
    gallery().save(out)
    print(out)

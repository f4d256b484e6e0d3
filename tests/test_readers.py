"""Programs that read pictures of AUTOMATIC1111 read ours, too.

Every field that they read right in its own writing of the same picture.
"""

from __future__ import annotations

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd.image import save_png

PLAIN = {
    "prompt": "a red star",
    "negative_prompt": "",
    "num_inference_steps": 20,
    "scheduler": "euler_a",
    "guidance_scale": 7.5,
    "seed": 1234567890,
    "width": 512,
    "height": 768,
    "model": "nets/sd-v1-4.safetensors",
    "model_hash": "0123456789",
}
CASES = {
    "plain": {},
    "a whole scale": {"guidance_scale": 7.0, "eta": 0.0},
    "karras": {"scheduler": "dpmpp_2m_karras", "rng": "cuda"},
    "uniform": {"scheduler": "dpmpp_2m", "clip_skip": 1},
    "exponential": {"scheduler": "dpmpp_2m_sde_exponential"},
    "ddim": {"scheduler": "ddim", "eta": 0.5},
    "plms": {"scheduler": "pndm"},
    "negative": {"negative_prompt": "blurred, (text:1.2)"},
    "weights": {"prompt": "a (red:1.3) star, [above] a ring, ((best)) \\(not\\) this", "prompt_style": "a1111"},
    "quotes": {"prompt": "a \"red: star\", and 'this'", "negative_prompt": '"x", y: z'},
    "lines": {"prompt": "a red star,\nabove a ring\n\nand more", "negative_prompt": "blur,\n text"},
    "spaces around": {"prompt": " a red star \n", "negative_prompt": " blur "},
    "no prompt": {"prompt": ""},
    "like fields": {"prompt": "Steps: 3, Sampler: none\nSize: 1x1", "negative_prompt": "Model: x, Seed: 7"},
    "Latin": {"prompt": "größer, ½ é", "negative_prompt": "ñ"},
    "not Latin": {"prompt": "赤い星 ★ звезда", "negative_prompt": "ぼかし"},
    "a name with signs": {"model": 'nets/a, b: "c".safetensors'},
    "a name in quotes": {"model": 'nets/the "c".safetensors'},
    "of a repository": {"model": "CompVis/stable-diffusion-v1-4"},
    "hires": {"hires": 2.0, "hires_strength": 0.75},
    "from a picture": {"strength": 0.6, "image": "a.png", "clip_skip": 1},
    "no hash": {"model_hash": None},
    "a LoRA": {"lora": [{"file": "nets/style.safetensors", "scale": 0.8, "hash": "0123456789ab"}]},
}


def quote(value):
    """Theirs, of modules/infotext_utils.py."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ",\n:") else text


def facts(case):
    """What is true of a picture, in the words in which AUTOMATIC1111 writes it; None: nothing is written."""
    samplers = {
        "euler_a": ("Euler a", "Uniform"),
        "dpmpp_2m_karras": ("DPM++ 2M", "Karras"),
        "dpmpp_2m": ("DPM++ 2M", "Uniform"),
        "dpmpp_2m_sde_exponential": ("DPM++ 2M SDE", "Exponential"),
        "ddim": ("DDIM", "Automatic"),
        "pndm": ("PLMS", "Automatic"),
    }
    name = case["model"].removeprefix("nets/").removesuffix(".safetensors")
    return {
        "Steps": case["num_inference_steps"],
        "Sampler": samplers[case["scheduler"]][0],
        "Schedule type": samplers[case["scheduler"]][1],
        "CFG scale": f"{case['guidance_scale']:g}",
        "Seed": case["seed"],
        "Size": f"{case['width']}x{case['height']}",
        "Model hash": case["model_hash"],
        "Model": name,
        "Denoising strength": case.get("hires_strength") or case.get("strength"),
        "Clip skip": 2 if case.get("clip_skip") else None,
        "RNG": "NV" if case.get("rng") else "CPU",
        "Hires upscale": "2" if "hires" in case else None,
        "Hires upscaler": "Lanczos" if "hires" in case else None,
        "Eta DDIM": case.get("eta") or None,
        "Lora hashes": "style: 0123456789ab" if "lora" in case else None,
    }


def prompt_of(case):
    """There, it names the networks."""
    return case["prompt"] + (" <lora:style:0.8>" if "lora" in case else "")


def theirs(case, path):
    """A picture as their program writes it: create_infotext of modules/processing.py, and PngInfo of Pillow."""
    negative = f"\nNegative prompt: {case['negative_prompt']}" if case["negative_prompt"] else ""
    fields = ", ".join(f"{key}: {quote(value)}" for key, value in facts(case).items() if value is not None)
    info = PngInfo()
    info.add_text("parameters", f"{prompt_of(case)}{negative}\n{fields}".strip())
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def read_by_sd_parsers(path):
    from sd_parsers import ParserManager

    found = ParserManager().parse(path)
    if found is None:
        return {}
    (sampler,) = found.samplers
    model = {"Model": sampler.model.name, "Model hash": sampler.model.hash} if sampler.model else {}
    names = {"scheduler": "Schedule type", "cfg_scale": "CFG scale", "seed": "Seed", "steps": "Steps"}
    return {
        "program": found.generator.value,
        "prompt": found.full_prompt,
        "negative_prompt": found.full_negative_prompt,
        "Sampler": sampler.name,
        **model,
        **{names[key]: value for key, value in sampler.parameters.items()},
        **found.metadata,
    }


def read_by_sd_prompt_reader(path):
    from sd_prompt_reader.format.a1111 import A1111

    with Image.open(path) as image:  # as in its image_data_reader.py, without the packages of its window
        reader = A1111(info=dict(image.info))
    status = reader.parse().name
    names = {"model": "Model", "sampler": "Sampler", "seed": "Seed", "cfg": "CFG scale", "steps": "Steps"}
    return {
        "status": status,
        "prompt": reader.positive,
        "negative_prompt": reader.negative,
        "Size": f"{reader.width}x{reader.height}",
        **{name: reader.parameter[key] for key, name in names.items()},
        **{
            key.partition(": ")[0]: key.partition(": ")[2]
            for key in reader.setting.split(", ")  # what it shows as it stands
        },
    }


READERS = {"sd_parsers": read_by_sd_parsers, "sd_prompt_reader": read_by_sd_prompt_reader}


@pytest.mark.parametrize("package", READERS)
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_right_of_theirs_is_read_right_of_ours(package, name, tmp_path):
    pytest.importorskip(package)
    case = PLAIN | CASES[name]
    theirs(case, tmp_path / "theirs.png")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "ours.png", case)
    by_them, by_us = (READERS[package](str(tmp_path / f"{who}.png")) for who in ("theirs", "ours"))
    truth = {key: str(value) for key, value in facts(case).items() if value is not None}
    truth |= {"prompt": prompt_of(case).strip(), "negative_prompt": case["negative_prompt"].strip()}
    truth |= {"program": "AUTOMATIC1111", "status": "READ_SUCCESS"}
    right = {key for key, value in truth.items() if key in by_them and str(by_them[key]) == value}
    assert {key: by_us.get(key) for key in right} == {key: by_them[key] for key in right}
    if name not in ("no prompt", "like fields"):  # which neither of the two reads
        assert len(right) >= 8, by_them

"""The page that `artist study` writes: what is in it, and, in a real browser, that it works."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

import sd
from sd import study
from sd.cli import main
from sd.study.page import SIDE, _nulls, study_page
from tests.browser import CHROMIUM, DRIVER, browser
from tests.layouts import make_model

PROMPT = "a large red star on a white background"
CALL = {"num_inference_steps": 12, "scheduler": "ddim"}

in_browser = pytest.mark.skipif(not (DRIVER and CHROMIUM), reason="needs chromium and chromedriver")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    page, record = study_page(sd.SimpleSampler(sd.load("shapes")), PROMPT, **CALL)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path, data_of(page), record


def test_what_is_in_it(report):
    _path, data, record = report
    model = sd.load("shapes")
    with study.attention_maps(model, steps=True) as maps:
        latents = sd.SimpleSampler(model)(PROMPT, output_type="latent", **CALL)
    assert torch.equal(record.latents, latents)
    words = [w["text"] for w in data["maps"]["words"]]
    assert words == [*PROMPT.split(), "start", "end"]
    assert len(data["steps"]) == 12
    assert data["maps"]["steps"] == list(range(12))
    layer = data["maps"]["layers"][-1]
    h, w = layer["grid"]
    values = np.frombuffer(base64.b64decode(layer["data"]), np.uint8).reshape(12, len(words), h, w)
    star = words.index("star")
    got = values[5, star] / 255 * layer["max"][star]
    wanted = maps.word("star", layer=layer["name"] + ".attn2", step=5, size=(h, w)).numpy()
    assert np.abs(got - wanted).max() <= layer["max"][star] / 255
    blocks = {b["name"]: b for b in data["blocks"]}
    assert sum(b["parameters"] for b in blocks.values()) == 6_715_588
    with study.edit(model, {"middle_block": lambda out, at: seen.append(out[at.cond][0]) and None}):
        seen: list = []
        sd.SimpleSampler(model)(PROMPT, output_type="latent", **CALL)
    strength = seen[3].square().mean(0).sqrt()
    assert blocks["middle_block"]["high"][3][0] == pytest.approx(strength.max().item(), rel=1e-3)
    assert blocks["middle_block"]["ms"] > 0


def test_it_needs_nothing_else(report):
    page = report[0].read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert not re.search(r"url\((?!data:)|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", page)


def test_a_prompt_cannot_leave_its_place(tiny):
    prompt = "</script><!--<script>alert(1)</script> & <b>"
    page, _ = study_page(sd.SimpleSampler(tiny), prompt, num_inference_steps=1)
    assert data_of(page)["prompt"] == prompt
    assert page.count("</script>") == 2  # its own
    assert "<title>&lt;/script&gt;" in page


@pytest.mark.parametrize("prompt", ["{{data}}", "{{title}} {{data}}"])
def test_a_prompt_is_no_mark_of_the_template(tiny, prompt):
    page, _ = study_page(sd.SimpleSampler(tiny), prompt, num_inference_steps=1)
    assert data_of(page)["prompt"] == prompt
    assert f"<title>{prompt}</title>" in page


def test_json_has_no_nan():
    assert _nulls({"a": [float("nan"), 1.5, {"b": float("-inf")}], "c": "NaN"}) == {
        "a": [None, 1.5, {"b": None}],
        "c": "NaN",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "budget"), [(50, 400_000), (300, 400_000), (50, 15_000_000)])
def test_size_is_bounded_in_steps(tiny, monkeypatch, steps, budget):
    monkeypatch.setattr("sd.study.page.BUDGET", budget)
    monkeypatch.setattr("sd.study.page.MARGIN", 150_000)
    page, record = study_page(sd.SimpleSampler(tiny), "a red star", num_inference_steps=steps, scheduler="ddim")
    data = data_of(page)
    assert len(page) <= budget
    shown = [step["index"] for step in data["steps"]]
    assert shown[-1] == steps - 1
    assert (len(shown) < steps) == (budget < 1_000_000)
    assert len(set(np.diff(shown))) == 1  # evenly
    assert data["maps"]["steps"] == shown
    assert data["times"] == record.timesteps.tolist()
    assert len(data["norms"]["x"]) == steps
    layer, words = data["maps"]["layers"][0], data["maps"]["words"]
    assert len(base64.b64decode(layer["data"])) == len(shown) * len(words) * layer["grid"][0] * layer["grid"][1]
    block = next(b for b in data["blocks"] if b["name"] == "middle_block")
    assert len(block["low"]) == len(shown)


def test_without_guidance_and_not_square(tiny):
    page, _ = study_page(
        sd.SimpleSampler(tiny), "st", guidance_scale=1.0, num_inference_steps=2, height=72, width=520, scheduler="lms"
    )
    data = data_of(page)
    assert data["angle"] is None
    assert "noise_without" not in data["norms"]
    assert all(max(layer["grid"]) <= SIDE + 1 for layer in data["maps"]["layers"])
    with pytest.raises(ValueError, match="one picture"):
        study_page(sd.SimpleSampler(tiny), ["st", "st"])


@pytest.mark.slow
def test_command(tmp_path, capsys):
    out, tensors = str(tmp_path / "r.html"), str(tmp_path / "t.safetensors")
    call = ["study", "a red star", "-o", out, "--steps", "2", "--trace", tensors]
    assert main(call) == 0
    assert "r.html" in capsys.readouterr().out
    assert study.Trace.load(tensors).settings["prompt"] == "a red star"
    assert main(call) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["study", "a red star", "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "no folder" in capsys.readouterr().err
    lean = ["study", "a red star", "-o", out, "--force", "--steps", "2", "--variant", "lean"]
    assert main(lean) == 0
    assert data_of((tmp_path / "r.html").read_text(encoding="utf-8"))["settings"]["variant"] == "lean"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "t.safetensors"]
    twice = str(tmp_path / "." / "both.html")
    assert main(["study", "a red star", "-o", str(tmp_path / "both.html"), "--trace", twice]) == 2
    assert "cannot both be" in capsys.readouterr().err


@pytest.mark.slow
@in_browser
def test_in_chromium(report, tmp_path):
    path, _data, _ = report
    with browser(tmp_path, 1200, 900) as b:
        b.open(path)
        assert b.run("return document.querySelector('h1').textContent") == PROMPT

        def shown():
            return b.run("return ['x', 'x0', 'noise'].map(id => document.getElementById(id).src)")

        # the slider moves the pictures
        last = shown()
        assert b.run("return document.getElementById('where').textContent").startswith("step 12 of 12")
        b.click("#step")  # in its middle
        middle = shown()
        assert all(a != m for a, m in zip(last, middle, strict=True))
        b.keys("\ue012")  # arrow left, on the slider
        assert all(a != m for a, m in zip(shown(), middle, strict=True))
        # a word lights its region
        b.click("[data-word=star]")
        assert b.run("return document.querySelector('[data-word=star]').getAttribute('aria-pressed')") == "true"
        b.run("document.getElementById('layer').value = '6'; document.getElementById('layer').onchange()")
        pixels = b.run("""const c = document.getElementById("heat");
            return [c.width, c.height, ...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]""")
        heat = np.array(pixels[2:]).reshape(pixels[1], pixels[0], 4).sum(2)
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        assert 32 < y < 96
        assert 32 < x < 96  # the star is large, in the centre
        assert heat[:8, :8].max() < 0.6 * heat.max()
        before = b.run("return document.getElementById('heat').toDataURL()")
        b.click("#each")
        assert b.run("return document.getElementById('heat').toDataURL()") != before
        assert "at step" in b.run("return document.getElementById('heatnote').textContent")
        b.click("#stack")  # what is said of the centre
        bars = b.run("""return [...document.querySelectorAll("#words button")].map(e =>
            [e.dataset.word, +e.lastChild.style.transform.slice(7, -1)])""")
        assert max(bars[:-2], key=lambda bar: bar[1])[1] == 1
        b.run("document.getElementById('stack').focus()")
        for key in "\ue013\ue012" * 7:  # up and left, to the corner; the step stays
            b.keys(key)
        place = b.run("return document.getElementById('place').style.cssText.match(/[\\d.]+(?=%)/g)")
        assert [round(float(x)) for x in place] == [6, 6]
        assert b.run("return document.getElementById('placenote').textContent").count("%") == 3
        assert b.run("return document.getElementById('step').value") == b.run("return String(step)")
        # a block shows what it returns, and follows the step
        b.click("[data-block=middle_block]")
        assert b.run("return document.getElementById('block').textContent").count("channel") == 5
        assert "1,020,288" in b.run("return document.getElementById('block').textContent")
        first = b.run("return document.querySelector('#block canvas').toDataURL()")
        b.run("document.activeElement.blur()")
        b.keys("\ue011")  # Home
        assert b.run("return document.getElementById('where').textContent").startswith("step 1 of 12")
        assert b.run("return document.querySelector('#block canvas').toDataURL()") != first
        # all by keyboard: from the top, tab to Play, the slider, and the first word
        b.run("document.activeElement.blur(); window.scrollTo(0, 0)")
        b.click("h1")
        names = []
        for _ in range(4):
            b.keys("\ue004")
            names.append(b.run("const e = document.activeElement; return e.id || e.dataset.word"))
        assert names == ["play", "step", "a", "large"]
        b.keys(" ")
        assert b.run("return document.querySelector('[data-word=large]').getAttribute('aria-pressed')") == "true"
        assert b.console() == []


@pytest.mark.slow
@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone(report, tmp_path, dark):
    with browser(tmp_path, 390, 800, dark) as b:
        b.open(report[0])
        b.click("[data-word=star]")
        b.click("[data-block='output_blocks.3']")
        assert b.run("return document.documentElement.scrollWidth <= window.innerWidth")
        background = b.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
        assert b.console() == []


@pytest.mark.slow
def test_full_size_latents_fit_in_15_mb():
    """Layers, sizes and steps as of Stable Diffusion v1 at 512 x 512; only the channels are few."""
    unet = sd.UNetConfig(model_channels=32, num_heads=1, context_dim=64, num_groups=8)
    model = make_model(unet, sd.VAEConfig(ch=32), size=512)
    prompt = "a red star " * 8  # of many tokens here
    page, _ = study_page(sd.SimpleSampler(model), prompt, num_inference_steps=20, scheduler="ddim")
    data = data_of(page)
    assert len(data["steps"]) == 20
    assert len(data["maps"]["layers"]) == 16
    assert len(page) < 15e6


def test_a_prompt_of_several_chunks(tiny):
    """Every place belongs to a word, to a start or to an end; and the page says how the prompt was read."""
    call = {"num_inference_steps": 2, "scheduler": "ddim", "prompt_style": "a1111", "clip_skip": 1, "rng": "cuda"}
    page, record = study_page(sd.SimpleSampler(tiny), "a (star:1.2) BREAK st", **call)
    words = data_of(page)["maps"]["words"]
    assert [word["text"] for word in words] == ["a", "star", "st", "start", "end"]
    assert words[-2]["tokens"] == [0, 77]
    assert sorted(place for word in words for place in word["tokens"]) == list(range(154))
    settings = {name: record.settings[name] for name in ("prompt_style", "clip_skip", "rng")}
    assert settings == {name: call[name] for name in settings}

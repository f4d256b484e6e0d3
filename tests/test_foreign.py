"""Pictures of AUTOMATIC1111 and Forge, drawn again."""

from __future__ import annotations

import random
import warnings

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd.cli import main
from sd.cli.again import checked
from sd.cli.foreign import fields_of, foreign_settings, read_foreign
from sd.cli.options import CommandError
from sd.cli.settings import drawing_of
from sd.image import parameters_text, read_settings
from tests.test_image import SETTINGS

TEXT = (
    "a (red:1.3) star,\nabove a [blue] ring\nNegative prompt: blur, (text)\nSteps: 20, Sampler: DPM++ 2M, "
    "Schedule type: Karras, CFG scale: 7, Seed: 123, Size: 128x64, Model hash: 0123456789, "
    'Model: "a, b", Clip skip: 2, Version: v1.10.1'
)


def png(path, text):
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


def test_all_that_decides_the_picture_is_understood(tmp_path):
    found, missed = foreign_settings(TEXT)
    assert found == {
        "prompt": "a (red:1.3) star,\nabove a [blue] ring",
        "negative_prompt": "blur, (text)",
        "prompt_style": "a1111",
        "num_inference_steps": 20,
        "guidance_scale": 7.0,
        "seed": 123,
        "width": 128,
        "height": 64,
        "clip_skip": 1,
        "model_hash": "0123456789",
        "model": "a, b",
        "rng": "cuda",
        "scheduler": "dpmpp_2m_karras",
    }
    assert missed == []
    drawing = drawing_of({"again": png(tmp_path / "a.png", TEXT), "model": "shapes"})
    assert (drawing.prompt_style, drawing.rng, drawing.clip_skip) == ("a1111", "cuda", 1)
    assert (drawing.scheduler, drawing.width, drawing.model_hash) == ("dpmpp_2m_karras", 128, "0123456789")
    assert drawing_of({"again": str(tmp_path / "a.png"), "model": "shapes", "seed": 9}).seed == 9


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("Sampler: Euler a", "euler_a"),
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m_karras"),  # of versions before 1.9
        ("Sampler: DPM++ 2M SDE, Schedule type: Exponential", "dpmpp_2m_sde_exponential"),
        ("Sampler: UniPC, Schedule type: Automatic", "unipc"),
        ("Sampler: PLMS", "pndm"),
        ("Sampler: LMS Karras", "lms_karras"),
        ("Sampler: DPM2 a, Schedule type: Beta", "dpm2_a_beta"),
        ("Sampler: DDIM", "ddim"),
        ("Sampler: DDIM, Schedule type: Karras", "ddim"),  # it does not look at it there
    ],
)
def test_samplers_by_their_names(fields, expected):
    assert foreign_settings(f"a\nSteps: 3, {fields}, Seed: 1")[0]["scheduler"] == expected


def test_a_sampler_that_is_not_here_can_be_replaced(tmp_path):
    path = png(tmp_path / "a.png", "a\nSteps: 3, Sampler: DPM++ 3M SDE, Schedule type: SGM Uniform, Seed: 1")
    with pytest.raises(CommandError, match="--scheduler chooses"):
        drawing_of({"again": path, "model": "shapes"})
    assert drawing_of({"again": path, "model": "shapes", "scheduler": "euler"}).scheduler == "euler"


@pytest.mark.parametrize(
    "fields",
    [
        *["Sampler: Euler a, Eta: 0.0", "Emphasis: No norm", "Hires upscale: 2, Hires upscaler: Latent", "NGMS: 2"],
        *["Zero terminal SNR: True", "Schedule max sigma: 5", "Sampler: DPM++ 2M SDE", "Hires resize: 512x512"],
    ],
)
def test_everything_that_is_not_known_to_be_harmless_is_named(fields):
    _, missed = foreign_settings(f"a\nSteps: 3, {fields}, Version: 1")
    assert missed
    assert not foreign_settings("a\nSteps: 3, Sampler: Euler, Eta: 0.5, Version: 1, Model hash: 01234567")[1]


def test_a_line_without_end_takes_no_time(tmp_path):
    path = png(tmp_path / "a.png", "a\n" + "a" * 300_000)
    with pytest.raises(CommandError, match="its last line is too long"):
        drawing_of({"again": path, "model": "shapes"})


def test_whose_noise_it_was():
    for field, expected in (("", "cuda"), (", RNG: NV", "cuda"), (", RNG: CPU", "cpu")):
        assert foreign_settings(f"a\nSteps: 3{field}")[0]["rng"] == expected


def test_what_is_not_followed_is_named(tmp_path):
    more = ", Variation seed: 5, Variation seed strength: 0.3, ENSD: 31337, Face restoration: CodeFormer"
    text = TEXT + more + ', Lora hashes: "style: abc", Denoising strength: 0.4, ControlNet 0: "canny"'
    with pytest.warns(UserWarning, match="not followed here") as caught:
        drawing_of({"again": png(tmp_path / "a.png", text), "model": "shapes"})
    said = str(caught[0].message)
    for name in (
        "Variation seed: 5",
        "strength: 0.3",
        "ENSD: 31337",
        "CodeFormer",
        "style: abc",
        "canny",
    ):
        assert name in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a star", "its last line has no Steps"),
        ("a\nSteps: many", "its field Steps is damaged"),
        ("a\nSteps: 3, Size: 128", "its field Size is damaged"),
        ("a\nSteps: 3, Sampler: Restart", "no scheduler is called 'Restart'"),
        ("a\nSteps: 3, Sampler: Euler, Schedule type: SGM Uniform", "schedule type 'SGM Uniform' is not here"),
        ("a\nSteps: 3, Seed: -5", "seed is damaged"),
    ],
)
def test_damaged_and_foreign_settings_are_one_sentence(tmp_path, text, says):
    with pytest.raises(CommandError, match=says) as caught:
        drawing_of({"again": png(tmp_path / "a.png", text), "model": "shapes"})
    assert "\n" not in str(caught.value)


def test_broken_settings_of_any_kind_are_one_sentence(tmp_path):
    """Letters lost, doubled and changed, lines cut: a drawing, or one sentence."""
    rng, said = random.Random(4), []
    signs = [
        *'0123456789-.,:"{}[]\\ \n',
        "nan",
        "1e999",
        "9" * 5000,
        "Steps: 7",
        "Negative prompt:",
        "é",
        "\u202e",
        "\ud800",
    ]
    for _ in range(300):
        text = list(TEXT)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            at = rng.randrange(len(text))
            text[at : at + rng.choice([0, 1, 1, 5, 40])] = rng.choice(signs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                checked("a.png", read_foreign("a.png", "".join(text), {"model": "shapes"}))
        except CommandError as error:
            said.append(str(error))
    assert all(text.isprintable() and len(text) < 500 for text in said)
    assert len({text[:45] for text in said}) > 5


@pytest.mark.parametrize(
    "text",
    [
        '{"sui_image_params": {"prompt": "a star", "steps": 20}, "sui_extra_data": {}}',  # SwarmUI
        '{"prompt": "a star", "steps": 30, "version": "Fooocus v2.1"}',
        "masterpiece, best quality",
        "",
        "\n\n\n",
        "Steps",
    ],
)
def test_of_other_programs_it_is_said_that_they_are_not_understood(tmp_path, text):
    with pytest.raises(CommandError, match="cannot be drawn again: its last line has no Steps"):
        drawing_of({"again": png(tmp_path / "a.png", text), "model": "shapes"})


def test_the_model_has_to_be_given(tmp_path):
    with pytest.raises(
        CommandError, match=r"with the model a, b \(hash 0123456789\): say where that is with --model"
    ):
        drawing_of({"again": png(tmp_path / "a.png", TEXT)})


def test_what_we_write_is_read_back():
    prompt, negative, fields = fields_of(
        parameters_text(SETTINGS | {"negative_prompt": "blur", "model": 'x: "y", z'})
    )
    assert (prompt, negative) == (SETTINGS["prompt"].strip(), "blur")
    assert fields["Model"] == 'x: "y", z'
    found, missed = foreign_settings(parameters_text(SETTINGS | {"scheduler": "ddim", "eta": 0.5, "hires": 2.0}))
    assert (found["scheduler"], found["eta"], found["hires"]) == ("ddim", 0.5, 2)
    assert missed == ["Hires upscale: 2 (the second pass is ours, at 0.75 in place of ?)"]
    assert fields["Steps"] == "30"


def test_a_picture_of_ours_is_the_same_by_its_parameters_alone(tmp_path, monkeypatch):
    """Their text says all that decides it: by the noise, the style and the solver."""
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "3", "--scheduler", "euler_a", "--prompt-style", "a1111", "--rng", "cuda", "--quiet"]
    assert main(["a (red:1.2) star", "--negative", "blue", "--seed", "5", "-o", "a.png", *options]) == 0
    text = Image.open("a.png").text["parameters"]
    assert main(["--again", png(tmp_path / "b.png", text), "--model", "shapes", "-o", "c.png", "--quiet"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("c.png").tobytes()
    assert read_settings("c.png")["rng"] == "cuda"

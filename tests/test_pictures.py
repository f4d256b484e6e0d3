"""Pictures in: beside diffusers' pipelines, and what a person gives as a picture."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sd
from sd.compare.reference import random_model
from sd.pictures import alpha_mask, extend, from_enlarged, read_picture
from sd.pictures.given import on_white
from sd.pictures.inversion import step_back
from sd.scheduler import SCHEDULERS
from sd.study.page import study_page
from tests.layouts import UNET, diffusers_images
from tests.test_sampler import pixels
from tests.test_solvers import config, theirs_of

PROMPT = "a red star above a blue ring"


@pytest.fixture(scope="module")
def inpainting():
    """A small model whose UNet takes 9 channels."""
    return random_model(unet=replace(UNET, in_channels=9))


def noise_picture(width=64, height=64, seed=0):
    g = np.random.default_rng(seed)
    coarse = Image.fromarray(g.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def square_mask(width=64, height=64, box=(16, 8, 48, 40), value=255):
    mask = Image.new("L", (width, height), 0)
    mask.paste(value, box)
    return mask


def theirs(model, kind, scheduler, steps, **options):
    return diffusers_images(model, theirs_of(config(scheduler)), kind=kind, num_inference_steps=steps, **options)


# DPM++ SDE draws its noise from a Brownian tree in diffusers, LCM and PNDM choose other timesteps in the middle, LMS
# starts with truncated weights of fourth order.
MIDDLE = sorted(SCHEDULERS.keys() - {"pndm", "lms", "dpmpp_sde", "lcm"})


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("scheduler", MIDDLE)
def test_img2img_is_that_of_diffusers(tiny, scheduler, strength):
    picture = noise_picture()
    options = {"image": picture, "strength": strength, "guidance_scale": 4.0}
    expected = theirs(tiny, "StableDiffusionImg2ImgPipeline", scheduler, 8, **options)
    got = sd.SimpleSampler(tiny)(PROMPT, seed=3, scheduler=scheduler, num_inference_steps=8, **options)
    # DPM2 and DPM2 a compute coefficients in another order, which float32 shows once in ten thousand pixels.
    assert np.abs(pixels(got) - pixels(expected)).max() <= (scheduler in ("dpm2", "dpm2_a"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])  # torch draws the same in all but float64
@pytest.mark.parametrize("scheduler", ["ddpm", "euler_a", "dpmpp_2m_sde"])
def test_noise_of_a_seed_in_other_dtypes_is_that_of_diffusers(scheduler, dtype):
    model = random_model(dtype=dtype)
    options = {"guidance_scale": 4.0, "height": 32, "width": 32}
    expected = theirs(model, "StableDiffusionPipeline", scheduler, 4, **options)
    got = sd.SimpleSampler(model)(PROMPT, seed=3, scheduler=scheduler, num_inference_steps=4, **options)
    difference = np.abs(pixels(got).astype(int) - pixels(expected))
    assert difference.max() == 0 if dtype == torch.float64 else difference.mean() < 2


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler_a", "dpmpp_2m", "heun", "unipc", "ddpm"])
def test_inpainting_is_that_of_diffusers(tiny, inpainting, channels, strength, scheduler):
    model = tiny if channels == 4 else inpainting
    options = {"image": noise_picture(), "mask_image": square_mask(), "strength": strength, "guidance_scale": 4.0}
    expected = theirs(model, "StableDiffusionInpaintPipeline", scheduler, 6, **options, height=64, width=64)
    call = {"num_inference_steps": 6, "scheduler": scheduler, "seed": 3}
    got = sd.SimpleSampler(model)(PROMPT, **call, **options, paste=False)
    assert np.array_equal(pixels(got), pixels(expected))


@pytest.mark.parametrize("scheduler", ["pndm", "lms"])
def test_the_middle_with_a_memory_begins_at_first_order(tiny, scheduler):
    """From the middle on PNDM and LMS have no history. Ours begins as Euler and DDIM do, with a step of first order;
    the same from a scheduler whose steps are counted from there by hand."""
    made = sd.make_scheduler(scheduler, 8)
    begin = made.begin(0.5)
    x0, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64).unbind()
    x = made.add_noise(x0, noise, begin)
    exact, _ = made.step(begin, noise, x, made.init_state())  # a prediction without error
    assert torch.allclose(exact, made.add_noise(x0, noise, begin + 1), atol=1e-5)
    steps = [s.timestep for s in sd.SimpleSampler(tiny).stream(
        PROMPT, scheduler=scheduler, num_inference_steps=8, image=noise_picture(), strength=0.5)]  # fmt: skip
    assert steps == list(made.timesteps[begin:])
    assert len(set(steps)) == len(steps)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9, 48, 49, 50])
def test_pndm_takes_no_step_twice_in_the_middle(count):
    made = sd.make_scheduler("pndm", 50)
    begin = made.begin(count / 50 + 1e-6)
    timesteps = made.timesteps[begin:]
    assert len(set(timesteps)) == len(timesteps) - (count == 50)


def test_an_image_is_the_same_alone_and_in_a_batch(tiny):
    options = {
        "image": noise_picture(),
        "mask_image": square_mask(),
        "num_inference_steps": 3,
        "scheduler": "euler_a",
    }
    sampler = sd.SimpleSampler(tiny)
    together = pixels(sampler([PROMPT, "a cross"], seed=4, num_images_per_prompt=2, **options))
    alone = pixels([sampler(p, seed=4 + i, **options)[0] for i, p in enumerate([PROMPT] * 2 + ["a cross"] * 2)])
    assert np.abs(together - alone).max() <= 1


def test_each_prompt_has_its_picture(tiny):
    pictures = [noise_picture(seed=k) for k in range(2)]
    call = {"num_inference_steps": 4, "strength": 0.3, "scheduler": "ddim"}
    sampler = sd.SimpleSampler(tiny)
    got = pixels(sampler([PROMPT, "a cross"], image=pictures, seed=7, num_images_per_prompt=2, **call))
    for i in range(4):
        (one,) = sampler([PROMPT, "a cross"][i // 2], image=pictures[i // 2], seed=7 + i, **call)
        assert np.abs(got[i] - np.asarray(one).astype(int)).max() <= 1


@pytest.mark.parametrize("variant", ["lean", "fast"])
@pytest.mark.parametrize("channels", [4, 9])
def test_other_samplers_draw_the_same(channels, variant):
    model = random_model(unet=replace(UNET, in_channels=channels), dtype=torch.float64)
    call = {"num_inference_steps": 3, "image": noise_picture(), "mask_image": square_mask(), "output_type": "pt"}
    expected = sd.SimpleSampler(model)(PROMPT, **call)
    sampler = sd.LeanSampler(model) if variant == "lean" else sd.SimpleSampler(sd.fast(model))
    assert (sampler(PROMPT, **call) - expected).abs().max() < 1e-10


def test_weights_of_nine_channels_draw_from_text_alone(inpainting):
    call = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}
    got = sd.SimpleSampler(inpainting)(PROMPT, seed=3, **call)
    white = Image.new("L", (64, 64), 255)
    whole = {"image": noise_picture(), "mask_image": white, "strength": 1.0}
    assert torch.equal(got, sd.SimpleSampler(inpainting)(PROMPT, seed=3, **call, **whole))


# ---- masks


def test_outside_of_the_mask_pixels_are_those_of_the_picture(tiny):
    picture, mask = noise_picture(), square_mask(box=(13, 9, 47, 42))
    (got,) = sd.SimpleSampler(tiny)(PROMPT, image=picture, mask_image=mask, num_inference_steps=2)
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(got)[outside], np.asarray(picture)[outside])
    (free,) = sd.SimpleSampler(tiny)(PROMPT, image=picture, mask_image=mask, num_inference_steps=2, paste=False)
    inner = np.s_[9 + 4 : 42 - 4, 13 + 4 : 47 - 4]  # beyond the seam
    assert np.abs(np.asarray(got)[inner].astype(int) - np.asarray(free)[inner]).max() <= 1
    assert not np.array_equal(np.asarray(got), np.asarray(free))


def test_grey_is_drawn_anew_in_the_last_of_the_steps(tiny):
    picture = noise_picture()
    z = []
    for value in (0.25, 0.5, 1.0):
        mask = torch.full((1, 1, 64, 64), value)
        mask[..., :8] = 1  # something is drawn from the first step on
        steps = list(
            sd.SimpleSampler(tiny).stream(
                PROMPT, image=picture, mask_image=mask, num_inference_steps=8, strength=1.0, scheduler="ddim"
            )
        )
        z.append([s.latents[0, :, :, 1:] for s in steps])
    same = [torch.equal(a, b) for a, b in zip(z[0], z[1], strict=True)]
    # After step k, k + 1 of 8 are done: a half is free from 4 on, a quarter from 6 on.
    assert same == [True] * 3 + [False] * 5
    assert not torch.equal(z[1][0], z[2][0])


def test_what_is_nearly_black_or_white_is_meant_to_be(tiny):
    hard, soft = square_mask(), square_mask(value=252)
    soft.putpixel((0, 0), 3)
    call = {"image": noise_picture(), "num_inference_steps": 2}
    images = [sd.SimpleSampler(tiny)(PROMPT, mask_image=mask, **call) for mask in (hard, soft)]
    assert np.array_equal(*map(pixels, images))


# ---- what a person gives


def test_every_mode_is_understood():
    grey = Image.new("L", (8, 8), 100)
    assert on_white(grey).getpixel((0, 0)) == (100, 100, 100)
    sixteen = Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16))
    assert on_white(sixteen).getpixel((0, 0)) == (100, 100, 100)
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert on_white(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = clear.convert("P")
    assert on_white(palette).mode == "RGB"
    assert on_white(Image.new("CMYK", (8, 8))).getpixel((0, 0)) == (255, 255, 255)
    assert on_white(Image.new("1", (8, 8), 1)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="floating-point pixels"):
        on_white(Image.new("F", (8, 8)))


def test_a_photograph_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (16, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (8, 16)
    picture.save(tmp_path / "b.jpg", exif=b"Exif\0\0garbage that is no header")
    assert read_picture(tmp_path / "b.jpg").size == (16, 8)  # nobody knows which side is up
    (tmp_path / "c.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"c\.jpg cannot be read"):
        read_picture(tmp_path / "c.jpg")


def test_arrays_are_pictures_too(tiny):
    picture = noise_picture()
    call = {"num_inference_steps": 2, "strength": 0.5}
    expected = pixels(sd.SimpleSampler(tiny)(PROMPT, image=picture, **call))
    for array in (np.asarray(picture), np.asarray(picture) / 255):
        assert np.array_equal(pixels(sd.SimpleSampler(tiny)(PROMPT, image=array, **call)), expected)
    mask = Image.fromarray(np.asarray(square_mask()).astype(np.int32))  # mode I, and yet of 8 bits
    assert np.asarray(on_white(mask)).max() == 255


def test_a_vae_that_overflows_is_named(tiny):
    model = random_model()
    model.vae.quant_conv.bias.data.fill_(float("nan"))
    with pytest.raises(sd.NotFiniteError, match="VAE's encoder returned NaN"):
        sd.SimpleSampler(model)(PROMPT, image=noise_picture(), num_inference_steps=2)


def test_sizes_that_do_not_fit(tiny):
    def size(**options):
        return sd.SimpleSampler(tiny)(PROMPT, num_inference_steps=2, strength=0.5, **options)[0].size

    assert size(image=noise_picture(70, 65)) == (64, 64)
    assert size(image=noise_picture(72, 40)) == (72, 40)
    assert size(image=noise_picture(5, 5)) == (64, 64)  # too small for a latent: the model's own size
    assert size(image=noise_picture(200, 100), width=64, height=64) == (64, 64)
    assert size(image=noise_picture(30, 30), width=64, height=48, mask_image=square_mask(30, 30, (5, 5, 20, 20))) == (
        64,
        48,
    )


def test_a_picture_that_is_a_little_too_large_is_cut_and_not_stretched(tiny):
    picture = noise_picture(70, 67)
    (got,) = sd.SimpleSampler(tiny)(
        PROMPT, image=picture, mask_image=square_mask(70, 67, (30, 30, 40, 40)), num_inference_steps=2
    )
    cut = np.asarray(picture)[1:65, 3:67]
    assert np.array_equal(np.asarray(got)[:20, :20], cut[:20, :20])


def test_transparency_as_a_mask(tiny):
    picture = noise_picture().convert("RGBA")
    picture.paste((0, 0, 0, 0), (16, 16, 48, 48))
    mask = alpha_mask(picture)
    assert mask.getpixel((20, 20)) == 255
    assert mask.getpixel((2, 2)) == 0
    (got,) = sd.SimpleSampler(tiny)(PROMPT, image=picture, mask_image=mask, num_inference_steps=2)
    assert np.array_equal(np.asarray(got)[:16], np.asarray(picture.convert("RGB"))[:16])
    with pytest.raises(ValueError, match="no transparency"):
        alpha_mask(noise_picture())


def test_a_larger_canvas(tiny):
    picture = noise_picture(64, 64)
    canvas, mask = extend(picture, left=32, top=8)
    assert canvas.size == mask.size == (96, 72)
    assert np.array_equal(np.asarray(canvas)[8:, 32:], np.asarray(picture))
    assert (np.asarray(mask)[:8] == 255).all()
    assert (np.asarray(mask)[16:, 40:] == 0).all()
    (got,) = sd.SimpleSampler(tiny)(PROMPT, image=canvas, mask_image=mask, num_inference_steps=2, strength=1.0)
    assert np.array_equal(np.asarray(got)[16:, 40:], np.asarray(picture)[8:, 8:])


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_image": square_mask()}, "give image as well"),
        ({"image": noise_picture(), "mask_image": square_mask(32, 32)}, "mask_image is 32 x 32 and image 64 x 64"),
        ({"image": noise_picture(), "mask_image": Image.new("L", (64, 64))}, "all black"),
        ({"image": noise_picture(), "strength": 0}, "nothing to draw"),
        ({"image": noise_picture(), "strength": 0.0}, "nothing to draw"),
        ({"image": noise_picture(), "strength": 1.2}, "strength must be"),
        ({"image": noise_picture(), "strength": -0.1}, "strength must be"),
        ({"image": noise_picture(), "strength": float("nan")}, "strength must be"),
        ({"image": noise_picture(), "strength": "much"}, "strength must be"),
        ({"image": noise_picture(), "strength": 0.3, "num_inference_steps": 2}, "of 2 steps leaves none"),
        ({"image": [noise_picture()] * 3}, "image has 3 pictures for 1 prompts"),
        ({"image": []}, "empty list"),
        ({"image": 5}, "image must be a picture"),
        ({"image": [[noise_picture()]]}, "list of lists|must be a picture"),
        ({"image": [noise_picture(64, 64), noise_picture(96, 64)]}, r"several sizes \(64 x 64 and 96 x 64\)"),
        ({"image": np.zeros((4, 4, 4, 4), np.uint8)}, "as an array must be"),
        ({"image": np.full((8, 8, 3), 7.0)}, "values from 0 to 1"),
        (
            {"image": noise_picture(), "mask_image": square_mask(box=(1, 1, 8, 8))},
            "between the cells of 8 x 8 pixels",
        ),
        ({"image": "nowhere.png"}, "cannot be read: No such file"),
        ({"image": __file__}, "is no picture"),
        ({"image": torch.zeros(1, 3, 60, 64)}, r"of shape \(images, 3, 56, 64\)"),
        ({"image": torch.full((1, 3, 64, 64), 2.0)}, "values from 0 to 1"),
        ({"image": noise_picture(), "mask_image": [square_mask()] * 2}, "2 masks for 1 pictures"),
        ({"image": noise_picture(), "mask_image": "nowhere.png"}, "mask_image nowhere.png cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        sd.SimpleSampler(tiny)(PROMPT, **{"num_inference_steps": 2} | options)


@pytest.mark.parametrize("sides", [{}, {"left": -1}, {"left": 9000}, {"top": 1.5}, {"top": True}])
def test_a_canvas_that_cannot_be(sides):
    with pytest.raises(ValueError, match=r"nothing to extend|whole number of pixels"):
        extend(noise_picture(), **sides)


# ---- the way back


def test_a_picture_is_inverted_and_drawn_again(shapes):
    picture = Image.new("RGB", (128, 128), (245, 245, 245))
    picture.paste((220, 40, 40), (40, 40, 80, 80))
    caption = "a small red square on a white background"
    sampler = sd.SimpleSampler(shapes)
    found = sd.invert(sampler, picture, caption, num_inference_steps=20)
    assert found.error < 2
    (again,) = sampler(caption, latents=found.latents, **found.call)
    assert np.abs(np.asarray(again).astype(int) - np.asarray(picture)).mean() < 2
    plain = sd.invert(sampler, picture, caption, num_inference_steps=5, rounds=1)
    better = sd.invert(sampler, picture, caption, num_inference_steps=5, rounds=6)
    assert better.error < plain.error


def test_a_step_back_is_undone_by_a_step():
    """With rounds enough, the step from what was found leads where it came from."""
    made = sd.make_scheduler("ddim", 5)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def denoiser(x, t):
        return 0.3 * torch.sin(x) + t[:, None, None, None] / 1000

    before = step_back(denoiser, made, 2, x, 60)
    t = torch.tensor([made.timesteps[2]])
    after, _ = made.step(2, denoiser(before, t), before, ())
    assert (after - x).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be"),
        ({"prompt": ["a", "b"]}, "One picture"),
        ({"image": 3}, "must be a picture"),
        ({"eta": 0.5}, "takes no argument eta"),
        ({"scheduler": "euler"}, "takes no argument scheduler"),
        ({"mask_image": square_mask()}, "takes no argument mask_image"),
    ],
)
def test_what_cannot_be_inverted(tiny, options, message):
    call = {"image": noise_picture(), "prompt": PROMPT} | options
    with pytest.raises(ValueError, match=message):
        sd.invert(sd.SimpleSampler(tiny), num_inference_steps=2, **call)


def test_weights_of_nine_channels_are_not_inverted(inpainting):
    with pytest.raises(ValueError, match="4 channels"):
        sd.invert(sd.SimpleSampler(inpainting), noise_picture(), PROMPT)


# ---- enlarged


@pytest.mark.parametrize("scale", [1, 0, 9, True, "two", float("nan")])
def test_a_scale_that_cannot_be(scale):
    with pytest.raises(ValueError, match="hires must be"):
        from_enlarged([noise_picture()], scale)


def test_pictures_are_enlarged_to_sizes_that_can_be_drawn():
    call = from_enlarged([noise_picture(64, 40)], 1.7)
    assert (call["width"], call["height"]) == (104, 64)
    assert call["image"][0].size == (104, 64)


# ---- under the instruments


@pytest.mark.parametrize("channels", [4, 9])
def test_a_trace_begins_where_the_loop_does(tiny, inpainting, channels):
    sampler = sd.SimpleSampler(tiny if channels == 4 else inpainting)
    call = {"image": noise_picture(), "mask_image": square_mask(), "num_inference_steps": 6, "strength": 0.5}
    with sd.study.attention_maps(sampler) as maps:
        found = sd.study.trace(sampler, "red", **call, scheduler="ddim")
    assert found.timesteps.tolist() == list(sd.make_scheduler("ddim", 6).timesteps[3:])
    assert found.x.shape == (3, 1, 4, 8, 8)
    assert torch.equal(found.latents, sampler("red", **call, scheduler="ddim", output_type="latent"))
    assert maps.word("red").shape == (64, 64)
    assert found.settings["strength"] == 0.5


def test_an_edit_acts_in_the_steps_that_are_taken(tiny):
    seen = []
    call = {"image": noise_picture(), "num_inference_steps": 6, "strength": 0.5, "scheduler": "ddim"}
    with sd.study.edit(tiny, {"middle_block": lambda out, at: seen.append(at.step)}):
        sd.SimpleSampler(tiny)(PROMPT, **call)
    assert seen == [0, 1, 2]


def test_the_page_shows_the_picture_that_is_drawn(tiny):
    call = {"image": noise_picture(), "mask_image": square_mask(), "num_inference_steps": 2}
    page, found = study_page(sd.SimpleSampler(tiny), "red", **call)
    assert len(found.timesteps) == 1
    (drawn,) = sd.SimpleSampler(tiny)("red", **call)
    file = io.BytesIO()
    drawn.save(file, "PNG")
    assert base64.b64encode(file.getvalue()).decode()[-200:] in page

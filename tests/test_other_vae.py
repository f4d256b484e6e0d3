"""Another VAE: files and folders of every layout, TAESD, and what of a model they leave as it was."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import sd
from sd.adapt.taesd import TinyVAE
from sd.cli import main
from sd.compare.comparison import compare_with_diffusers
from sd.compare.reference import SMALL_VAE, diffusers_scheduler
from sd.image import to_pil
from sd.weights import unread
from sd.weights.contents import format_info
from sd.weights.names import OLD_VAE_ATTENTION
from tests.layouts import (
    VAE,
    compvis_tensors,
    diffusers_unet,
    diffusers_vae,
    draw,
    hub_tensors,
    make_model,
    random_tensors,
    write_ckpt,
    write_tokenizer,
)

PREFIX = "first_stage_model."
CALL = {"num_inference_steps": 2, "output_type": "pt"}


@pytest.fixture(scope="module")
def other():
    """A model of the same sizes whose VAE has other weights."""
    model = make_model()
    shapes = {name: t.shape for name, t in model.vae.state_dict().items()}
    model.vae.load_state_dict(random_tensors(shapes, 77, torch.float32))
    return model


@pytest.fixture(scope="module")
def bare(other):
    return {name: t.clone() for name, t in other.vae.state_dict().items()}


def safe(path, tensors, metadata=None):
    path.parent.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def pt(path, content):
    torch.save(content, path)
    return path


def vae_folder(folder, model, inner="", old=False):
    """As stabilityai/sd-vae-ft-mse, or a whole repository of which only vae/ is there."""
    diffusers_vae(model).save_config(folder / inner)
    tensors = {name: t.contiguous() for name, t in hub_tensors(model)["vae"].items()}
    for new, before in OLD_VAE_ATTENTION.items() if old else ():
        tensors = {name.replace(f".{new}.", f".{before}."): t for name, t in tensors.items()}
    save_file(tensors, folder / inner / "diffusion_pytorch_model.safetensors")
    return folder


def hub_file(folder, model):
    """The weights without their config."""
    path = vae_folder(folder / "x", model) / "diffusion_pytorch_model.safetensors"
    return shutil.copy(path, folder / "vae.safetensors")


LEFT = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(2, 2),
        "model_ema.decay": torch.tensor(0.5), "model_ema.encoderconv_inweight": torch.ones(2)}  # fmt: skip
FORMS = {
    "bare names": lambda d, m, t: safe(d / "a.vae.safetensors", t),
    "prefixed": lambda d, m, t: safe(d / "a.vae.safetensors", {PREFIX + n: x for n, x in t.items()}),
    "inside state_dict": lambda d, m, t: pt(d / "a.vae.pt", {"epoch": 3, "state_dict": t | LEFT}),
    "with what training leaves": lambda d, m, t: pt(d / "a.vae.pt", t | LEFT),
    "a checkpoint's": lambda d, m, t: write_ckpt(d / "a.ckpt", compvis_tensors(m)),
    "a self-contained file's": lambda d, m, t: sd.save(m, d / "a.safetensors") or d / "a.safetensors",
    "a folder": lambda d, m, t: vae_folder(d / "hub", m),
    "a folder, older names": lambda d, m, t: vae_folder(d / "hub", m, old=True),
    "vae/ of a repository": lambda d, m, t: vae_folder(d / "hub", m, "vae"),
    "a file of the Hub's names": lambda d, m, t: hub_file(d, m),
    "the same beside its config": lambda d, m, t: vae_folder(d / "h", m) / "diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_layout_gives_the_same_vae(form, tiny, other, bare, tmp_path):
    source = FORMS[form](tmp_path, other, bare)
    before = {name: t.clone() for name, t in tiny.vae.state_dict().items()}
    model = sd.with_vae(tiny, source)
    state = model.vae.state_dict()
    assert state.keys() == bare.keys()
    assert all(torch.equal(state[name], bare[name]) for name in bare)
    assert model.vae.config == tiny.vae.config
    assert model.unet is tiny.unet
    assert model.text is tiny.text
    assert all(torch.equal(t, before[name]) for name, t in tiny.vae.state_dict().items())


def test_only_the_decoding_changes(tiny, other, bare, tmp_path):
    path = safe(tmp_path / "a.safetensors", bare)
    model = sd.with_vae(tiny, path)
    latents = draw(tiny)
    assert torch.equal(draw(model), latents)
    wanted = sd.SimpleSampler(other).decode(latents, "pt")
    assert torch.equal(sd.SimpleSampler(model).decode(latents, "pt"), wanted)
    assert torch.equal(sd.LeanSampler(model).decode(latents, "pt"), sd.LeanSampler(other).decode(latents, "pt"))
    assert model.hash == tiny.hash
    assert model.files.digest("vae")
    assert tiny.files.digest("vae") is None


def test_the_weights_stay_in_their_file_and_go_where_the_model_s_own_would(tiny, bare, tmp_path):
    path = safe(tmp_path / "a.safetensors", {name: t.half() for name, t in bare.items()})
    model = sd.with_vae(make_model(dtype=torch.float64), path)
    assert unread.target(model.vae) == (torch.device("cpu"), torch.float64)
    assert next(model.vae.parameters()).dtype == torch.float16
    sd.save(model, tmp_path / "b.safetensors")
    assert unread.target(model.vae)
    assert torch.equal(sd.load(tmp_path / "b.safetensors").vae.state_dict()["decoder.conv_in.weight"],
                       bare["decoder.conv_in.weight"].half().float())  # fmt: skip
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(sd.LoadError, match="has shrunk"):
        sd.SimpleSampler(model)("a", **CALL)


def test_a_built_in_model_takes_its_groups_and_scale_from_its_own(shapes, tmp_path):
    tensors = {name: t + 0.001 for name, t in shapes.vae.state_dict().items()}
    model = sd.with_vae(shapes, safe(tmp_path / "a.safetensors", tensors))
    assert model.vae.config == shapes.vae.config


# ---- a checkpoint without a VAE


def test_a_checkpoint_without_a_vae_is_loaded_with_one(tiny, other, bare, tmp_path):
    kept = {name: t for name, t in compvis_tensors(tiny).items() if not name.startswith(PREFIX)}
    path, vae = write_ckpt(tmp_path / "a.ckpt", kept), safe(tmp_path / "b.safetensors", bare)
    with pytest.raises(sd.LoadError, match=r"a\.ckpt has no VAE: .* give a VAE as vae= \(--vae\)\.$") as caught:
        sd.load(path)
    assert sd.info(path)["problem"] == str(caught.value)
    model = sd.load(path, vae=vae)
    wanted = sd.SimpleSampler(other).decode(draw(tiny), "pt")
    assert torch.equal(sd.SimpleSampler(model).decode(draw(tiny), "pt"), wanted)
    assert model.files.digest("vae")
    whole = sd.load(write_ckpt(tmp_path / "c.ckpt", compvis_tensors(tiny)), vae=vae)  # in place of its own
    assert torch.equal(whole.vae.state_dict()["decoder.conv_in.weight"], bare["decoder.conv_in.weight"])
    sd.convert(path, tmp_path / "d.safetensors", vae=vae, tokenizer=write_tokenizer(tmp_path / "t"))
    size = {"height": 64, "width": 64}  # a .ckpt does not tell
    assert torch.equal(draw(sd.load(tmp_path / "d.safetensors"), **CALL, **size), draw(other, **CALL))


# ---- TAESD


def tiny_vae(seed=3, **sizes):
    """diffusers' AutoencoderTiny with random weights at which nothing dies out."""
    from diffusers import AutoencoderTiny

    widths = (8,) * 4
    theirs = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths, **sizes).eval()
    shapes = {name: t.shape for name, t in theirs.state_dict().items()}
    theirs.load_state_dict({n: 1.15 * t for n, t in random_tensors(shapes, seed, torch.float32).items()})
    return theirs


def raw(tensors, half):
    """As TAESD itself saves a half: numbers of layers, and the decoder's first has no weights."""
    shift = int(half == "decoder")
    names = {n: n.removeprefix(f"{half}.layers.").split(".", 1) for n in tensors if n.startswith(half)}
    return {f"{int(number) + shift}.{rest}": tensors[n].clone() for n, (number, rest) in names.items()}


def raw_files(folder, theirs, ending="safetensors"):
    for half in ("encoder", "decoder"):
        write = safe if ending == "safetensors" else pt
        write(folder / f"taesd_{half}.{ending}", raw(theirs.state_dict(), half))
    return folder


@pytest.fixture(scope="module")
def theirs():
    return tiny_vae()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taesd") / "taesd"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tiny, folder):
    return sd.with_vae(tiny, folder)


TAESD = {
    "the Hub's folder": lambda d, v: v.save_pretrained(d / "t") or d / "t",
    "the Hub's file": lambda d, v: safe(d / "a.safetensors", v.state_dict()),
    "the decoder's file": lambda d, v: raw_files(d, v) / "taesd_decoder.safetensors",
    "the encoder's file": lambda d, v: raw_files(d, v, "pth") / "taesd_encoder.pth",
    "their folder": lambda d, v: raw_files(d, v, "pth"),
}


@pytest.mark.parametrize("form", TAESD)
def test_taesd_in_every_form(form, tiny, theirs, tmp_path):
    vae = sd.with_vae(tiny, TAESD[form](tmp_path, theirs)).vae
    wanted = theirs.state_dict()
    assert isinstance(vae, TinyVAE)
    assert vae.state_dict().keys() == wanted.keys()
    assert all(torch.equal(t, wanted[name]) for name, t in vae.state_dict().items())
    image = torch.rand(1, 3, 40, 64) * 2 - 1
    with torch.no_grad():
        latent = vae.encode(image, torch.Generator().manual_seed(0))
        assert torch.equal(latent, theirs.encode(image).latents)
        assert torch.equal(vae.decode(2 * latent), theirs.decode(2 * latent).sample)
        assert latent.std() > 0.3  # or tanh(x / 3) is as good as x
    with pytest.raises(ValueError, match="must be multiples of 8"):
        vae.encode(torch.zeros(1, 3, 12, 16))


def test_taesd_at_its_own_size_is_the_hub_s():
    from diffusers import AutoencoderTiny

    c = sd.VAEConfig(ch=64, ch_mult=(1,) * 4, num_res_blocks=3, scale_factor=1.0, num_groups=1)
    with torch.device("meta"):
        ours, hub = TinyVAE(c, sd.VAEConfig()), AutoencoderTiny()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in hub.state_dict().items()}
    assert sum(t.numel() for t in ours.parameters()) == 2_445_063


def pipeline(model, theirs, kind="StableDiffusionPipeline"):
    import diffusers

    parts = copy.deepcopy(theirs), None, None, diffusers_unet(model), diffusers_scheduler("ddim"), None, None
    pipe = getattr(diffusers, kind)(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = to_pil(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)))[0]
MASK = to_pil(torch.linspace(0, 1, 64).gt(0.5).float().expand(1, 3, 64, 64))[0]


@pytest.mark.parametrize(("kind", "options"), [
    ("StableDiffusionPipeline", {"height": 64, "width": 64}),
    ("StableDiffusionImg2ImgPipeline", {"image": PICTURE, "strength": 0.7}),
    ("StableDiffusionInpaintPipeline", {"image": PICTURE, "mask_image": MASK, "strength": 0.7, "height": 64,
        "width": 64}),
])  # fmt: skip
def test_whole_pictures_are_those_of_diffusers(kind, options, small, theirs):
    context = small.encode_prompt(["", "a red star"])
    call = {"num_inference_steps": 4, "guidance_scale": 3.0} | options
    call |= {"negative_prompt_embeds": context[:1], "prompt_embeds": context[1:]}
    (wanted,) = pipeline(small, theirs, kind)(generator=torch.Generator().manual_seed(3), **call).images
    (got,) = sd.SimpleSampler(small)(seed=3, scheduler="ddim", paste=False, **call)
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("way", [sd.LeanSampler, sd.ParallelSampler, lambda model: sd.SimpleSampler(sd.fast(model))])
def test_taesd_in_every_way(way, small):
    call = {"image": PICTURE, "output_type": "pt", "num_inference_steps": 3}
    wanted = sd.SimpleSampler(small)("a star", **call)
    torch.testing.assert_close(way(small)("a star", **call), wanted, atol=1e-4, rtol=1e-4)


def test_taesd_goes_over_to_diffusers(small):
    pipe = sd.to_diffusers(small)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    weight = pipe.vae.decoder.layers[0].weight
    assert weight.data_ptr() == small.vae.decoder.layers[0].weight.data_ptr()
    call = {"num_inference_steps": 2, "guidance_scale": 5.0}
    (theirs,) = pipe("a star", generator=torch.Generator().manual_seed(3), **call).images
    (ours,) = sd.SimpleSampler(small)("a star", seed=3, **call)
    assert ours.tobytes() == theirs.tobytes()
    with pytest.raises(sd.LoadError, match="AutoencoderTiny"):
        sd.from_diffusers(pipe)


def test_what_cannot_be_done_with_taesd_is_said(tiny, small, folder, theirs, tmp_path):
    with pytest.raises(sd.LoadError, match="TAESD for its VAE cannot be written"):
        sd.save(small, tmp_path / "a.safetensors")
    with pytest.raises(sd.LoadError, match=r"is TAESD, which stands in .* sd\.with_vae"):
        sd.load("shapes", vae=folder)
    half = sd.with_vae(tiny, safe(tmp_path / "taesd_decoder.safetensors", raw(theirs.state_dict(), "decoder")))
    assert torch.equal(
        sd.SimpleSampler(half).decode(draw(tiny), "pt"), sd.SimpleSampler(small).decode(draw(tiny), "pt")
    )
    with pytest.raises(ValueError, match="This TAESD has no encoder"):
        sd.SimpleSampler(half)("a", image=PICTURE, **CALL)


def test_after_taesd_another_vae_is_as_before_it(tiny, small, other, bare, tmp_path):
    model = sd.with_vae(small, safe(tmp_path / "a.safetensors", bare))
    assert model.vae.config == SMALL_VAE
    assert torch.equal(draw(model, **CALL), draw(other, **CALL))


def test_a_model_with_taesd_is_described(small):
    parts = sd.describe(small).parts
    assert parts["VAE decoder"][0].parameters == sum(p.numel() for p in small.vae.decoder.parameters())
    assert "VAE decoder" in str(sd.describe(small))
    assert [b.name for b in sd.describe(small).table("VAE decoder")][:2] == ["decoder.layers.0", "decoder.layers.1"]


# ---- what is refused, and what is told


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


BAD = {
    "SDXL's scale": (lambda d, m, t: with_config(vae_folder(d / "h", m), scaling_factor=0.13025),
        r"of another latent, with the scale 0.13025 and not 0.18215"),
    "16 channels": (lambda d, m, t: safe(d / "a.safetensors", make_of(z_channels=16)),
        "another latent, with 16 channels and not 4"),
    "another size": (lambda d, m, t: safe(d / "a.safetensors", make_of(ch_mult=(1, 2, 2))),
        "a 4th of the picture's edge"),
    "a newer kind": (lambda d, m, t: with_config(vae_folder(d / "h", m), shift_factor=0.1), "a newer kind"),
    "of another class": (lambda d, m, t: with_config(vae_folder(d / "h", m), _class_name="AutoencoderDC"),
        "it is a Aut"),
    "a surplus tensor": (lambda d, m, t: safe(d / "a.safetensors", t | {"encoder.x": torch.ones(1)}), "is surplus"),
    "a tensor less": (lambda d, m, t: safe(d / "a.safetensors", without(t, "decoder.conv_out.bias")),
        r"a tensor is missing \(decoder.conv_out.bias\)"),
    "no decoder": (lambda d, m, t: safe(d / "a.safetensors", without(t, "decoder")),
        "incomplete: tensor 'decoder.conv_in.weight'"),
    "an embedding": (lambda d, m, t: safe(d / "a.safetensors", {"emb_params": torch.ones(1, 64)}), "not recognised"),
    "no VAE in it": (lambda d, m, t: write_ckpt(d / "a.ckpt", without(compvis_tensors(m), "first_stage")),
        "Stable Diffusion v1 weights without a VAE"),
    "an empty folder": (lambda d, m, t: (d / "x").mkdir() or d / "x", "is a folder without a VAE"),
    "a folder of files": (lambda d, m, t: safe(d / "x/b.safetensors", t).parent,
        "give the path of b.safetensors in it"),
    "a missing file": (lambda d, m, t: d / "gone.vae.pt", "There is no file or folder .*: give a VAE's file"),
    "TAESD with 16 channels": (lambda d, m, t: safe(d / "a.safetensors", tiny_vae(latent_channels=16).state_dict()),
        "another latent, with 16 channels"),
    "TAESD of other blocks": (lambda d, m, t: safe(d / "a.safetensors",
        tiny_vae(num_decoder_blocks=(3, 2, 3, 1)).state_dict()), "a.safetensors, TAESD: a tensor is"),
    "TAESD with another activation": (lambda d, m, t: with_config(tiny_vae().save_pretrained(d / "t") or d / "t",
        act_fn="mish"), "its VAE has act_fn = 'mish'"),
    "TAESD's encoder alone": (lambda d, m, t: safe(d / "e.safetensors", raw(tiny_vae().state_dict(), "encoder")),
        "incomplete: tensor 'decoder.layers.0.weight'"),
}  # fmt: skip


def make_of(**sizes):
    return make_model(vae=sd.VAEConfig(**{**vars(VAE), **sizes})).vae.state_dict()


def without(tensors, word):
    return {name: t for name, t in tensors.items() if word not in name}


@pytest.mark.parametrize("name", BAD)
def test_another_vae_than_can_be_is_one_sentence(name, tiny, other, bare, tmp_path):
    write, says = BAD[name]
    source = write(tmp_path, other, bare)
    with pytest.raises(ValueError, match=says) as caught:
        sd.with_vae(tiny, source)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_one_that_is_sdxl_s_by_its_name_is_warned_of(tiny, bare, tmp_path):
    with pytest.warns(UserWarning, match="is for SDXL, by its name"):
        sd.with_vae(tiny, safe(tmp_path / "sdxl_vae.safetensors", bare))


@pytest.mark.parametrize("form", ["bare names", "inside state_dict", "a folder", "a file of the Hub's names"])
def test_info_says_what_it_is(form, other, bare, tmp_path):
    source = FORMS[form](tmp_path, other, bare)
    facts = sd.info(source)
    assert facts["kind"] == "a VAE of Stable Diffusion v1"
    assert list(facts["parts"]) == ["vae"]
    assert facts["parts"]["vae"]["config"]["ch"] == 32
    assert "--vae" in facts["problem"]
    with pytest.raises(ValueError, match="--vae") as caught:
        sd.load(source)
    assert facts["problem"] == str(caught.value)
    assert "VAE  " in format_info(facts)


@pytest.mark.parametrize("form", ["the Hub's folder", "the Hub's file", "the decoder's file"])
def test_info_knows_taesd(form, theirs, tmp_path):
    facts = sd.info(TAESD[form](tmp_path, theirs))
    assert facts["kind"] == "TAESD, a small VAE of Stable Diffusion v1"
    assert "--vae" in facts["problem"]


# ---- beside diffusers, layer by layer


def test_artist_compare_has_rows_of_taesd(theirs, tmp_path, capsys):
    folder = raw_files(tmp_path, theirs)
    options = ["--random", "small", "--size", "64", "--repeats", "0"]
    assert main(["compare", *options, "--vae", str(folder), "--only", "vae", "drawings"]) == 0
    out = capsys.readouterr().out
    assert "decoder.layers.17 " in out
    assert "vae.encoder (whole)" in out
    model = sd.with_vae(make_model(), folder)
    model.vae.decoder.layers[3].conv[2].register_forward_hook(lambda *args: args[-1] * 1.001)
    report = compare_with_diffusers(model, size=64, what=["vae"], repeats=0)
    assert "decoder.layers.3" in {row.name.removeprefix("vae.") for row in report.rows if row.over}
    half = safe(tmp_path / "x/taesd_decoder.safetensors", raw(theirs.state_dict(), "decoder"))
    decoder = sd.with_vae(make_model(), half)
    with pytest.raises(ValueError, match="TAESD's decoder alone cannot be compared"):
        compare_with_diffusers(decoder, size=64, what=["vae"], repeats=0)


def test_artist_compare_takes_another_vae(bare, tmp_path, capsys):
    path = str(safe(tmp_path / "a.safetensors", bare))
    assert (
        main(["compare", "--random", "small", "--vae", path, "--only", "vae", "--repeats", "0", "--size", "64"]) == 0
    )
    assert "decoder.up.2" in capsys.readouterr().out
    assert main(["compare", "a", "b", "--vae", path]) == 2
    assert "--vae only works in a comparison with diffusers" in capsys.readouterr().err

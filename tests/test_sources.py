"""Sources that look right and are not: options of another model, sizes that cannot be, damaged headers."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from safetensors.torch import save_file

import sd
from sd.compare.reference import transformers_tokenizer
from sd.text import TextConfig
from sd.weights.configs import config_of, fits
from tests.layouts import compvis_tensors, write_ckpt, write_hub, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def hub(tiny, folder):
    return write_hub(folder / "hub", tiny)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return write_tokenizer(folder / "tokenizer")


@pytest.fixture(scope="module")
def ckpt(tiny, folder):
    return write_ckpt(folder / "tiny.ckpt", compvis_tensors(tiny))


@pytest.fixture
def changed(hub):
    """The folder, with one of its configs changed for the length of a test."""
    before = {}

    def change(where, content):
        path = hub / where
        before.setdefault(path, path.read_text())
        path.write_text(json.dumps(json.loads(before[path]) | content) if isinstance(content, dict) else content)
        return hub

    yield change
    for path, content in before.items():
        path.write_text(content)


def refused(source, *words, **options):
    with pytest.raises(sd.LoadError) as caught:
        sd.load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        *(("unet/config.json", key, value) for key, value in {
            "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "act_fn": "gelu", "dropout": 0.1,
            "attention_type": "gated", "time_embedding_type": "fourier", "conv_in_kernel": 1,
            "downsample_padding": 0, "mid_block_scale_factor": 2, "resnet_skip_time_act": True,
            "resnet_out_scale_factor": 1.4, "mid_block_only_cross_attention": True, "an_option_of_tomorrow": 2,
            "block_out_channels": None, "layers_per_block": [1, 2, 2], "norm_num_groups": 7,
            "attention_head_dim": 5, "transformer_layers_per_block": [1, 2, 2],
        }.items()),
        *(("vae/config.json", key, value) for key, value in {
            "act_fn": "relu", "mid_block_add_attention": False, "use_quant_conv": False,
            "use_post_quant_conv": False, "scaling_factor": "x", "layers_per_block": 10**9,
        }.items()),
        *(("text_encoder/config.json", key, value) for key, value in {
            "hidden_act": "nothing", "num_attention_heads": 5, "num_hidden_layers": "x", "vocab_size": 10**12,
        }.items()),
        *(("scheduler/scheduler_config.json", key, value) for key, value in {
            "beta_schedule": "cosine", "beta_end": 0.0001, "num_train_timesteps": 1,
            "trained_betas": [0.1], "rescale_betas_zero_snr": "yes",
        }.items()),
    ],
)  # fmt: skip
def test_an_option_that_would_draw_otherwise_is_named(changed, where, key, value):
    ours = {"layers_per_block": "num_res_blocks", "norm_num_groups": "num_groups", "scaling_factor": "scale_factor"}
    ours |= {"attention_head_dim": "head", "transformer_layers_per_block": "transformer_depth"}
    refused(changed(where, {key: value}), ours.get(key, key))


def test_other_models_on_the_hub_are_named(changed):
    for content, name in (
        ({"cross_attention_dim": 2048}, "SDXL"),
        ({"in_channels": 8}, "InstructPix2Pix"),
    ):
        folder = changed("unet/config.json", content)
        refused(folder, f"it holds {name} weights")
        facts = sd.info(folder)  # describes it all the same
        assert f"it holds {name} weights" in facts["problem"]
        assert facts["parts"]["unet"]["tensors"] > 100


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '"x"', "\x00"])
def test_a_config_that_is_none(changed, content):
    refused(changed("unet/config.json", content), "no readable unet/config.json")


def test_the_blocks_must_mirror_each_other(changed):
    refused(changed("unet/config.json", {"up_block_types": ["UpBlock2D"] * 3}), "blocks")


def test_a_folder_with_tokenizer_json_alone(tiny, hub, tmp_path):
    """What save_pretrained of transformers 5 leaves; the model's own tokenizer must not be passed over."""
    folder = shutil.copytree(hub, tmp_path / "hub")
    shutil.rmtree(folder / "tokenizer")
    transformers_tokenizer(tiny.text).save_pretrained(folder / "tokenizer")
    model = sd.load(folder)
    assert torch.equal(model.encode_prompt("a star"), tiny.encode_prompt("a star"))


def test_a_folder_that_is_no_layout_says_what_to_give(ckpt, tokenizer):
    refused(ckpt.parent, "give the path of tiny.ckpt in it")
    refused(tokenizer, "give a weights file or another folder")


@pytest.mark.parametrize("source", [None, 3, b"shapes", "", "a\0b", ["shapes"]])
def test_what_is_no_source(source):
    refused(source)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"unet": {"num_heads": "x"}}, "num_heads"),
        ({"unet": {"num_heads": 0}}, "num_heads"),
        ({"unet": {"num_heads": 5}}, "num_heads"),
        ({"unet": {"num_groups": 7}}, "num_groups"),
        ({"unet": {"channel_mult": []}}, "channel_mult"),
        ({"unet": {"num_res_blocks": 10**9}}, "num_res_blocks"),
        ({"vae": {"num_groups": 7}}, "num_groups"),
        ({"vae": {"scale_factor": -1.0}}, "scale_factor"),
        ({"text": {"num_attention_heads": 7}}, "num_attention_heads"),
        ({"unet": {"nope": 1}}, "nope"),
        ({"unet": 3}, "of the form"),
        ({"nope": {}}, "of the form"),
        ("/no/such.json", "cannot be read"),
    ],
)
def test_a_config_that_cannot_be(ckpt, tokenizer, config, word):
    refused(ckpt, word, tokenizer=tokenizer, config=config)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float16", 3])
def test_a_dtype_that_cannot_be(ckpt, tokenizer, dtype, tmp_path):
    refused(ckpt, "dtype must be", tokenizer=tokenizer, dtype=dtype)
    with pytest.raises(sd.LoadError, match="dtype must be"):
        sd.convert(ckpt, tmp_path / "a.safetensors", dtype, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_tensors_of_integers_or_given_twice(tiny, tmp_path, tokenizer):
    tensors = compvis_tensors(tiny)
    path = tmp_path / "a.safetensors"
    save_file(tensors | {"model.diffusion_model.out.2.bias": torch.zeros(4, dtype=torch.int32)}, path)
    refused(path, "not of floating point (out.2.bias)", tokenizer=tokenizer)
    save_file(tensors | {"out.2.bias": torch.zeros(4)}, path)  # with its prefix and without
    refused(path, "surplus (out.2.bias)", tokenizer=tokenizer)
    save_file(tensors | {"scale_factor": torch.tensor(0.5)}, path)  # passed over, pictures would be wrong
    refused(path, "scale_factor", tokenizer=tokenizer)


@pytest.mark.parametrize(("part", "says"), [("unet", "give the folder around it"), ("vae", "(--vae)")])
def test_a_file_out_of_a_hub_folder(hub, part, says):
    refused(hub / part / "diffusion_pytorch_model.safetensors", says)


def test_damage_to_a_converted_file_is_refused_or_without_consequence(tiny, tmp_path):
    """Bits flipped in its header (names, shapes, config, tokenizer), and every kind of cut."""
    path = tmp_path / "a.safetensors"
    sd.save(tiny, path)
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    ours = whole.index(b'"__metadata__"')
    rng = random.Random(0)
    places = [rng.randrange(length) for _ in range(15)] + [ours + rng.randrange(600) for _ in range(25)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(7)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):  # and nothing else
            sd.load(path)
    for cut in (0, 7, 8, length - 1, length, length + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(sd.CheckpointError):
            sd.load(path)


@pytest.mark.parametrize("kind", [sd.UNetConfig, sd.VAEConfig, TextConfig])
def test_every_field_of_a_config_has_bounds(kind):
    """A field that is added needs its line in the tables of configs.py: without one nothing fits it."""
    for field in fields(kind):
        assert fits(field.name, field.default)
        for value in (None, "x", -1, 0, 1e30, 10**12, True, (1, "x"), [1], float("nan")):
            fitting = (value is None and field.default is None) or (field.name, value) == ("padding", 0)
            fitting |= isinstance(field.default, bool) and isinstance(value, bool)
            assert fits(field.name, value) == fitting, (field.name, value)


def test_sizes_that_fit_one_by_one_can_be_too_many_layers_together():
    with pytest.raises(sd.LoadError, match=r"cannot have [0-9,]+ layers"):
        config_of(sd.UNetConfig, {"transformer_depth": 64, "num_res_blocks": 16})
    config_of(sd.UNetConfig, {"transformer_depth": 10})  # SDXL's deepest


@pytest.mark.parametrize("kind", [sd.UNetConfig, sd.VAEConfig, TextConfig])
def test_configs_are_values(kind):
    """Equal where their fields are, usable as a key, and never changed under a model that was built by them."""
    assert kind() == kind()
    assert hash(kind()) == hash(kind())
    name = fields(kind)[0].name
    assert kind(**{name: 7}) != kind()
    with pytest.raises(FrozenInstanceError):
        setattr(kind(), name, 7)
    assert getattr(kind(), name) == fields(kind)[0].default

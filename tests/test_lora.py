"""LoRA and its kin: every kind in every dialect beside dense arithmetic, and what may be wrong with a file."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import sd
from sd.adapt.adapters import Adapted, Adapter
from sd.adapt.dialects import stems
from sd.text import CLIPText, TextConfig
from sd.weights.unread import patches_of, read_weights, target
from tests import loras
from tests.layouts import TEXT, make_model
from tests.loras import DIALECTS, KINDS, OF_CONVOLUTIONS, attention_of, layers_of, lora_tensors, write_lora

F64 = torch.float64
LINEAR = ("unet", "input_blocks.1.1.transformer_blocks.0.attn2.to_k")
CONV1 = ("unet", "input_blocks.1.1.proj_in")
CONV3 = ("unet", "output_blocks.0.0.in_layers.2")


@pytest.fixture(scope="module")
def wide():
    """A model of two levels less than the small one, in float64; leave it as it is."""
    unet = sd.UNetConfig(
        model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,), context_dim=64
    )
    return make_model(
        unet, sd.VAEConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1), replace(TEXT, num_hidden_layers=1), F64
    )


@pytest.fixture
def adapted(wide, tmp_path):
    """A function: the model with a LoRA of these tensors."""

    def make(tensors, metadata=None, model=wide, **options):
        return sd.lora(model, write_lora(tmp_path / "style.safetensors", tensors, metadata), **options)

    return make


def relative(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def outputs(model):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, model.unet.config.in_channels, 8, 8, generator=generator, dtype=F64)
    with torch.no_grad():
        context = model.encode_prompt(["a red star", "b"])
        return context, model.unet(x.to(model.dtype), torch.tensor([7.0, 400.0]), context)


def check(got, wanted, bound=1e-10):
    for ours, theirs in zip(outputs(got), outputs(wanted), strict=True):
        assert relative(ours, theirs) < bound


def weight(model, place):
    root = model.unet if place[0] == "unet" else model.text.model
    return read_weights(root).get_submodule(place[1]).weight


# ---- kinds


@pytest.mark.parametrize("place", [LINEAR, CONV1, CONV3], ids=["linear", "1x1", "3x3"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_dense_arithmetic(wide, adapted, kind, place):
    """Merged, and any rows and columns by themselves, as they are streamed."""
    if kind in OF_CONVOLUTIONS and place is not CONV3:
        pytest.skip("of convolutions of 3 x 3")
    tensors, wanted = lora_tensors(wide, [place], KINDS[kind])
    model = adapted(tensors)
    patch = patches_of(model.unet)[f"{place[1]}.weight"]
    w = wanted[place]
    base = loras.weight_of(wide, *place)
    columns = [slice(None)] if w.ndim > 2 else [slice(None), slice(0, 5), slice(11, w.shape[1])]
    for rows in (slice(None), slice(0, 1), slice(5, 17)):
        for cut in columns:
            piece = patch.add_(base[rows, cut].contiguous().clone(), rows, cut)
            assert relative(piece, w[rows, cut]) < 1e-10
    assert relative(weight(model, place), w) < 1e-10
    assert relative(w, base) > 0.01  # or nothing was tested


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_goes_from_the_weight_in_a_straight_line(wide, adapted, kind):
    """Of all kinds, DoRA too: our rule is ComfyUI's."""
    tensors, wanted = lora_tensors(wide, [CONV3], KINDS[kind])
    w, base = wanted[CONV3], loras.weight_of(wide, *CONV3)
    for scale in (0.4, -1.5):
        assert relative(weight(adapted(tensors, scale=scale), CONV3), base + scale * (w - base)) < 1e-10
    assert torch.equal(weight(adapted(tensors, scale=0), CONV3), base)


def test_norms_and_biases(wide, adapted):
    layer, norm = wide.unet.out[2], wide.unet.out[0]
    given = {
        "lora_unet_conv_norm_out.w_norm": loras.randn(32),
        "lora_unet_conv_norm_out.b_norm": loras.randn(32, seed=1),
    }
    given |= {"lora_unet_conv_out.diff": loras.randn(*layer.weight.shape, seed=2)}
    given |= {"lora_unet_conv_out.diff_b": loras.randn(4, seed=3)}
    given |= {"lora_te_text_model_final_layer_norm.w_norm": loras.randn(64, seed=4)}
    model = adapted(given, scale=0.5)
    read_weights(model.unet)
    for name, own, add in (
        ("out.0.weight", norm.weight, "conv_norm_out.w_norm"),
        ("out.0.bias", norm.bias, "conv_norm_out.b_norm"),
        ("out.2.weight", layer.weight, "conv_out.diff"),
        ("out.2.bias", layer.bias, "conv_out.diff_b"),
    ):
        torch.testing.assert_close(model.unet.get_parameter(name), own + 0.5 * given[f"lora_unet_{add}"])
    gain = read_weights(model.text.model).final_layer_norm.weight
    added = 0.5 * given["lora_te_text_model_final_layer_norm.w_norm"]
    torch.testing.assert_close(gain, wide.text.model.final_layer_norm.weight + added)


def test_a_bias_that_peft_trained(wide, adapted):
    tensors, _ = lora_tensors(wide, [CONV3], dialect="PEFT")
    name = "unet.up_blocks.0.resnets.0.conv1.lora_B"
    tensors = {n: t for n, t in tensors.items() if "alpha" not in n} | {f"{name}.bias": loras.randn(32)}
    model = adapted(tensors)
    bias = read_weights(model.unet).get_parameter(f"{CONV3[1]}.bias")
    torch.testing.assert_close(bias, wide.unet.get_parameter(f"{CONV3[1]}.bias") + tensors[f"{name}.bias"])


def test_a_convolution_of_nine_channels_takes_a_lora_for_four(adapted):
    nine = make_model(sd.UNetConfig(in_channels=9, model_channels=32, channel_mult=(1,), num_res_blocks=1,
                                    attention_resolutions=(), context_dim=64), dtype=F64)  # fmt: skip
    w = nine.unet.input_blocks[0][0].weight.detach()
    for kind in (loras.lora, loras.loha, loras.difference, loras.tucker):
        tensors, wanted = kind(w[:, :4].contiguous())
        model = adapted({f"lora_unet_conv_in.{word}": t for word, t in tensors.items()}, model=nine)
        got = read_weights(model.unet).input_blocks[0][0].weight
        assert relative(got[:, :4], wanted) < 1e-10
        assert torch.equal(got[:, 4:], w[:, 4:])


# ---- dialects


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_is_understood(wide, adapted, dialect):
    """UNet and text encoder beside a model in which the dense weights stand."""
    places = list(attention_of(wide))
    kind = loras.lora if "kohya" in dialect else loras.without_alpha
    tensors, wanted = lora_tensors(wide, places, kind, dialect)
    model = adapted(tensors)
    (adapter,) = model.adapters
    assert adapter.dialect == DIALECTS[dialect][2]
    assert len(adapter.matched) == len(places) == 8 * 4 + 4
    assert adapter.unmatched == []
    check(model, loras.with_weights(wide, wanted))
    assert relative(outputs(model)[1], outputs(wide)[1]) > 0.01


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr, second a product", "DoRA", "IA3", "GLoRA", "difference"])
def test_every_layer_may_be_changed(wide, adapted, kind):
    """All linear layers and convolutions of both parts, and the weights between them."""
    places = list(layers_of(wide, nn.Linear, nn.Conv2d))
    places = [p for p in places if p[1] not in ("input_blocks.0.0", "out.2")]  # whose 4 channels no 4 x 2 divides
    tensors, wanted = lora_tensors(wide, places, KINDS[kind], "kohya, CompVis names")
    model = adapted(tensors)
    check(model, loras.with_weights(wide, wanted), 1e-9)
    assert model.adapters[0].unmatched == []
    assert len(model.adapters[0].matched) == len(places)


def kohyas_names():
    """As networks/lora.py of kohya's scripts makes them, of diffusers' and transformers' own modules."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        text = CLIPTextModel(CLIPTextConfig(**sizes))
    found = []
    for prefix, root, kinds in (
        ("lora_unet", unet, {"Transformer2DModel"}),
        ("lora_te", text, {"CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}),
    ):
        for name, module in root.named_modules():
            if type(module).__name__ in kinds:
                for child_name, child in module.named_modules():
                    if isinstance(child, nn.Linear | nn.Conv2d):
                        path = f"{name}.{child_name}"
                        if prefix == "lora_te" and not path.startswith("text_model."):
                            path = f"text_model.{path}"
                        found.append((f"{prefix}.{path}".replace(".", "_"), tuple(child.weight.shape)))
    return found


@pytest.fixture(scope="module")
def full():
    """A model of the full size, without its numbers."""
    with torch.device("meta"):
        unet, text = sd.UNet(), CLIPText(TextConfig())
    model = make_model()
    return model.with_parts(unet, model.vae, model.text.with_model(text))


def test_all_modules_of_a_kohya_file_have_a_place(full):
    unet, text, model = full.unet, full.text.model, full
    table, found = stems(model), kohyas_names()
    assert (sum("unet" in n for n, _ in found), sum("te_" in n for n, _ in found)) == (192, 72)
    for name, shape in found:
        root = unet if table[name].part == "unet" else text
        wanted = tuple(root.get_submodule(table[name].module).weight.shape)
        assert shape in (wanted, wanted[:2])  # a projection may be linear there
    assert len({table[name] for name, _ in found}) == 192 + 72


def test_no_two_modules_have_one_name(full):
    """With _ for . two names might fall together: the table would be shorter than what went into it."""
    model, table = full, stems(full)
    for start in ("lora_unet_", "unet.", "lora_te_text_model_"):
        places = [place for name, place in table.items() if name.startswith(start)]
        part = model.unet if "unet" in start else model.text.model
        own = {n.rpartition(".")[0] for n, _ in part.named_parameters() if not n.startswith("embeddings")}
        assert {place.module for place in places} == own


# ---- PEFT's settings


@pytest.mark.parametrize("rslora", [False, True])
def test_scales_of_peft_stand_in_a_file_beside(wide, tmp_path, rslora):
    places = list(attention_of(wide))[:4]
    tensors, _ = lora_tensors(wide, places, loras.without_alpha, "PEFT alone")
    (tmp_path / "style").mkdir()
    write_lora(tmp_path / "style/adapter_model.safetensors", tensors)
    fields = {"lora_alpha": 6, "use_rslora": rslora, "alpha_pattern": {"attn1.to_k": 9, "^nothing$": 5}}
    (tmp_path / "style/adapter_config.json").write_text(loras.peft_config(**fields))
    for path in (tmp_path / "style", tmp_path / "style/adapter_model.safetensors"):
        model = sd.lora(wide, path)
        assert model.adapters[0].name == "style"
        for place in places:
            base, alpha = loras.weight_of(wide, *place), 9 if place[1].endswith("attn1.to_k") else 6
            up, down = (tensors[f"{loras.peft_alone(wide, *place)}.lora_{x}.weight"] for x in "BA")
            scale = alpha / (loras.RANK**0.5 if rslora else loras.RANK)
            assert relative(weight(model, place), base + scale * up @ down) < 1e-10


def test_scales_of_peft_stand_in_the_header(wide, adapted):
    places = [LINEAR, ("text", "encoder.layers.0.self_attn.q_proj")]
    tensors, _ = lora_tensors(wide, places, loras.without_alpha, "PEFT")
    header = {"unet.r": 3, "unet.lora_alpha": 12, "text_encoder.r": 3, "text_encoder.lora_alpha": 1.5}
    model = adapted(tensors, {"lora_adapter_metadata": json.dumps(header)})
    for place, scale in zip(places, (4, 0.5), strict=True):
        up, down = (tensors[f"{loras.dotted(wide, *place)}.lora_{x}.weight"] for x in "BA")
        assert relative(weight(model, place), loras.weight_of(wide, *place) + scale * up @ down) < 1e-10


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_alpha": float("nan")}, "alpha nan"),
        ({"lora_alpha": "six"}, "alpha 'six'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "only names of modules"),
        ({"alpha_pattern": [3]}, "no table"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
)
def test_settings_of_peft_that_cannot_be_followed(wide, tmp_path, fields, words):
    tensors, _ = lora_tensors(wide, [LINEAR], loras.without_alpha, "PEFT alone")
    write_lora(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(loras.peft_config(**fields))
    with pytest.raises(sd.LoadError, match=words.replace("(", r"\(")):
        sd.lora(wide, tmp_path)


# ---- the model that is given, and the one that is returned


def test_the_given_model_stays_as_it_is(wide, adapted):
    before = {n: t.clone() for n, t in wide.unet.state_dict().items()}
    hooks = [len(m._forward_pre_hooks) for m in wide.unet.modules()]
    wanted = outputs(wide)
    tensors, _ = lora_tensors(wide, list(attention_of(wide)))
    model = adapted(tensors)
    outputs(model)
    for got, was in zip(outputs(wide), wanted, strict=True):
        assert torch.equal(got, was)
    assert all(torch.equal(t, before[n]) for n, t in wide.unet.state_dict().items())
    assert [len(m._forward_pre_hooks) for m in wide.unet.modules()] == hooks
    assert not wide.adapters
    model.to(dtype=torch.float32)
    assert wide.dtype == F64
    assert {p.dtype for p in wide.vae.parameters()} == {F64}


def test_what_is_not_changed_is_shared(wide, adapted):
    tensors, wanted = lora_tensors(wide, [LINEAR, CONV3])
    model = adapted(tensors)
    outputs(model)
    changed = {f"{module}.weight" for _, module in wanted}
    for name, p in model.unet.named_parameters():
        assert (p.data_ptr() == wide.unet.get_parameter(name).data_ptr()) == (name not in changed)
    for ours, theirs in zip(model.vae.parameters(), wide.vae.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_two_both_act(wide, tmp_path):
    one, first = lora_tensors(wide, [LINEAR, CONV3], seed=1)
    two, second = lora_tensors(wide, [LINEAR, CONV1], KINDS["DoRA"], seed=2)
    paths = [write_lora(tmp_path / f"{n}.safetensors", t) for n, t in (("one", one), ("two", two))]
    base = {place: loras.weight_of(wide, *place) for place in (LINEAR, CONV1, CONV3)}
    for used in (False, True):  # the first one may have been merged by then
        model = sd.lora(wide, paths[0], 0.5)
        if used:
            outputs(model)
        both = sd.lora(model, paths[1], 0.25)
        assert [a.name for a in both.adapters] == ["one", "two"]
        assert [a.name for a in model.adapters] == ["one"]
        for place, w in base.items():
            added = 0.5 * (first.get(place, w) - w) + 0.25 * (second.get(place, w) - w)
            assert relative(weight(both, place), w + added) < 1e-10
            assert relative(weight(model, place), w + 0.5 * (first.get(place, w) - w)) < 1e-10


def test_the_same_file_twice_has_two_names(wide, tmp_path):
    path = write_lora(tmp_path / "style.safetensors", lora_tensors(wide, [LINEAR])[0])
    model = sd.lora(sd.lora(sd.lora(wide, path), path), path, name="mine")
    assert [a.name for a in model.adapters] == ["style", "style-2", "mine"]


def test_scales_of_parts(wide, adapted):
    place = ("text", "encoder.layers.0.mlp.fc1")
    tensors, wanted = lora_tensors(wide, [LINEAR, place])
    model = adapted(tensors, scale={"unet": 0.5})
    assert model.adapters[0].scale == {"unet": 0.5, "text": 0.0}
    w = loras.weight_of(wide, *LINEAR)
    assert relative(weight(model, LINEAR), w + 0.5 * (wanted[LINEAR] - w)) < 1e-10
    assert torch.equal(weight(model, place), loras.weight_of(wide, *place))


def test_weights_stay_in_their_file_until_the_part_is_used(wide, tmp_path, adapted):
    sd.save(wide, tmp_path / "half.safetensors", torch.float16)
    model = sd.load(tmp_path / "half.safetensors")
    tensors, _ = lora_tensors(wide, list(attention_of(wide)))
    tensors = {n: t.float() for n, t in tensors.items()}
    mine = adapted(tensors, model=model)
    for part in (model.unet, mine.unet, mine.text.model, mine.vae):
        assert {p.dtype for p in part.parameters()} == {torch.float16}
        assert target(part) is not None
    _, got = outputs(mine)
    assert {p.dtype for p in mine.unet.parameters()} == {torch.float32}
    assert type(mine.unet) is sd.UNet
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in mine.unet.modules())
    outputs(model)  # what the first one has read is not read again
    shared = [n for n, p in model.unet.named_parameters() if p.data_ptr() == mine.unet.get_parameter(n).data_ptr()]
    assert len(shared) == len(list(model.unet.parameters())) - 8 * 4
    whole = sd.load(tmp_path / "half.safetensors")
    read_weights(whole.unet)
    read_weights(whole.text.model)
    assert torch.equal(outputs(adapted(tensors, model=whole))[1], got)


def test_what_may_happen_to_an_unread_model(wide, tmp_path, adapted):
    """It is converted, copied and pickled with what the LoRA adds; a copy has scales of its own."""
    sd.save(wide, tmp_path / "half.safetensors", torch.float16)
    tensors, _ = lora_tensors(wide, list(attention_of(wide)))

    def fresh():
        return adapted(tensors, model=sd.load(tmp_path / "half.safetensors"))

    wanted = outputs(fresh())[1]
    assert torch.equal(outputs(fresh().to(dtype=F64).to(dtype=torch.float32))[1], wanted)
    for copied in (copy.deepcopy(fresh()), pickle.loads(pickle.dumps(fresh()))):
        assert torch.equal(outputs(copied)[1], wanted)
        with sd.study.scale(copied, "style", 0):
            assert not torch.equal(outputs(copied)[1], wanted)
        assert torch.equal(outputs(copied)[1], wanted)


def test_a_saved_model_has_it_merged(wide, adapted, tmp_path):
    tensors, _ = lora_tensors(wide, list(attention_of(wide)))
    model = adapted(tensors)
    sd.save(model, tmp_path / "merged.safetensors")
    again = sd.load(tmp_path / "merged.safetensors", dtype=F64)
    assert not again.adapters
    for ours, theirs in ((again.unet, model.unet), (again.text.model, model.text.model)):
        wanted = theirs.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.state_dict().items())


def test_a_fast_model_may_be_adapted_and_an_adapted_one_made_fast(wide, adapted, tmp_path):
    sd.save(wide, tmp_path / "half.safetensors", torch.float16)
    tensors, _ = lora_tensors(wide, list(attention_of(wide)))
    plain = sd.load(tmp_path / "half.safetensors")
    wanted = outputs(adapted(tensors, model=plain))[1]
    for make in (lambda m: sd.fast(adapted(tensors, model=m)), lambda m: adapted(tensors, model=sd.fast(m))):
        for got in (make(sd.load(tmp_path / "half.safetensors")), make(plain)):
            assert relative(outputs(got)[1], wanted) < 1e-5
            assert got.unet.ops is not plain.unet.ops
            assert len(got.adapters) == 1


def test_adapters_say_what_they_matched(wide, adapted):
    tensors, _ = lora_tensors(wide, [LINEAR, CONV3, ("text", "encoder.layers.0.mlp.fc1")])
    tensors["lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight"] = torch.ones(3, 3)
    with pytest.warns(UserWarning, match="1 tensors belong to no module of this model"):
        model = adapted(tensors, scale=0.5)
    (adapter,) = model.adapters
    assert isinstance(adapter, Adapter)
    assert adapter.matched == {f"{p}.{m}": "LoRA" for p, m in (LINEAR, CONV3, ("text", "encoder.layers.0.mlp.fc1"))}
    assert adapter.unmatched == ["lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight"]
    assert (adapter.ranks, adapter.kinds, adapter.scale) == ([3], ["LoRA"], 0.5)
    assert "changes 2 modules of the UNet and 1 of the text encoder" in str(adapter)
    assert "encoder_layers_11" in str(adapter)
    import hashlib

    assert adapter.digest == hashlib.sha256(adapter.file.path.read_bytes()).hexdigest()


def test_a_file_that_changes_while_it_is_in_use_is_one_sentence(wide, adapted):
    model = adapted(lora_tensors(wide, [LINEAR])[0])
    with open(model.adapters[0].file.path, "r+b") as file:
        file.truncate(100)
    with pytest.raises(sd.LoadError, match="has shrunk"):
        sd.SimpleSampler(model)("a", num_inference_steps=1)


# ---- bad input


def kohya_key(place, word="lora_down.weight"):
    return f"{loras.kohya_compvis(None, *place)}.{word}"


OTHERS = {
    "is for SDXL": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (3, 1280)},
    r"is for SDXL \(its text is 2048 wide\)": {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
        ".lora_down.weight": (3, 2048)},
    r"is for SD 2 \(its text is 1024 wide\)": {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_A"
        ".weight": (3, 1024)},
    r"is for Stable Diffusion v1 \(its text is 768 wide\)": {
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_b": (3, 768)},
    "is for SD 3 or Flux": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (3, 8)},
    "is for SD 3": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (3, 8)},
    "holds ControlNet weights, and no LoRA: give it with": {"control_model.input_hint_block.0.weight": (3, 3)},
    "is for ControlNet": {"lora_controlnet": (1,), "input_hint_block.0.weight": (3, 3)},
    "is no LoRA for this model: of 1 tensors none has a known name": {"something.weight": (3, 3)},
    "holds BOFT": {"lora_unet_conv_in.boft_R": (3, 3)},
    "holds OFT": {"lora_unet_conv_in.oft_blocks": (3, 3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("words", OTHERS)
def test_files_of_other_models_and_kinds_are_refused_by_name(adapted, words):
    with pytest.raises(sd.LoadError, match=words):
        adapted({name: torch.ones(shape) for name, shape in OTHERS[words].items()})


@pytest.mark.parametrize(
    ("metadata", "words"),
    [({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"), ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux")],
)
def test_a_file_that_says_it_is_of_another_model(wide, adapted, metadata, words):
    tensors, _ = lora_tensors(wide, [CONV3])
    with pytest.raises(sd.LoadError, match=f"is for {words}"):
        adapted(tensors, metadata)
    adapted(tensors, {"ss_base_model_version": "sd_v1"})


def test_a_model_is_no_lora(wide, adapted):
    from tests.layouts import compvis_tensors, hub_tensors

    for tensors in (compvis_tensors(wide), hub_tensors(wide)["unet"]):
        with pytest.raises(sd.LoadError, match="holds weights of a model, not a LoRA"):
            adapted(tensors)


DAMAGES = {
    "up and down are": lambda t: {n: x[:, :2] if n.endswith("up.weight") else x for n, x in t.items()},
    "down is missing": lambda t: {n: x for n, x in t.items() if not n.endswith("down.weight")},
    "has NaN or infinity": lambda t: {n: x / 0 if n.endswith("up.weight") else x for n, x in t.items()},
    "of this module is not": None,
    "alpha is": lambda t: t | {kohya_key(LINEAR, "alpha"): torch.ones(2)},
    "not of floating point": lambda t: {n: x.long() for n, x in t.items()},
    "nothing but alpha": lambda t: {n: x for n, x in t.items() if n.endswith("alpha")},
    "is not followed here": lambda t: t | {kohya_key(LINEAR, "lora_sideways.weight"): torch.ones(2)},
    "cannot be used alone": lambda t: t | {kohya_key(LINEAR, "on_input"): torch.ones(1)},
    "twice, as": lambda t: t | {f"{loras.kohya(make_model(), *LINEAR)}.alpha": torch.ones(())},
    "has no bias": lambda t: t | {kohya_key(LINEAR, "diff_b"): torch.ones(32)},
    "magnitudes for": lambda t: t | {kohya_key(LINEAR, "dora_scale"): torch.ones(5, 1)},
}


@pytest.mark.parametrize("words", [w for w, damage in DAMAGES.items() if damage])
def test_what_does_not_fit_is_one_sentence(wide, adapted, words):
    tensors, _ = lora_tensors(wide, [LINEAR], dialect="kohya, CompVis names")
    before = {n: t.clone() for n, t in wide.unet.named_parameters()}
    wanted = {"has no bias": "this layer has none"}.get(words, words)
    with pytest.raises(sd.LoadError, match=wanted) as error:
        adapted(DAMAGES[words](tensors))
    assert str(error.value).count(". ") == 0
    assert all(torch.equal(t, before[n]) for n, t in wide.unet.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_misshapen_tensors_of_any_kind_are_refused(wide, adapted, kind):
    """Each tensor in turn with an axis less, one more, or of other sizes: a sentence, never a traceback."""
    tensors, _ = lora_tensors(wide, [CONV3], KINDS[kind])
    for name, tensor in tensors.items():
        for other in (tensor.flatten()[0], tensor.flatten()[:1], tensor[None], torch.cat([tensor.flatten()] * 2)):
            if name.endswith(("alpha", "on_input")) and other.numel() == 1:
                continue
            try:
                adapted(tensors | {name: other})
            except sd.LoadError:
                continue
            assert other.numel() == tensor.numel(), name  # the same numbers in another shape may mean the same


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "much", True, None, {"vae": 1.0}, {"unet": "x"}])
def test_a_scale_is_a_finite_number(wide, adapted, scale):
    tensors, _ = lora_tensors(wide, [LINEAR])
    with pytest.raises(ValueError, match="scale"):
        adapted(tensors, scale=scale)


@pytest.mark.parametrize("path", ["", 3, None, "nowhere.safetensors", "."])
def test_what_is_no_file(wide, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"LoRA|does not exist"):
        sd.lora(wide, path)


def test_an_adapter_that_there_is_not(wide, adapted):
    with pytest.raises(ValueError, match=r"no adapter that is called 'b': it has style"):
        adapted(lora_tensors(wide, [LINEAR])[0]).adapters.named("b")
    assert Adapted  # named for the reader: what stands in `patches`

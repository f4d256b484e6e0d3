"""Words of one's own: every form of file, in every style, way to run and instrument, beside diffusers."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sd
from sd import study
from sd.adapt.own_words import LongerEmbedding, with_words_of_lora
from sd.compare.reference import transformers_text, transformers_tokenizer
from sd.prompts.styles import chunks_of
from sd.prompts.tokenizer import Tokenizer
from sd.prompts.words import find_word, words_of
from sd.weights import unread
from sd.weights.contents import format_info
from sd.weights.tokenizer import MARK
from tests.layouts import (
    compvis_tensors,
    diffusers_unet,
    diffusers_vae,
    draw,
    make_model,
    write_ckpt,
    write_tokenizer,
)
from tests.loras import attention_of, lora_tensors, write_lora

WIDTH = 64
VECTORS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))


def pt(path, content):
    torch.save(content, path)
    return path


def safe(path, tensors):
    save_file(tensors, path)
    return path


def a1111(param, **more):
    return {"string_to_token": {"*": 265}, "string_to_param": param, "step": 5, "sd_checkpoint": None, **more}


OLD = nn.ParameterDict({"*": nn.Parameter(VECTORS)})  # as the paper's code saves it
LORA = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, WIDTH)}
FORMS = {  # what is written -> the words that it is used by, and those that it is not
    "AUTOMATIC1111": (lambda d: pt(d / "Style-7.pt", a1111({"*": VECTORS}, name="other")), ["Style-7", "other"], []),
    "of the paper": (lambda d: pt(d / "style.pt", a1111(OLD)), ["style"], []),
    "diffusers, .bin": (lambda d: pt(d / "learned_embeds.bin", {"<cat-toy>": VECTORS}), ["<cat-toy>"],
        ["learned_embeds"]),
    "diffusers, by the file's name": (lambda d: pt(d / "toy.bin", {"<cat-toy>": VECTORS}), ["<cat-toy>", "toy"], []),
    "diffusers, beside a common word": (lambda d: pt(d / "star.bin", {"<x>": VECTORS}), ["<x>"], ["star"]),
    "diffusers, .safetensors": (lambda d: safe(d / "b-c.safetensors", {"<Cat>": VECTORS}), ["<Cat>", "<cat>", "b-c"],
        []),
    "emb_params": (lambda d: safe(d / "my word.safetensors", {"emb_params": VECTORS}), ["my word", "MY  Word"], []),
    "a common word": (lambda d: safe(d / "star.safetensors", {"emb_params": VECTORS}), ["star", "Star"], ["stars"]),
    "in a LoRA": (lambda d: safe(d / "lora.safetensors", LORA | {"bundle_emb.a.b.string_to_param.*": VECTORS}),
        ["a.b"], ["lora"]),
    "in a LoRA, by diffusers' form": (lambda d: safe(d / "lora.safetensors", LORA | {"bundle_emb.ab.x": VECTORS}),
        ["ab"], ["x"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def owned(tiny, tmp_path_factory):
    """The tiny model with <cat>, of three vectors, and <dog>, of one."""
    folder = tmp_path_factory.mktemp("owned")
    cat, dog = pt(folder / "cat-toy.bin", {"<cat>": VECTORS}), pt(folder / "d.bin", {"<dog>": -VECTORS[0]})
    return sd.textual_inversion(sd.textual_inversion(tiny, cat), dog)


def rows(model, text):
    """What the model takes for the tokens of a text."""
    return model.text.model.embeddings.token_embedding(torch.tensor(model.text.ids(text)[1:-1]))


# ---- files


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_used_by_its_words(form, tiny, tmp_path):
    write, words, others = FORMS[form]
    model = sd.textual_inversion(tiny, write(tmp_path))
    for word in words:
        assert torch.equal(rows(model, word), VECTORS)
        assert torch.equal(rows(model, f"a {word}, {word}.")[1:4], VECTORS)
    for word in others:
        assert model.text.ids(word) == tiny.text.ids(word)
    assert model.text.ids("a red star"[:5]) == tiny.text.ids("a red star"[:5])


@pytest.mark.parametrize("vectors", [VECTORS[0], VECTORS[:1], VECTORS[0].half(), VECTORS[0].double()])
def test_one_vector_is_one_token(vectors, tiny, tmp_path):
    model = sd.textual_inversion(tiny, pt(tmp_path / "a.bin", {"<cat>": vectors}))
    assert torch.equal(rows(model, "<cat>"), vectors.reshape(1, -1).float())


def test_a_word_may_be_called_otherwise(tiny, tmp_path):
    path = pt(tmp_path / "a.bin", {"<cat>": VECTORS})
    model = sd.textual_inversion(tiny, path, word="<dog>")
    assert torch.equal(rows(model, "<dog>"), VECTORS)
    assert model.text.ids("<cat> a.b") == tiny.text.ids("<cat> a.b")


def test_a_word_of_letters_is_found_as_a_whole_word(tiny, tmp_path):
    model = sd.textual_inversion(tiny, pt(tmp_path / "bad.pt", a1111({"*": VECTORS[:1]})))
    assert 517 in model.text.ids("(bad), a-bad")
    assert 517 not in model.text.ids("badminton forbad bad_hand")


def test_two_files_of_one_inner_name_are_used_by_their_own(tiny, tmp_path):
    """As after 500 and after 1000 steps of AUTOMATIC1111's training."""
    model = sd.textual_inversion(tiny, pt(tmp_path / "a-500.pt", a1111({"*": VECTORS}, name="my-own")))
    with pytest.warns(UserWarning, match="called 'a-1000' in prompts, not 'my-own'"):
        model = sd.textual_inversion(model, pt(tmp_path / "a-1000.pt", a1111({"*": -VECTORS}, name="my-own")))
    assert torch.equal(rows(model, "a-500 a-1000 my-own"), torch.cat([VECTORS, -VECTORS, VECTORS]))


BAD = {
    "a.safetensors": ({"clip_l": VECTORS, "clip_g": torch.ones(3, 1280)}, "is an embedding of SDXL"),
    "b.safetensors": (
        {"emb_params": torch.ones(1, 768)},
        "vectors of 768 numbers for the word 'b', and the text enc",
    ),
    "c.safetensors": ({"emb_params": torch.ones(76, WIDTH)}, "where 1 to 75 vectors are expected"),
    "d.safetensors": ({"emb_params": torch.full((1, WIDTH), torch.nan)}, "NaN or infinity"),
    "e.safetensors": ({"emb_params": torch.ones(1, WIDTH, dtype=torch.int32)}, "in no form that is known"),
    "f.safetensors": (LORA, "no embedding but LoRA weights"),
    "g.safetensors": ({"x.weight": torch.ones(2, WIDTH)}, "in no form that is known"),
    "h.safetensors": ({"a": torch.ones(1, 1, WIDTH)}, "in no form that is known"),
    "i.safetensors": ({"<cat>": VECTORS}, "needs the word '<cat>', and there is an embedding of that word already"),
    "j.safetensors": ({"<CAT>": VECTORS}, "needs the word '<cat>', and there"),
    "k.safetensors": ({"<dog>_1": VECTORS}, "would be read as one more vector of the word '<dog>'"),
    "l.safetensors": ({"<cat>_3": VECTORS}, "would be read as one more vector of the word '<cat>'"),
    "m.safetensors": ({"<|endoftext|>": VECTORS}, "gives no word that could stand in a prompt"),
    "n.safetensors": ({" ": VECTORS}, "gives no word that could stand in a prompt"),
    "o.safetensors": ({"x" * 2000: VECTORS}, "has a word that cannot be added"),
    "p.safetensors": (LORA | {"bundle_emb.a.clip_l": VECTORS}, "is an embedding of SDXL"),
    "?.safetensors": ({"emb_params": torch.ones(1, WIDTH)}, r"has the word '\?', which is a letter or a sign"),
    "t.safetensors": ({"emb_params": torch.ones(1, WIDTH)}, "has the word 't', which is a letter or a sign"),
    "q.pt": (a1111({"*": VECTORS, "+": VECTORS[:, :3]}), "in no form that is known"),
    "r.pt": (a1111({}), "no tensors"),
    "s.pt": (a1111(3), "no dict of tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_sentence(name, owned, tmp_path):
    content, says = BAD[name]
    path = safe(tmp_path / name, content) if name.endswith("safetensors") else pt(tmp_path / name, content)
    before = owned.text.texts, len(owned.text.state_dict()["embeddings.token_embedding.weight"])
    with pytest.raises(ValueError, match=says) as caught:
        sd.textual_inversion(owned, path)
    assert str(caught.value).endswith(".")
    assert str(caught.value).isprintable()
    assert (owned.text.texts, len(owned.text.state_dict()["embeddings.token_embedding.weight"])) == before


def test_a_word_that_others_number_is_left_alone(tiny, tmp_path):
    model = sd.textual_inversion(tiny, pt(tmp_path / "a_1.bin", {"a_1": VECTORS}))
    with pytest.raises(ValueError, match="needs the word 'a_1'"):
        sd.textual_inversion(model, pt(tmp_path / "learned_embeds.bin", {"a": VECTORS[:1]}))


# ---- the model that is given


def test_the_given_model_stays_and_its_table_is_shared(tiny, owned, tmp_path):
    before = {name: t.clone() for name, t in tiny.text.state_dict().items()}
    again = sd.textual_inversion(tiny, pt(tmp_path / "a.bin", {"<cat>": VECTORS}))
    table = again.text.model.embeddings.token_embedding
    assert isinstance(table, LongerEmbedding)
    for model in (again, owned):
        ours, theirs = dict(model.text.model.named_parameters()), dict(tiny.text.model.named_parameters())
        assert {name: p.data_ptr() for name, p in ours.items() if name in theirs} == {
            name: p.data_ptr() for name, p in theirs.items()
        }
    assert all(torch.equal(t, before[name]) for name, t in tiny.text.state_dict().items())
    assert tiny.text.config.vocab_size == 517
    assert torch.equal(owned.encode_prompt("a red star"), tiny.encode_prompt("a red star"))
    call = {"num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(sd.SimpleSampler(owned)("a", **call), sd.SimpleSampler(tiny)("a", **call))


def test_weights_that_are_in_their_file_stay_there(tiny, owned, tmp_path):
    sd.save(tiny, tmp_path / "half.safetensors", torch.float16)
    given = sd.load(tmp_path / "half.safetensors")
    path = pt(tmp_path / "a.bin", {"<cat>": VECTORS})
    model = sd.textual_inversion(given, path)
    for each in (given, model):
        assert unread.target(each.text.model) == (torch.device("cpu"), torch.float32)
    lean = sd.LeanSampler(model)
    from_file = lean.encode_prompt(["a <cat>"])
    assert unread.target(model.text.model)  # still
    assert torch.equal(rows(model, "<cat>"), VECTORS)  # not rounded to the file's half precision
    assert unread.target(model.text.model) is None
    assert unread.target(given.text.model)
    assert not any(m._forward_pre_hooks or m._state_dict_pre_hooks for m in model.text.model.modules())
    torch.testing.assert_close(from_file, model.encode_prompt("a <cat>"), atol=1e-5, rtol=1e-5)
    sd.save(sd.textual_inversion(given, path), tmp_path / "b.safetensors")
    saved = sd.load(tmp_path / "b.safetensors")
    assert torch.equal(saved.encode_prompt("a <cat>"), model.encode_prompt("a <cat>"))
    whole = make_model().to(dtype=torch.float16)
    assert torch.equal(sd.textual_inversion(whole, path).encode_prompt("<cat>").half(),
                       sd.textual_inversion(whole, path).encode_prompt("<cat>"))  # fmt: skip


def test_the_table_is_one_for_everybody_else(owned):
    state = owned.text.state_dict()
    assert state["embeddings.token_embedding.weight"].shape == (517 + 8, WIDTH)
    assert "embeddings.token_embedding.more" not in state
    copied = copy.deepcopy(owned.text.model)
    with torch.no_grad():
        copied.embeddings.token_embedding.more.zero_()
        copied.load_state_dict(state)
    ids = torch.tensor([owned.text.ids("a <cat>, <dog> star")])
    assert torch.equal(copied(ids), owned.text.model(ids))
    assert torch.equal(transformers_text(owned.text)(ids)[0], owned.text.model(ids))


# ---- prompts


def test_tokens_are_those_of_diffusers(owned):
    from diffusers import StableDiffusionPipeline

    theirs, pipe = transformers_tokenizer(owned.text), object.__new__(StableDiffusionPipeline)
    for prompt in ("a <cat>", "<cat><cat> <dog>x", "star<cat>star, <dog>", "a (<cat>)", ""):
        converted = pipe.maybe_convert_prompt(prompt, theirs)
        assert owned.text.ids(prompt) == theirs(converted).input_ids


def test_a_repository_s_word_of_several_vectors_too(owned, tmp_path):
    """A pipeline that diffusers saved after load_textual_inversion has <cat>, <cat>_1, ... in its tokenizer."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    transformers_tokenizer(owned.text).save_pretrained(folder)
    path = write_ckpt(tmp_path / "a.ckpt", compvis_tensors(owned))
    model = sd.load(path, tokenizer=folder)
    assert torch.equal(model.encode_prompt("a <cat> star"), owned.encode_prompt("a <cat> star"))


@pytest.mark.parametrize("style", ["a1111", "comfy", "compel"])
def test_vectors_are_kept_together_at_the_end_of_a_chunk(style, tiny, tmp_path):
    word = sd.textual_inversion(tiny, pt(tmp_path / "a.bin", {"<cat>": torch.randn(20, WIDTH)})).text
    ids, weighted = word.ids("<cat>")[1:-1], {"compel": "(<cat>)1.3"}.get(style, "(<cat>:1.3)")
    for before in (54, 55, 56, 70, 75, 76):
        for text in (f"{'a ' * before}<cat> b", f"{'a ' * before}{weighted} b", f"{'a ' * (before - 1)}, <cat> b"):
            chunks = [chunk.ids for chunk in word.chunks(text, style)]
            (place,) = [(k, chunk.index(ids[0])) for k, chunk in enumerate(chunks) if ids[0] in chunk]
            assert list(chunks[place[0]][place[1] : place[1] + 20]) == ids
            if style != "compel":  # which ends a chunk after a word, too, if need be
                assert place == ((0, before + 1) if before <= 55 else (1, 1 + before % 75 if before > 75 else 1))
            weights = word.chunks(text, style)[place[0]].weights[place[1] :][:20]
            assert set(weights) == {1.3 if "1.3" in text else 1.0}


@pytest.mark.parametrize("style", ["a1111", "comfy", "compel"])
def test_a_repository_s_word_that_no_chunk_can_hold(style, tiny):
    words = [{"id": 517 + i, "content": f"<x>_{i}" if i else "<x>", **MARK} for i in range(76)]
    tokenizer = Tokenizer({**tiny.text.texts, "added_tokens.json": json.dumps(words)})
    with pytest.raises(ValueError, match="The word '<x>' has 76 vectors, and a chunk has room for 75"):
        chunks_of("a <x> b", style, tokenizer)


def test_a_comma_still_ends_a_chunk(tiny, tmp_path):
    """Where the tokens of a word after it filled the chunk, they move to the next one together."""
    word = sd.textual_inversion(tiny, pt(tmp_path / "a.bin", {"<cat>": torch.randn(5, WIDTH)})).text
    chunks = word.chunks(f"{'a ' * 69}, <cat> b", "a1111")
    inside = [[i for i in chunk.ids[1:] if i != chunk.ids[-1]] for chunk in chunks]
    assert [len(part) for part in inside] == [70, 6]
    assert inside[1][:5] == word.ids("<cat>")[1:-1]


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("a embedding:<cat>, star", "a <cat>, star"),
        ("embedding:<Cat>.pt star", "<cat> star"),
        ("(embedding:d:1.2)", "(<dog>:1.2)"),  # by its file's name, which is a common word
        ("a embedding:cat-toy b", "a <cat> b"),
    ],
)
def test_comfy_s_way_to_write_a_word(text, means, owned):
    assert torch.equal(owned.encode_prompt(text, "comfy"), owned.encode_prompt(means, "comfy"))


def test_a_word_that_is_not_there_is_named(owned):
    with pytest.raises(ValueError, match=r"'embedding:nothing', and there is no such word: .*--embedding"):
        owned.encode_prompt("a embedding:nothing", "comfy")


def test_words_are_no_strangers_to_a_model_of_few_words(shapes, recwarn, tmp_path):
    width = shapes.text.config.hidden_size
    model = sd.textual_inversion(shapes, pt(tmp_path / "gizmo.pt", a1111({"*": torch.randn(2, width)})))
    model.encode_prompt("a red gizmo")
    model.encode_prompt("a red embedding:gizmo", "comfy")
    assert not recwarn.list
    sd.save(model, tmp_path / "a.safetensors")
    sd.load(tmp_path / "a.safetensors").encode_prompt("a red gizmo")
    assert not recwarn.list


# ---- beside diffusers, in other ways, under instruments


@pytest.mark.parametrize(("content", "prompt"), [
    ({"<cat>": VECTORS}, "a <cat> above a <cat>, star"),
    ({"<cat>": VECTORS[0]}, "a <cat> star"),
    (a1111({"*": VECTORS}, name="my-own"), "a my-own star"),
])  # fmt: skip
def test_whole_pictures_are_those_of_diffusers(content, prompt, tiny, tmp_path):
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers_vae(tiny),
        text_encoder=copy.deepcopy(transformers_text(tiny.text)),  # it is changed in place
        tokenizer=transformers_tokenizer(tiny.text),
        unet=diffusers_unet(tiny),
        scheduler=sd.compare.reference.diffusers_scheduler("ddim"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.config.vocab_size = 517
    path = pt(tmp_path / "learned_embeds.bin", content)
    pipe.load_textual_inversion(str(tmp_path))
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64}
    (theirs,) = pipe(prompt, generator=torch.Generator().manual_seed(3), **call).images
    (ours,) = sd.SimpleSampler(sd.textual_inversion(tiny, path))(prompt, seed=3, scheduler="ddim", **call)
    assert ours.tobytes() == theirs.tobytes()
    (plain,) = sd.SimpleSampler(tiny)(prompt, seed=3, scheduler="ddim", **call)
    assert plain.tobytes() != ours.tobytes()


def test_it_goes_over_to_diffusers(owned):
    pipe = sd.to_diffusers(owned)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 5.0}
    (theirs,) = pipe("a <cat> and a <dog>", generator=torch.Generator().manual_seed(3), **call).images
    (ours,) = sd.SimpleSampler(owned)("a <cat> and a <dog>", seed=3, **call)
    assert ours.tobytes() == theirs.tobytes()
    back = sd.from_diffusers(pipe)
    assert torch.equal(back.encode_prompt("a <cat> and a <dog>"), owned.encode_prompt("a <cat> and a <dog>"))


def test_after_save_and_convert_it_draws_the_same(owned, tmp_path):
    sd.save(owned, tmp_path / "a.safetensors")
    sd.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    wanted = draw(owned, "a <cat> and a <dog>")
    for name in "ab":
        model = sd.load(tmp_path / f"{name}.safetensors")
        assert torch.equal(draw(model, "a <cat> and a <dog>"), wanted)
        more = sd.textual_inversion(model, pt(tmp_path / "c.bin", {"<fox>": VECTORS}))
        assert torch.equal(draw(more, "a <cat> and a <dog>"), wanted)
        assert torch.equal(rows(more, "<fox>"), VECTORS)


@pytest.mark.parametrize("way", [sd.LeanSampler, sd.ParallelSampler, lambda model: sd.SimpleSampler(sd.fast(model))])
def test_in_every_way(way, owned):
    for style in ("plain", "a1111", "comfy", "compel"):
        wanted = draw(owned, "a <cat> and (a <dog>:1.1)", prompt_style=style)
        got = draw(owned, "a <cat> and (a <dog>:1.1)", sampler=way, prompt_style=style)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.equal(wanted, draw(owned, "a (cat) and (a <dog>:1.1)", prompt_style=style))


@pytest.mark.parametrize("form", ["in memory", "in its file"])
def test_beside_a_lora_in_either_order(form, tiny, tmp_path):
    model, modules = tiny, [place for place in attention_of(tiny) if place[0] == "text"]
    if form == "in its file":
        sd.save(tiny, tmp_path / "half.safetensors", torch.float16)
        model = sd.load(tmp_path / "half.safetensors")
    tensors, _ = lora_tensors(tiny, modules)
    adapter = write_lora(tmp_path / "style.safetensors", tensors | {"bundle_emb.<cat>.string_to_param.*": VECTORS})
    first, second = sd.textual_inversion(sd.lora(model, adapter), adapter), sd.lora(model, adapter)
    second = with_words_of_lora(second)
    third = sd.lora(sd.textual_inversion(model, adapter), adapter)
    lean = [sd.LeanSampler(each).encode_prompt(["a <cat>"]) for each in (first, second, third)]
    wanted = first.encode_prompt("a <cat>")
    for each in (second, third):
        assert torch.equal(each.encode_prompt("a <cat>"), wanted)
    for each in lean:
        torch.testing.assert_close(each, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sd.textual_inversion(model, adapter).encode_prompt("a <cat>"), wanted, atol=1e-3)
    sd.save(third, tmp_path / "saved.safetensors", torch.float32)
    torch.testing.assert_close(sd.load(tmp_path / "saved.safetensors").encode_prompt("a <cat>"), wanted)


def test_instruments_know_the_word(owned):
    text = owned.text
    assert words_of(text, "a <cat>, two") == [("a", [1]), ("<cat>", [2, 3, 4]), (",", [5]), ("two", [6, 7, 8])]
    assert find_word(text, "a <cat> <cat>", "<cat>", 1) == [5, 6, 7]
    assert text.tokenizer.text_of(text.ids("a <cat> x")[1:-1]) == "a <cat>x"
    sampler = sd.SimpleSampler(owned)
    with study.attention_maps(sampler) as maps:
        sampler("a <cat> star", num_inference_steps=1)
    torch.testing.assert_close(maps.word("<cat>"), maps.tokens([2, 3, 4]))


def test_info_says_what_it_is(tmp_path):
    path = pt(tmp_path / "a.pt", a1111({"*": VECTORS}, name="other"))
    facts = sd.info(path)
    assert facts["kind"] == "words of their own (textual inversion)"
    assert "a word        a, other: 3 vectors of 64 numbers" in format_info(facts)
    assert "--embedding" in facts["problem"]
    with pytest.raises(ValueError, match="--embedding") as caught:
        sd.load(path)
    assert str(caught.value) == facts["problem"]
    facts = sd.info(safe(tmp_path / "b.safetensors", {"clip_l": VECTORS, "clip_g": -VECTORS}))
    assert facts["kind"] == "words of SDXL (textual inversion)"


def test_an_embedding_of_another_dtype_in_float64(tmp_path):
    model = make_model(dtype=torch.float64)
    own = sd.textual_inversion(model, pt(tmp_path / "a.bin", {"<cat>": VECTORS.half()}))
    assert rows(own, "<cat>").dtype == torch.float64
    assert replace(own.text.config, vocab_size=517) == model.text.config

"""Words that a repository adds to CLIP's vocabulary: read in every form, checked, used, and kept by `convert`."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from transformers import AddedToken, AutoTokenizer, CLIPTokenizer

import sd
from sd.compare.comparison import compare_sources
from sd.compare.reference import transformers_text, transformers_tokenizer
from sd.prompts.words import find_word, words_of
from sd.text import TextConfig
from sd.weights.checkpoint import read, write_safetensors
from sd.weights.tokenizer import added_words, read_tokenizer
from tests.layouts import TEXT, compvis_tensors, make_model, write_ckpt, write_hub, write_tokenizer

ROOM = 8  # for words beside the vocabulary of the tiny tokenizer, which has 517
WORDS = [
    "<cat>",
    AddedToken("<Dog>", normalized=False),
    AddedToken("  left", lstrip=True, normalized=False),
    AddedToken("right", rstrip=True, single_word=True),
    AddedToken("<mark>", special=True),
    AddedToken("grüße 猫", lstrip=True, rstrip=True),
]
PROMPTS = [
    "",
    "a red star",
    "a <cat> on a star, two <cat><cat>",
    "A <CAT> and a <Dog> and a <dog>",
    "x  left y   left z",
    "right   star, bright right",
    "<mark><MARK>a<mark> star",
    "GRÜßE 猫 und grüße 猫!",
    "<|endoftext|> and <|STARTOFTEXT|>",
    "star " * 74 + "<cat> <cat> <cat>",
]
FORMS = ["five", "four", "four, fast", "three", "marked"]


@pytest.fixture(scope="module")
def roomy():
    """The tiny model, with room in its embedding for added words."""
    sizes = {**vars(TEXT), "vocab_size": TEXT.vocab_size + ROOM}
    return make_model(text=TextConfig(**sizes))


def write(folder, form, words=tuple(WORDS)):
    """A tokenizer's folder with added words, as transformers of several ages saves it."""
    folder = write_tokenizer(folder)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.add_tokens(list(words))
    plain = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if i >= TEXT.vocab_size}
    config = dict(plain)
    if form in ("five", "four, fast"):
        tokenizer.save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
    if form == "five":
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
        return folder
    if form in ("four", "four, fast"):
        kept = {str(i): token.__getstate__() for i, token in tokenizer.added_tokens_decoder.items()}
        config |= {"added_tokens_decoder": kept}
    if form == "marked":
        config |= {"additional_special_tokens": ["<cat>"]}
        (folder / "special_tokens_map.json").write_text(json.dumps({"extra_special_tokens": ["<mark>"]}))
    (folder / "added_tokens.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=FORMS)
def source(request, roomy, tmp_path_factory):
    folder = write_hub(tmp_path_factory.mktemp("added") / "hub", roomy)
    shutil.rmtree(folder / "tokenizer")
    write(folder / "tokenizer", request.param)
    return folder


def test_ids_are_those_of_transformers_before_and_after_convert(source, tmp_path):
    theirs = [
        AutoTokenizer.from_pretrained(source / "tokenizer"),
        CLIPTokenizer.from_pretrained(source / "tokenizer"),
    ]
    wanted = [[one(prompt, verbose=False).input_ids for prompt in PROMPTS] for one in theirs]
    assert wanted[0] == wanted[1]
    assert {i for ids in wanted[0] for i in ids} >= set(range(517, 517 + len(WORDS)))
    sd.convert(source, tmp_path / "a.safetensors")
    sd.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    first, second = sd.load(source), sd.load(tmp_path / "b.safetensors")
    copy = first.text.with_tensors(first.text.state_dict())
    for text in (first.text, second.text, copy):
        assert [text.ids(prompt) for prompt in PROMPTS] == wanted[0]
    cut = theirs[0](PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with pytest.warns(UserWarning, match="cut after 75"):
        embeddings = [text.encode(PROMPTS) for text in (first.text, second.text, copy)]
    assert all(torch.equal(got, transformers_text(first.text)(cut)[0]) for got in embeddings)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    drawn = [sd.SimpleSampler(model)("a <cat>", **call) for model in (first, second)]
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], sd.SimpleSampler(first)("a < cat >", **call))


def test_a_folder_that_is_given_is_read_in_the_same_way(roomy, tmp_path):
    folder = write(tmp_path / "tokenizer", "three")
    ckpt = write_ckpt(tmp_path / "a.ckpt", compvis_tensors(roomy))
    sd.convert(ckpt, tmp_path / "a.safetensors", tokenizer=folder)
    for model in (sd.load(ckpt, tokenizer=folder), sd.load(tmp_path / "a.safetensors")):
        assert model.text.ids("a <cat>")[2] == 517
        sd.save(model, tmp_path / "again.safetensors", force=True)
        assert sd.load(tmp_path / "again.safetensors").text.texts == model.text.texts


def test_an_added_word_is_a_word_of_its_own(source):
    text = sd.load(source).text
    assert [word for word, _ in words_of(text, "a <cat> on it")] == ["a", "<cat>", "on", "it"]
    (place,) = find_word(text, "a <cat> on it", "<cat>")
    assert text.ids("a <cat> on it")[place] == 517
    assert find_word(text, "a <cat>star", "star") == [3]


@pytest.mark.parametrize("how", ["none", "saved"])
def test_where_there_are_none_there_is_no_third_text(how, tiny, tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    if how == "saved":  # with both marks as added tokens
        transformers_tokenizer(tiny.text).save_pretrained(folder)
    assert sorted(read_tokenizer(folder)) == ["merges.txt", "vocab.json"]
    sd.save(tiny, tmp_path / "a.safetensors")
    ours = json.loads(read(tmp_path / "a.safetensors").metadata["sd"])
    assert sorted(ours["tokenizer"]) == ["merges.txt", "vocab.json"]


def test_words_that_differ_are_a_difference_of_two_sources(roomy, tmp_path):
    ckpt = write_ckpt(tmp_path / "a.ckpt", compvis_tensors(roomy))
    for name, words in (("a", ["<cat>"]), ("b", ["<dog>"])):
        sd.convert(ckpt, tmp_path / f"{name}.safetensors", tokenizer=write(tmp_path / name, "four", words))
    report = compare_sources(tmp_path / "a.safetensors", tmp_path / "b.safetensors", size=64)
    assert report.differences == ["The tokenizers differ; both text encoders are given A's tokens."]


GOOD = {"id": 517, "content": "<cat>"} | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
GOOD["special"] = False
BAD = [
    ([GOOD | {"id": 525}], "adds '<cat>' as token 525, but the text encoder knows 525"),
    ([GOOD | {"id": -1}], "as token -1"),
    ([GOOD | {"id": 3}], "adds '<cat>' as token 3, which is"),
    ([GOOD, GOOD | {"content": "<dog>"}], "adds '<dog>' as token 517, which is '<cat>'"),
    ([GOOD, GOOD | {"id": 518}], "as token 518, which is token 517 already"),
    ([GOOD | {"content": "star</w>"}], "as token 517, which is token 514 already"),
    ([GOOD | {"content": ""}], "is expected"),
    ([GOOD | {"content": "\ud800"}], "is expected"),
    ([GOOD | {"content": "x" * 10_000_000}], "is expected"),
    ([GOOD | {"content": None}], "is expected"),
    ([GOOD | {"id": 517.0}], "is expected"),
    ([GOOD | {"id": True}], "is expected"),
    ([GOOD | {"lstrip": 1}], "is expected"),
    ([GOOD | {"more": 1}], "is expected"),
    ([3], "is expected"),
    ({"<cat>": 517}, "no list of at most 10,000 words"),
    ([GOOD] * 10_001, "no list of at most 10,000 words"),
    ("[" * 100_000, "cannot be read"),
    ("{", "cannot be read"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_words_of_a_file_that_cannot_be_are_refused(roomy, tmp_path, words, message):
    path = tmp_path / "a.safetensors"
    sd.save(roomy, path)
    file = read(path)
    ours = json.loads(file.metadata["sd"])
    ours["tokenizer"]["added_tokens.json"] = words if isinstance(words, str) else json.dumps(words)
    write_safetensors(path, file.tensors, {"format": "pt", "sd": json.dumps(ours)}, force=True)
    start = time.monotonic()
    with pytest.raises(sd.LoadError, match=f"do not fit: .*{message}.*--tokenizer") as caught:
        sd.load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", ["<cat>"]),
        ("added_tokens.json", {"<cat>": "517"}),
        ("added_tokens.json", {"": 517}),
        ("added_tokens.json", {"<cat>": 525}),
        ("tokenizer_config.json", ["<cat>"]),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<cat>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"517": "<cat>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"five": {"content": "<cat>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"517": {"content": "<cat>", "lstrip": "no"}}}),
        ("tokenizer.json", {"added_tokens": {"<cat>": 517}}),
        ("tokenizer.json", {"added_tokens": ["<cat>"]}),
        ("special_tokens_map.json", ["<cat>"]),
    ],
)
def test_words_of_a_folder_that_cannot_be_are_refused(roomy, tmp_path, name, content):
    ckpt = write_ckpt(tmp_path / "a.ckpt", compvis_tensors(roomy))
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(sd.LoadError, match=r"--tokenizer|tokenizer folder") as caught:
        sd.load(ckpt, tokenizer=folder)
    assert "\n" not in str(caught.value)


def test_what_one_file_says_stands_before_what_another_says(tmp_path):
    """In the order of transformers: tokenizer_config.json alone; else tokenizer.json over added_tokens.json."""
    folder = write_tokenizer(tmp_path)
    (folder / "added_tokens.json").write_text('{"<a>": 517, "<b>": 518}')
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [GOOD | {"lstrip": True}]}))
    words = added_words(folder)
    assert [(word["id"], word["content"], word["lstrip"], word["normalized"]) for word in words] == [
        (517, "<cat>", True, False),
        (518, "<b>", False, True),
    ]
    listed = {"517": {"content": "<c>", "rstrip": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    (word,) = added_words(folder)
    assert word == GOOD | {"content": "<c>", "rstrip": True, "normalized": True}

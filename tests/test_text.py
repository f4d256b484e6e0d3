"""Prompts to embeddings: what is said about them, and the tokenizers that a text encoder can have."""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
import time
import warnings

import pytest
import torch
from transformers import CLIPTokenizerFast

from sd.prompts.words import find_word
from sd.text import TextConfig, TextEncoder, check_tokenizer, text_shapes
from sd.weights import tokenizer
from sd.weights.tokenizer import read_tokenizer
from tests.layouts import tokenizer_files, write_tokenizer


@pytest.fixture
def fresh(tiny):
    """The tiny model's text encoder, before its first use."""

    def make(**changes):
        words = changes.pop("known_words", None)
        texts = {"vocab.json": tiny.text.vocab, "merges.txt": tiny.text.merges}
        texts |= {f"{name}.{'json' if name == 'vocab' else 'txt'}": text for name, text in changes.items()}
        return TextEncoder(tiny.text.config, tiny.text.state_dict(), texts, words)

    return make


def test_a_text_and_a_list_of_one_are_the_same(tiny):
    assert torch.equal(tiny.encode_prompt("a star"), tiny.encode_prompt(["a star"]))
    assert tiny.encode_prompt("").shape == (1, 77, 64)


def test_nothing_is_said_about_a_prompt_that_fits(tiny, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.encode_prompt(["a star", "s" * 60])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("letters", [75, 76, 77, 200])
def test_what_is_cut_is_quoted(tiny, letters, capfd):
    """75 tokens fit between the start and the end; here every letter is one."""
    text = " ".join("abcdefghij"[i % 10] for i in range(letters))
    if letters == 75:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.encode_prompt(text)
        return
    with pytest.warns(UserWarning, match="cut after 75 tokens") as caught:
        got = tiny.encode_prompt(text)
    assert f'dropped: "{text[150:]}"' in str(caught[0].message)
    assert len(caught) == 1
    assert torch.equal(got, tiny.encode_prompt(text[:149]))
    assert capfd.readouterr().err == ""  # transformers says nothing on its own


def test_unknown_words_are_named_once_with_the_remedy(fresh):
    text = fresh(known_words=["a", "red", "star"])
    with pytest.warns(UserWarning, match="--model") as caught:
        text.encode("A Red HORSE, a horse and a star")
    assert '"horse", "and"' in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode("A red STAR.")


@pytest.mark.parametrize("prompt", [None, 3, b"a star", [], ["a", 3], {"a"}, "\ud800", ["a", "b\udcff"]])
def test_what_is_no_text_is_refused(tiny, prompt):
    with pytest.raises(ValueError, match=r"^A prompt must be") as caught:
        tiny.encode_prompt(prompt)
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt", ["a\0star", "\0", "e\u0301" * 50, "\u200d\ufeff", "猫", "'s n't", " \n\t ", "<|endoftext|>"]
)
def test_odd_texts_have_the_tokens_that_transformers_gives_them(tiny, prompt):
    tokens = tiny.text.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(tiny.encode_prompt(prompt), tiny.text.model(tokens.input_ids)[0])


@pytest.mark.parametrize("prompt", ["x" * 10_000_000, "a star " * 1_500_000, ["a", " " * 100_001], b"x" * 10_000_000])
def test_texts_of_megabytes_are_refused_at_once(tiny, prompt):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^A prompt must (have at most 100,000 characters|be a text)") as caught:
        tiny.encode_prompt(prompt)
    assert len(str(caught.value)) < 200
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("prompt", ["x" * 100_000, "word " * 20_000, "\u0301" * 100_000, "\0" * 100_000])
def test_the_longest_texts_are_cut_in_bounded_time_and_words(fresh, prompt):
    text, start = fresh(known_words=["a"]), time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        assert text.encode(prompt).shape == (1, 77, 64)
    assert str(caught[0].message).startswith("The prompt is cut after 75 tokens")
    assert all(len(str(warning.message)) < 1500 for warning in caught)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("word", [None, b"star", "\ud800", "x" * 10_000_000])
def test_a_word_that_is_none_is_refused(tiny, word):
    with pytest.raises(ValueError, match=r"^A word must") as caught:
        find_word(tiny.text, "a star", word)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": "no json"}, "no vocabulary of CLIP"),
        ({"vocab": "[]"}, "no vocabulary of CLIP"),
        ({"vocab": '{"a": 0}'}, "no vocabulary of CLIP"),
        ({"vocab": '{"<|startoftext|>": "x", "<|endoftext|>": 1}'}, "no vocabulary of CLIP"),
        ({"vocab": '{"<|startoftext|>": 0, "<|endoftext|>": 999}'}, "tokens up to 999, the text encoder knows 517"),
        ({"merges": "#version: 0.2\nq z\n"}, r"merges.txt does not belong to vocab.json \('q z'\)"),
        ({"merges": "#version: 0.2\none two three\n"}, "merges.txt does not belong"),
    ],
)
def test_a_wrong_tokenizer_is_refused_at_once(fresh, changes, message):
    with pytest.raises(ValueError, match=message):
        fresh(**changes)


def test_merges_without_their_first_line(fresh, tiny):
    text = fresh(merges="s t\na r</w>\nst ar</w>\n")
    assert text.tokenizer("star").input_ids == tiny.text.tokenizer("star").input_ids


def test_a_tokenizer_as_transformers_5_saves_it(tiny, tmp_path):
    """tokenizer.json alone, and the texts in it are those of the two files."""
    files = write_tokenizer(tmp_path / "files")
    made = CLIPTokenizerFast(str(files / "vocab.json"), str(files / "merges.txt"))  # writes it in transformers 4, too
    made.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").exists()
    texts = read_tokenizer(tmp_path)
    assert json.loads(texts["vocab.json"]) == json.loads(tokenizer_files()["vocab.json"])
    assert texts["merges.txt"] == tokenizer_files()["merges.txt"]
    assert read_tokenizer(tmp_path / "nothing") is None
    (tmp_path / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(ValueError, match="holds no vocabulary"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_names_of_either_age_of_transformers(tiny, prefix):
    tensors = {prefix + n: t for n, t in tiny.text.state_dict().items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    text = TextEncoder(tiny.text.config, tensors, tiny.text.texts)
    assert torch.equal(text.encode("a star"), tiny.text.encode("a star"))
    assert text.state_dict().keys() == text_shapes(text.config).keys()
    assert not any(t.is_meta for t in [*text.model.parameters(), *text.model.buffers()])


def test_conversion_before_and_after_first_use(fresh):
    early, late = fresh().to(dtype=torch.bfloat16), fresh()
    late.encode("a")
    late.to(dtype=torch.bfloat16)
    assert early.dtype == late.dtype == torch.bfloat16
    assert torch.equal(early.encode("a star"), late.encode("a star"))


def test_importing_it_imports_no_transformers():
    code = "import sys, sd.text, sd.loader; assert not {'transformers', 'huggingface_hub'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- where a tokenizer is found


def packed_vocabulary(merges):
    """What openai/CLIP and open_clip bring: a head, merges, and more than CLIP uses of them."""
    return gzip.compress("\n".join(["the head", *merges, *["no more"] * 200_000]).encode())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `open_clip` that cannot be imported, beside a cache of the Hub that is empty, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "site/open_clip"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()
    return folder


def test_clips_vocabulary_is_read_from_a_package_that_is_not_imported(package):
    letters = tokenizer.bytes_to_letters()
    pairs = [(a, b) for a in letters[:222] for b in letters[:221]][: tokenizer.MERGES]
    (package / tokenizer.PACKED).write_bytes(packed_vocabulary([" ".join(pair) for pair in pairs]))
    texts = tokenizer.clip_texts("a.ckpt")
    ids = json.loads(texts["vocab.json"])
    assert len(ids) == len(set(ids.values())) == 49408  # as the full-size model has
    assert [ids[t] for t in ("!", "a", "a</w>", "<|startoftext|>", "<|endoftext|>")] == [0, 64, 320, 49406, 49407]
    assert ids["".join(pairs[0])] == 512
    assert texts["merges.txt"].split("\n")[1] == " ".join(pairs[0])
    assert len(texts["merges.txt"].split("\n")) == 48894 + 2
    assert "open_clip" not in sys.modules
    check_tokenizer(TextConfig(), **{"vocab": texts["vocab.json"], "merges": texts["merges.txt"]})


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"too short"), gzip.compress(b"a b\n" * (5 << 20))]
)
def test_a_package_with_another_file_is_passed_over(package, content):
    (package / tokenizer.PACKED).write_bytes(content)
    with pytest.raises(ValueError, match=r"^a\.ckpt brings no tokenizer.*--tokenizer.*open_clip_torch"):
        tokenizer.clip_texts("a.ckpt")


def test_a_tokenizer_that_is_found_later_is_checked_then(tiny):
    asked = []

    def find():
        asked.append(1)
        return tokenizer_files() | {"merges.txt": "#version: 0.2\nq z\n"}

    text = TextEncoder(tiny.text.config, tiny.text.state_dict(), find)
    assert text.model is not None
    assert not asked  # the weights need no tokenizer
    with pytest.raises(ValueError, match=r"^The tokenizer does not fit the text encoder: merges.txt .*--tokenizer"):
        text.encode("a star")
    good = TextEncoder(tiny.text.config, tiny.text.state_dict(), lambda: asked.append(2) or tokenizer_files())
    assert torch.equal(good.encode("a star"), tiny.text.encode("a star"))
    assert torch.equal(good.with_tensors(good.state_dict()).encode("a"), tiny.text.encode("a"))
    assert asked == [1, 2]

"""Prompts to embeddings: what is said about them, and the tokenizers that a text encoder can have."""

from __future__ import annotations

import gzip
import importlib
import json
import random
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import CLIPTokenizerFast

from sd.compare.reference import random_model, random_tensors, transformers_text, transformers_tokenizer
from sd.prompts.encoder import TextEncoder, text_model
from sd.prompts.tokenizer import check_tokenizer
from sd.prompts.words import find_word
from sd.text import CLIPText, TextConfig
from sd.weights import tokenizer
from sd.weights.tokenizer import read_tokenizer
from tests import ALL
from tests.layouts import TEXT, tokenizer_files, write_tokenizer


@pytest.fixture
def fresh(tiny):
    """The tiny model's text encoder, before its first use."""

    def make(**changes):
        words = changes.pop("known_words", None)
        texts = dict(tiny.text.texts)
        texts |= {f"{name}.{'json' if name == 'vocab' else 'txt'}": text for name, text in changes.items()}
        return TextEncoder(text_model(tiny.text.config, tiny.text.state_dict()), texts, words)

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
    how = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    tokens = transformers_tokenizer(tiny.text)(prompt, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(tiny.encode_prompt(prompt), transformers_text(tiny.text)(tokens.input_ids)[0])


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
    assert text.ids("star") == tiny.text.ids("star")
    assert len(text.ids("star")) == 3


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
    text = TextEncoder(text_model(tiny.text.config, tensors), tiny.text.texts)
    assert torch.equal(text.encode("a star"), tiny.text.encode("a star"))
    assert text.state_dict().keys() == tiny.text.state_dict().keys()
    assert not any(t.is_meta for t in [*text.model.parameters(), *text.model.buffers()])


def test_conversion_before_and_after_first_use(fresh):
    early, late = fresh(), fresh()
    early.model.to(dtype=torch.bfloat16)
    late.encode("a")
    late.model.to(dtype=torch.bfloat16)
    assert early.encode("a star").dtype == torch.bfloat16
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
    check_tokenizer(TextConfig().vocab_size, texts["vocab.json"], texts["merges.txt"])


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

    text = TextEncoder(tiny.text.model, find)
    assert text.model is not None
    assert not asked  # the weights need no tokenizer
    with pytest.raises(ValueError, match=r"^The tokenizer does not fit the text encoder: merges.txt .*--tokenizer"):
        text.encode("a star")
    good = TextEncoder(tiny.text.model, lambda: asked.append(2) or tokenizer_files())
    assert torch.equal(good.encode("a star"), tiny.text.encode("a star"))
    assert torch.equal(good.with_tensors(good.state_dict()).encode("a"), tiny.text.encode("a"))
    assert asked == [1, 2]


# ---- the tokenizer and the network beside transformers'

SCRIPTS = [
    (0x20, 0x7E),
    (0xA0, 0x24F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x900, 0x97F),
]
SCRIPTS += [
    (0xE00, 0xE7F),
    (0x1100, 0x11FF),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1FAFF),
]
SCRIPTS += [(0x0, 0x1F), (0x7F, 0x9F), (0x300, 0x36F), (0x2000, 0x206F), (0x2190, 0x22FF), (0xFE00, 0xFEFF)]
SCRIPTS += [(0x10000, 0x10FFF), (0x1D400, 0x1D7FF), (0xE0000, 0xE007F), (0x20000, 0x2A6DF), (0xFF00, 0xFFEF)]
BITS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "'s",
    "'LL",
    "don't",
    "İ",
    "ß",
    "ǅ",
    "ﬁ",
    "e\u0301",
    "a\u0328\u0301",
    "½",
    "²",
    "Ⅷ",
]
BITS += [
    "\u200d",
    "\ufeff",
    "\r\n",
    "\t",
    "  ",
    "\u3000",
    "(a:1.2)",
    "[b]",
    "\\(",
    "</w>",
    "star",
    "a red star",
    "1234",
    "_",
]


def odd_text(rng):
    """Of one script or several, of any length, with bits that tokenizers stumble over."""
    parts = []
    for _ in range(rng.choice([0, 1, 1, 2, 3, 8])):
        low, high = rng.choice(SCRIPTS)
        parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.choice([1, 2, 5, 20]))))
        if rng.random() < 0.5:
            parts.append(rng.choice(BITS))
        parts.append(rng.choice(["", " ", " ", ", "]))
    return "".join(parts).encode(errors="ignore").decode()


@pytest.mark.slow
def test_numbers_of_many_odd_texts_are_those_of_transformers(tiny):
    """With SD_TEST_ALL 100,000 of them; with the built-in model's tokenizer a few less odd ones."""
    rng, theirs = random.Random(0), transformers_tokenizer(tiny.text)
    for _ in range(100 if ALL else 15):
        texts = [odd_text(rng) for _ in range(1000)]
        wanted = theirs(texts, verbose=False).input_ids
        for text, ids in zip(texts, wanted, strict=True):
            assert tiny.text.tokenizer.ids(text) == ids, repr(text)


def test_a_larger_vocabulary_is_read_as_transformers_reads_it(shapes):
    """Merges of several letters, and words that are one token."""
    rng, theirs = random.Random(1), transformers_tokenizer(shapes.text)
    words = [*sorted(shapes.text.known_words), *BITS]
    for _ in range(500):
        text = "".join(rng.choice(words) + rng.choice(["", " ", ","]) for _ in range(rng.randint(0, 12)))
        assert shapes.text.tokenizer.ids(text) == theirs(text, verbose=False).input_ids, repr(text)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_text_encoder_is_that_of_transformers(activation, dtype):
    """CLIP's and OpenCLIP's, all of its layers; identical, and to the last bit."""
    config = replace(TEXT, hidden_act=activation, num_hidden_layers=3, num_attention_heads=4)
    text = random_model(text=config, dtype=dtype).text
    theirs = transformers_text(text)
    tokens = torch.randint(0, 517, (3, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True)
        assert torch.equal(text.model(tokens), expected.last_hidden_state)
        norm = text.model.final_layer_norm
        for skip in (1, 2):
            assert torch.equal(text.model(tokens, skip), norm(expected.hidden_states[-1 - skip]))
        assert (text.model(tokens) - text.model(tokens, 1)).abs().max() > 0.1


@pytest.mark.slow
def test_at_full_size_the_text_encoder_is_that_of_transformers():
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in CLIPText(TextConfig()).state_dict().items()}
    text = TextEncoder(text_model(TextConfig(), random_tensors(shapes, 0, torch.float32)), tokenizer_files())
    tokens = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, expected = text.model(tokens), transformers_text(text)(tokens)[0]
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_no_token_hears_those_after_it(tiny):
    tokens = torch.randint(0, 517, (1, 77), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 40:] = 3
    with torch.no_grad():
        one, two = tiny.text.model(tokens), tiny.text.model(other)
    torch.testing.assert_close(one[:, :40], two[:, :40], rtol=1e-5, atol=1e-5)
    assert (one[:, 40:] - two[:, 40:]).abs().max() > 0.1


def test_drawing_imports_no_transformers():
    code = (
        "import sys, sd; sd.SimpleSampler(sd.load('shapes'))('a red star', num_inference_steps=1); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

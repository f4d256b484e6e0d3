"""Prompts in the dialect of compel, beside the package: the parts of a text to the letter, embeddings to 1e-10."""

from __future__ import annotations

import random
import sys
import types
import warnings

import pytest
import torch

import sd
from sd.cli.options import STYLES as OPTIONS
from sd.compare.reference import transformers_text, transformers_tokenizer
from sd.prompts import styles
from sd.prompts.compel import parse_compel
from sd.prompts.words import find_word, words_of
from tests.layouts import make_model

LONG = "a (red star above a ring, of gold. and)0.6 more of it; "


@pytest.fixture(scope="module")
def package():
    """compel, without its pipelines of other models, which take seconds to import."""
    sys.modules.setdefault("compel.convenience_wrappers", types.ModuleType("compel.convenience_wrappers"))
    return pytest.importorskip("compel", reason="compel is not installed: pip install compel")


def oracle(package, model, **options):
    """As CompelForSD of the package sets it up."""
    encoder = transformers_text(model.text)
    if not hasattr(encoder, "text_model"):  # of transformers 5.6 and later, which the package does not know yet
        object.__setattr__(encoder, "text_model", encoder)
    tokenizer = transformers_tokenizer(model.text)
    return package.Compel(
        tokenizer, encoder, dtype_for_device_getter=lambda _: model.dtype, truncate_long_prompts=False, **options
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red star", [("a red star", 1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),  # the package fails here
        ("a red++ star", [("a", 1), ("red", 1.21), ("star", 1)]),
        ("a red-- star", [("a", 1), ("red", 0.81), ("star", 1)]),
        ("red ++", [("red ++", 1)]),
        ("(a red)1.3 star", [("a red", 1.3), ("star", 1)]),
        ("(a (red)1.5 star)0.5", [("a", 0.5), ("red", 0.75), ("star", 0.5)]),
        ("(a) 1.3", [("a 1.3", 1)]),
        ("(a)2b", [("a", 2), ("b", 1)]),
        ('"a red"++ star', [("a red", 1.21), ("star", 1)]),
        (r'"a \"red\""- star', [('a "red"', 0.9), ("star", 1)]),
        (r"a \(red\)++ star\+", [("a", 1), ("(red)", 1.21), ("star\\+", 1)]),
        ("red.attend(1.3) a.attend(--)", [("red", 1.3), ("a", 0.81)]),
        ("a,b++", [("a,", 1), ("b", 1.21)]),  # a space is put after commas
        ("a.b++ mid-century++", [("a.b++", 1), ("mid-century", 1.21)]),
        ("(a = b)++", [("(a = b)++", 1)]),  # = is syntax elsewhere, so this is no group
        ("(a", [("(a", 1)]),
    ],
)
def test_weights(text, expected):
    got = parse_compel(text)
    assert [part for part, _ in got] == [part for part, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


BITS = [
    "a",
    "red",
    " ",
    " ",
    " ",
    "++",
    "+",
    "--",
    "-",
    "(",
    ")",
    "(",
    ")",
    '"',
    '"',
    "1.3",
    "0.5",
    "2",
    ".",
    ", ",
    ",",
]
BITS += ["(a b)", "red++", "(c)0.5", '"b"--'] * 3 + [
    "\\(",
    "\\)",
    "\\+",
    '\\"',
    "\\.",
    "\\",
    "=",
    ":",
    ".attend(",
    "[",
    "1",
    ".5",
    "é",
    "\u00a0",
    "\n",
    "\t",
    "'s",
]


def odd_prompt(rng):
    return "".join(rng.choice(BITS) for _ in range(rng.randint(2, 7)))


def test_odd_texts_are_read_as_by_the_package(package):
    rng, reader = random.Random(2), package.PromptParser()
    texts = [text for text in (odd_prompt(rng) for _ in range(80)) if text.strip()]
    weighted = 0
    for text in texts:
        prompts = reader.parse_conjunction(text).prompts
        wanted = [(part.text, part.weight) for part in prompts[0].children] if prompts else [("", 1.0)]
        assert parse_compel(text) == wanted, repr(text)
        weighted += any(weight != 1 for _, weight in wanted)
    assert weighted > 20


PROMPTS = [
    "a star",
    "",
    "a (red)1.3 star",
    "a (red)0.4 star",
    "(a (red)1.5 star)0.5 b- c--",
    "((a)0 b)2",
    '"a \\"red\\" star"- \\(x\\)++',
    "x- y " * 6,
    LONG * 3,  # chunks end after sentences
    "a, " * 60 + "b--",  # after phrases
    "(" + "abcdef " * 20 + ")-- end",  # after words, with one part in several chunks
    "(" + "a" * 90 + ")0.7",  # anywhere
]


@pytest.mark.parametrize("skip", [0, 1])
def test_embeddings_are_those_of_the_package(package, skip):
    model = make_model(dtype=torch.float64)
    kinds = package.ReturnedEmbeddingsType
    kind = kinds.PENULTIMATE_HIDDEN_STATES_NORMALIZED if skip else kinds.LAST_HIDDEN_STATES_NORMALIZED
    theirs = oracle(package, model, returned_embeddings_type=kind)
    for prompt in PROMPTS:
        wanted, got = theirs(prompt), model.encode_prompt([prompt], "compel", clip_skip=skip)
        assert got.shape == wanted.shape, prompt
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=prompt)
    assert model.encode_prompt(PROMPTS[-2:], "compel").shape[0] == 2  # of several lengths


def test_in_float32(package, tiny):
    theirs = oracle(package, tiny)
    for prompt in PROMPTS[3:6]:
        wanted = theirs(prompt)
        assert (tiny.encode_prompt([prompt], "compel") - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_pictures_with_negative_prompts(package):
    """Embeddings of the package, handed to a sampler, draw the same latents."""
    model = make_model(dtype=torch.float64)
    theirs, call = oracle(package, model), {"num_inference_steps": 2, "output_type": "latent"}
    prompt, negative = "a (red)1.4 star-", "blurred++ (text)0.3"
    sampler = sd.SimpleSampler(model)
    got = sampler(prompt, negative_prompt=negative, prompt_style="compel", **call)
    wanted = sampler(prompt_embeds=theirs(prompt), negative_prompt_embeds=theirs(negative), **call)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert (got - sampler(prompt, negative_prompt=negative, **call)).abs().max() > 1e-3


def test_what_is_faded_stays_in_its_chunk(tiny):
    """Positions by hand: START at 0, then the words, then END and what fills up; the last is never hidden."""
    (chunk,) = styles.chunks_of("a (bc)0.5 d", "compel", tiny.text.tokenizer)
    (faded,) = chunk.faded
    assert (faded.start, faded.end) == (2, 4)
    assert faded.share == pytest.approx(0.5)  # tan of 45 degrees: as much as the other one
    first, second = styles.chunks_of("(" + "a " * 80 + ")0.5 d", "compel", tiny.text.tokenizer)
    assert [(f.start, f.end) for f in first.faded] == [(1, 76)]
    assert [(f.start, f.end) for f in second.faded] == [(1, 6)]


def test_a_prompt_that_cannot_be_read_twice_as_long_takes_no_time(tiny):
    """Brackets without end are tried at each of them; and no weight is too large to be said."""
    assert parse_compel("( a " * 100 + "= b " * 10_000)[0][1] == 1
    for text in ("a" + "+" * 50_000, "(" * 50 + "a" + ")9999" * 50, f"(a){'9' * 500}"):
        with pytest.raises(ValueError, match=r"A weight in the prompt is .*: all must be from -1000 to 1000"):
            tiny.encode_prompt([text], "compel")


def test_instruments_know_what_is_faded(tiny):
    prompt = "a (red ring)0.5 star++"
    assert [word for word, _ in words_of(tiny.text, prompt, "compel")] == ["a", "red", "ring", "star"]
    assert find_word(tiny.text, prompt, "star", style="compel") == find_word(tiny.text, "a red ring star", "star")
    seen = []

    def look(probs, at):
        seen.append(probs)
        return 1.0 * probs  # as it was, but by the edit's own product

    with sd.study.edit(tiny, {"text.encoder.layers.0.self_attn.attend": look}):
        edited = tiny.encode_prompt(prompt, "compel")
    torch.testing.assert_close(edited, tiny.encode_prompt(prompt, "compel"), rtol=1e-5, atol=1e-5)
    plain, hidden, _ = seen  # as it is, without the words that are faded, and of no words
    (faded,) = tiny.text.chunks(prompt, "compel")[0].faded
    words = slice(faded.start, faded.end)
    assert (plain[..., words].sum() > 0) & (hidden[..., words].sum() == 0)
    torch.testing.assert_close(hidden.sum(-1), torch.ones_like(hidden.sum(-1)))


def test_the_command_offers_all_styles():
    assert OPTIONS == styles.STYLES


@pytest.mark.parametrize("prompt", ["a red++ star", "a (red star)1.3", "(a b)++, c", "a red-- star"])
def test_a_prompt_that_looks_like_compel_is_hinted_at(prompt):
    from sd.cli.settings import drawing_of

    with pytest.warns(UserWarning, match="add --prompt-style compel; if not"):
        drawing_of({"prompt": prompt})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing_of({"prompt": prompt, "prompt_style": "compel"})
        drawing_of({"prompt": "a well--known star (of 1950) at 3+4, f/2.8 (wide)"})

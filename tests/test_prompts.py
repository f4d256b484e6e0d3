"""Weighted and long prompts, in the dialects of AUTOMATIC1111 and ComfyUI, beside another reading of their rules."""

from __future__ import annotations

import pytest
import torch

import sd
from sd.compare.reference import transformers_text
from sd.prompts.encoder import of_one_length
from sd.prompts.styles import INSIDE, chunks_of, parse_a1111, parse_comfy
from sd.prompts.words import find_word, words_of
from tests.layouts import make_model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a star", [("a star", 1)]),
        ("", [("", 1)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: .5 )b", [("a", 0.5), ("b", 1)]),
        ("((a:1.5) b)", [("a", 1.65), (" b", 1.1)]),
        ("[(a:2)]", [("a", 2 / 1.1)]),
        ("(a:-1)", [("a", -1)]),
        (r"a \(b\) \[c\]", [("a (b) [c]", 1)]),
        ("a \\ b", [("a  b", 1)]),  # a lone backslash vanishes
        ("(a [b", [("a ", 1.1), ("b", 1)]),  # unclosed, to the end
        ("a) b]", [("a) b]", 1)]),
        ("a:1.2)", [("a:1.2)", 1)]),
        ("a: b", [("a: b", 1)]),
        ("a BREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
        ("(a BREAK b:2)", [("a", 2), ("BREAK", -2), ("b", 2)]),  # not a break there, as in AUTOMATIC1111
        ("a (b:1.0) c", [("a b c", 1)]),  # equal weights are merged before they become tokens
        ("BREAKFAST", [("BREAKFAST", 1)]),
    ],
)
def test_a1111_weights(text, expected):
    got = parse_a1111(text)
    assert [part for part, _ in got] == [part for part, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a star", [("a star", 1)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("[a]", 1)]),
        ("(a:1.3) b", [("a", 1.3), (" b", 1)]),
        ("((a:1.5) b)", [("a", 1.5), (" b", 1.1)]),  # a number replaces
        ("(a (b:0.5):2)", [("a ", 2), ("b", 0.5)]),
        (r"\(a\)", [("(a)", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("a)", [("a)", 1)]),
        ("(a", [("(a", 1)]),
    ],
)
def test_comfy_weights(text, expected):
    got = parse_comfy(text)
    assert [part for part, _ in got] == [part for part, _ in expected]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in expected])


def spelled(tiny, text, style):
    """Each chunk as the letters between its start and its first end."""
    result = []
    for chunk in chunks_of(text, style, tiny.text.tokenizer):
        assert len(chunk.ids) == len(chunk.weights) == 77
        inside = list(chunk.ids[1 : chunk.ids.index(chunk.ids[-1])])
        result.append(tiny.text.tokenizer.text_of(inside))
    return result


def test_chunks_of_75(tiny):
    letters = " ".join("abcdefghij"[i % 10] for i in range(160))
    assert spelled(tiny, letters, "a1111") == [letters[0:149], letters[150:299], letters[300:]]
    assert spelled(tiny, letters, "comfy") == [letters[0:149], letters[150:299], letters[300:]]
    assert len(spelled(tiny, letters[:149], "a1111")) == 1
    assert spelled(tiny, "", "a1111") == spelled(tiny, "", "comfy") == [""]
    assert spelled(tiny, "a BREAK b", "a1111") == ["a", "b"]
    assert spelled(tiny, "BREAK b", "a1111") == ["", "b"]


@pytest.mark.parametrize(("before", "moves"), [(60, True), (55, True), (54, False), (10, False)])
def test_a_comma_near_the_end_of_a_chunk_ends_it(tiny, before, moves):
    """At most 20 tokens back: what follows the comma moves to the next chunk."""
    text = " ".join(["a"] * before) + " , " + " ".join(["b"] * 70)
    first, second = spelled(tiny, text, "a1111")
    assert first.count("b") == (0 if moves else INSIDE - before - 1)
    assert first.count("b") + second.count("b") == 70


def test_a_comma_as_the_76th_token_begins_the_next_chunk(tiny):
    first, second = spelled(tiny, " ".join(["a"] * 75) + " , b", "a1111")
    assert (first.count("a"), second) == (75, ", b")


def test_long_parts_may_be_cut_in_comfy_and_short_ones_not(tiny):
    letters = " ".join("a" * 73)
    first, second = spelled(tiny, f"{letters} (cdef:1.1)", "comfy")  # four tokens: kept together
    assert (first.count("a"), second) == (73, "cdef")
    first, second = spelled(tiny, f"{letters} (cdefghijkl:1.1)", "comfy")
    assert first.endswith("cd")
    assert second == "efghijkl"


@pytest.mark.parametrize("style", ["a1111", "comfy"])
def test_embeddings_of_weighted_prompts(style):
    """Written out once more, with transformers' encoder."""
    model = make_model(dtype=torch.float64)
    theirs, text = transformers_text(model.text), "a (red:1.4) star, (blue) ring " + "and more " * 60
    rows = []
    for chunk in chunks_of(text, style, model.text.tokenizer):
        z = theirs(torch.tensor([chunk.ids]))[0][0]
        w = torch.tensor(chunk.weights, dtype=torch.float64)[:, None]
        if style == "a1111":
            after = z * w
            rows.append(after * (z.mean() / after.mean()))
        else:
            start, end = model.text.ids("")
            nothing = theirs(torch.tensor([[start] + [end] * 76]))[0][0]
            rows.append(nothing + w * (z - nothing))
    expected = torch.cat(rows)[None]
    assert len(rows) > 1
    got = model.encode_prompt([text], style)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    plain = model.encode_prompt(["a star"], style)
    torch.testing.assert_close(plain, model.encode_prompt(["a star"]), rtol=1e-12, atol=1e-12)


def test_clip_skip_leaves_layers_out(tiny):
    (ids,) = (chunk.ids for chunk in tiny.text.chunks("a red star"))
    with torch.no_grad():
        states = transformers_text(tiny.text)(torch.tensor([ids]), output_hidden_states=True).hidden_states
        expected = tiny.text.model.final_layer_norm(states[-2])
    assert torch.equal(tiny.encode_prompt(["a red star"], clip_skip=1), expected)
    assert torch.equal(tiny.encode_prompt(["a red star"], clip_skip=0), tiny.encode_prompt(["a red star"]))


LONG = "a (red:1.4) star above a ring " + "and a ring " * 40
CALL = {"num_inference_steps": 3, "seed": 3, "guidance_scale": 4.0, "prompt_style": "a1111", "output_type": "latent"}


def test_halves_of_unequal_length_are_repeated_exactly():
    """A context that stands twice is seen as one that stands once."""
    model = make_model(dtype=torch.float64)
    sampler = sd.SimpleSampler(model)
    context, negative = model.encode_prompt([LONG], "a1111"), model.encode_prompt([""], "a1111")
    times = context.shape[1] // 77
    assert times > 1
    assert negative.shape[1] == 77
    call = {name: value for name, value in CALL.items() if name != "prompt_style"}
    twice = {"prompt_embeds": context, "negative_prompt_embeds": negative.repeat(1, times, 1)}
    assert torch.equal(sampler(LONG, **CALL), sampler(**twice, **call))
    x, t = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([500.0])
    with torch.no_grad():
        once, again = model.unet(x, t, negative), model.unet(x, t, negative.repeat(1, 3, 1))
    torch.testing.assert_close(once, again, rtol=1e-11, atol=1e-11)
    assert of_one_length([context[:, :154], context[:, :231]]).shape == (2, 6 * 77, 64)


@pytest.mark.parametrize(("variant", "style"), [("fast", "a1111"), ("lean", "a1111"), ("lean", "compel")])
def test_long_prompts_in_other_ways_to_run(variant, style):
    model, call = make_model(dtype=torch.float64), CALL | {"prompt_style": style}
    prompts = [LONG + "(and more)0.5", "a star"]
    expected = sd.SimpleSampler(model)(prompts, **call)
    sampler = sd.SimpleSampler(sd.fast(model)) if variant == "fast" else sd.LeanSampler(model)
    torch.testing.assert_close(sampler(prompts, **call), expected, rtol=1e-8, atol=1e-8)
    alone = sampler("a star", **call | {"seed": 4})
    torch.testing.assert_close(alone, expected[1:], rtol=1e-8, atol=1e-8)


def test_the_memory_plan_counts_the_tokens_of_all_chunks(tiny):
    sampler = sd.LeanSampler(tiny, "2GB")
    call = {name: value for name, value in CALL.items() if name != "output_type"}
    short, long = sampler.plan("a star", **call), sampler.plan(LONG, **call)
    assert short.job.tokens == 77
    assert long.job.tokens == tiny.encode_prompt([LONG], "a1111").shape[1] > 77
    assert long.peaks["UNet"] > short.peaks["UNet"]


def test_instruments_know_the_words_of_all_chunks(tiny):
    text = "a (red:1.4) star BREAK a blue ring"
    assert words_of(tiny.text, text, "a1111")[-1] == ("ring", [77 + 6, 77 + 7, 77 + 8, 77 + 9])
    assert find_word(tiny.text, text, "star", style="a1111") == [find_word(tiny.text, "a red star", "star")[0]]
    with sd.study.attention_maps(tiny) as maps:
        sd.SimpleSampler(tiny)([text, "star"], **CALL)
    star = find_word(tiny.text, "star", "star")
    assert maps.words(1) == [("star", [star[0], star[0] + 77])]  # its one chunk stands twice
    assert maps.word("ring").shape == (64, 64)
    whole = sum(maps.tokens(places).mean() for _, places in maps.words(0))
    assert 0 < whole < 1


@pytest.mark.parametrize(
    ("text", "style", "message"),
    [
        ("(a:1.2.3)", "a1111", "The weight '1.2.3' in the prompt is no number"),
        ("(a:nan)", "comfy", "The weight 'nan' in the prompt is no number"),
        ("[a:b:0.5]", "a1111", "Prompt editing"),
        ("[a [b]:0.5]", "a1111", "Prompt editing"),
        ("[a|b]", "a1111", "Alternation"),
        ("(" * 1200 + "a" + ")" * 1200, "comfy", "must not nest more than 100 brackets"),
        ("(" * 8000 + "a", "a1111", "must not nest more than 100 brackets"),
        ("(a:" + "9" * 60 + ")", "a1111", "A weight in the prompt is 1e.60: all must be"),
        ("a embedding:style", "comfy", "there is no such word: give its file"),
        ("a AND b", "a1111", "AND between prompts"),
        ("a <lora:x:0.8>", "a1111", "A network in the prompt"),
        ("word " * 10_000, "a1111", "at most 64 chunks"),
        ("word " * 10_000, "comfy", "at most 64 chunks"),
        ("word " * 10_000, "compel", "at most 64 chunks"),
        ("(a = " * 101, "compel", "must not nest more than 100 brackets"),
        ("a cat.swap(dog) b", "compel", r"Swapping words, a.swap\(b\), is not followed here: take '.swap\('"),
        ('("a", "b").blend(1, 0.5)', "compel", "A blend of prompts"),
        ('("a", "b").and()', "compel", "A conjunction of prompts"),
        ("a withLora(x, 0.5)", "compel", "A network in the prompt"),
        ("a", "nonsense", "prompt_style must be plain, a1111, comfy or compel"),
    ],
)
def test_what_cannot_be_followed_is_said(tiny, text, style, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny.encode_prompt([text], style)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_lengths_that_have_little_in_common(tiny):
    prompts = [" BREAK ".join(["a"] * n) for n in (13, 11, 7)]
    with pytest.raises(ValueError, match="of 7 and 11 and 13 chunks have to be repeated up to 1001 chunks"):
        tiny.encode_prompt(prompts, "a1111")
    call = {"negative_prompt": " BREAK ".join(["b"] * 19), "prompt_style": "a1111"}
    with pytest.raises(ValueError, match="of 17 and 19 chunks have to be repeated"):
        sd.SimpleSampler(tiny)(" BREAK ".join(["a"] * 17), **call)


@pytest.mark.parametrize("skip", [-1, 2, 1.5, "x", True])
def test_a_number_of_layers_that_cannot_be(tiny, skip):
    with pytest.raises(ValueError, match="clip_skip must be a whole number from 0 to 1"):
        tiny.encode_prompt(["a"], clip_skip=skip)

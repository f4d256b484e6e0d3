"""The text encoder's own attention maps: beside transformers', by word, by chunk, and under edits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sd
from sd import study
from sd.compare.reference import transformers_text
from tests.layouts import TEXT, make_model

PROMPT = "a red star above a blue ring"


def test_maps_are_those_of_transformers():
    """Its own, whose softmax is of single precision; and from its queries and keys in double precision."""
    model = make_model(text=replace(TEXT, num_attention_heads=4), dtype=torch.float64)
    theirs, seen = transformers_text(model.text), {"q": [], "k": []}
    (chunk,) = model.text.chunks(PROMPT)
    hooks = [
        module.register_forward_hook(lambda m, args, out, kind=name[-6]: seen[kind].append(out))
        for name, module in theirs.named_modules()
        if name.endswith(("self_attn.q_proj", "self_attn.k_proj"))
    ]
    theirs(torch.tensor([chunk.ids]))
    for hook in hooks:
        hook.remove()
    theirs.set_attn_implementation("eager")  # which hands its probabilities out
    their_maps = theirs(torch.tensor([chunk.ids]), output_attentions=True).attentions
    heard = study.text_attention(model, PROMPT)
    assert heard.layers == [f"text.encoder.layers.{i}.self_attn" for i in range(len(their_maps))]
    assert list(study.names(model, "text.*.attend")) == heard.layers
    later = torch.full((77, 77), -torch.inf, dtype=torch.float64).triu(1)
    heads = model.text.config.num_attention_heads
    for layer, rough, q, k in zip(heard.layers, their_maps, seen["q"], seen["k"], strict=True):
        q, k = (x[0].view(77, heads, -1) for x in (q, k))
        wanted = (torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5 + later).softmax(-1)
        for head, those in ((None, wanted), (1, wanted[1:2]), ((0, 2), wanted[[0, 2]])):
            got = heard.probabilities(layer, head=head)
            torch.testing.assert_close(got, those.mean(0)[None], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(heard.probabilities(layer), rough.mean(1), rtol=0, atol=1e-6)


def test_words_and_whom_they_hear(tiny):
    heard = study.text_attention(sd.SimpleSampler(tiny), PROMPT)
    places = dict(heard.words())
    assert heard.words()[1] == ("red", places["red"])
    ring = heard.word("ring")
    assert ring.shape == (77,)
    assert ring.sum() == pytest.approx(1, abs=1e-5)
    assert ring[places["red"]].sum() > 0
    assert heard.word("star")[places["ring"]].sum() == 0  # it stands before
    last = [heard.probabilities(layer)[0, places["ring"]].mean(0) for layer in heard.layers]
    torch.testing.assert_close(ring, torch.stack(last).mean(0))
    one = heard.word("ring", layer=heard.layers[1], head=0)
    torch.testing.assert_close(one, heard.probabilities(heard.layers[1], head=0)[0, places["ring"]].mean(0))
    assert not torch.equal(heard.word("a", occurrence=0), heard.word("a", occurrence=1))


def test_each_chunk_hears_itself_alone(tiny):
    heard = study.text_attention(tiny, "a star BREAK a ring", prompt_style="a1111")
    ring = heard.word("ring")
    assert ring.shape == (154,)
    assert ring[:77].sum() == 0
    assert ring[77:].sum() == pytest.approx(1, abs=1e-5)
    assert len(study.text_attention(tiny, PROMPT, clip_skip=1).layers) == len(heard.layers) - 1


def test_the_encoder_is_left_as_it_was_and_edits_are_seen(tiny):
    before, plain = tiny.encode_prompt(PROMPT), study.text_attention(tiny, PROMPT)
    first, second = plain.layers[:2]
    with study.edit(tiny, {first: lambda out, at: 0 * out}):
        edited = study.text_attention(tiny, PROMPT)
    assert torch.equal(edited.probabilities(first), plain.probabilities(first))
    assert not torch.equal(edited.probabilities(second), plain.probabilities(second))
    assert torch.equal(tiny.encode_prompt(PROMPT), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.text.model.modules())


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda model: study.text_attention(model, ["a star"]), "A prompt must be a text, not"),
        (lambda model: study.text_attention(model, "a", prompt_style="x"), "prompt_style must be plain"),
        (lambda model: study.text_attention(model, "a", clip_skip=9), "clip_skip must be a whole number"),
        (lambda model: study.text_attention(model, "a star").word("ring"), "has no 'ring'"),
        (lambda model: study.text_attention(model, "a").word("a", layer="mlp"), "No layer 'mlp' of the text encoder"),
        (lambda model: study.text_attention(model, "a").word("a", head=99), "There are heads 0 to"),
        (lambda model: study.text_attention("shapes", "a"), "An instrument looks at a model or a sampler"),
    ],
)
def test_bad_input_is_one_sentence(tiny, act, says):
    with pytest.raises(ValueError, match=says) as caught:
        act(tiny)
    assert "\n" not in str(caught.value)

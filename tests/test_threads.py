"""One model in several threads: each draws and encodes what it does alone, from the very first use on."""

from __future__ import annotations

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sd
from sd.prompts.encoder import TextEncoder
from sd.prompts.words import find_word, words_of
from sd.weights.unread import at_rest, target
from tests import ALL
from tests.layouts import make_model

THREADS = 8
TEXTS = [
    "a red star",
    "",
    "a red star above a blue ring on a white background",
    "a small green cross " * 30,
    "a large yellow circle left of a black square on a white background",
]
CALL = {"num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(autouse=True)
def often_in_turn():
    """Threads take turns a hundred times as often as usual, and what is said about long prompts is not heard."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.setswitchinterval(before)


def at_once(jobs, threads=THREADS):
    """What these functions return, called by several threads, which all begin at the same moment."""
    start = threading.Barrier(threads, timeout=60)
    with ThreadPoolExecutor(threads, initializer=start.wait) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def draw_and_encode(drawings, encodings):
    alone = sd.SimpleSampler(sd.load("shapes"))
    contexts = [alone.encode_prompt([text]) for text in TEXTS]
    pictures = [alone(TEXTS[i % len(TEXTS)], seed=i, **CALL) for i in range(drawings)]
    model = sd.load("shapes")
    sampler = sd.SimpleSampler(model)

    def drawing(i):
        return torch.equal(sampler(TEXTS[i % len(TEXTS)], seed=i, **CALL), pictures[i])

    def encoding(i):
        return torch.equal(sampler.encode_prompt([TEXTS[i % len(TEXTS)]]), contexts[i % len(TEXTS)])

    jobs = [lambda i=i: encoding(i) for i in range(encodings)]
    every = max(1, encodings // drawings)
    for i in range(drawings):
        jobs.insert(i * (every + 1), lambda i=i: drawing(i))
    same = at_once(jobs)
    assert len(same) == drawings + encodings
    assert all(same), f"{same.count(False)} of {len(same)} are other ones"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drawings", "encodings"), [(24, 400), *([(200, 3000)] if ALL else [])]
)  # the larger one takes minutes
def test_drawings_and_encodings_in_eight_threads_are_those_alone(drawings, encodings):
    draw_and_encode(drawings, encodings)


def test_encodings_in_eight_threads_are_those_alone(tiny):
    text = tiny.text.with_tensors(tiny.text.state_dict())
    wanted = [tiny.encode_prompt(prompt) for prompt in TEXTS]
    got = at_once([lambda i=i: text.encode(TEXTS[i % len(TEXTS)]) for i in range(400)])
    assert all(torch.equal(context, wanted[i % len(TEXTS)]) for i, context in enumerate(got))


def test_words_are_found_in_eight_threads(tiny):
    text, prompt = tiny.text, "a star and a ring"
    wanted = words_of(text, prompt), find_word(text, prompt, "a")
    got = at_once([lambda: (words_of(text, prompt), find_word(text, prompt, "a"))] * 200)
    assert all(one == wanted for one in got)


def test_tokenizer_and_model_are_made_once(monkeypatch):
    asked, text = [], make_model().text
    texts = text.texts
    late = TextEncoder(text.model, lambda: asked.append(1) or texts)
    made = at_once([lambda: (late.tokenizer, late.model, late.ids("a star") and late.texts)] * 40)
    assert len({tuple(map(id, one)) for one in made}) == 1
    assert asked == [1]


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """A file in half precision: to compute in float32 its weights have to be read and converted first."""
    path = tmp_path_factory.mktemp("threads") / "half.safetensors"
    sd.save(tiny, path, torch.float16)
    return path


WAYS = {
    "simple": sd.SimpleSampler,
    "lean": lambda model: sd.LeanSampler(model, "2GB"),  # free memory would make another plan each time
    "simple, fast": lambda model: sd.SimpleSampler(sd.fast(model)),
    "lean, fast": lambda model: sd.LeanSampler(sd.fast(model), "2GB"),
}


@pytest.fixture(scope="module")
def alone(half):
    """What each way draws with a model that nobody else has."""
    return {
        way: make(sd.load(half))("a red star", seed=3, **CALL | {"output_type": "pt"}) for way, make in WAYS.items()
    }


@pytest.mark.parametrize("ways", [("simple", "lean"), pytest.param(tuple(WAYS), marks=pytest.mark.slow)])
def test_samplers_of_one_model_side_by_side_draw_what_they_draw_alone(half, alone, ways):
    for _ in range(2 if len(ways) > 2 else 6):  # the first use of a model may differ from the next
        model = sd.load(half)

        def draw(way, model=model):
            return way, WAYS[way](model)("a red star", seed=3, **CALL | {"output_type": "pt"})

        for way, picture in at_once([lambda way=way: draw(way) for way in 3 * ways], 2 * len(ways)):
            assert torch.equal(picture, alone[way]), way


def test_samplers_of_one_model_in_turn_draw_what_they_draw_alone(half, alone):
    model = sd.load(half)
    samplers = {way: make(model) for way, make in WAYS.items()}
    steps = {way: sampler.stream("a red star", seed=3, num_inference_steps=2) for way, sampler in samplers.items()}
    last = {}
    while steps:  # a step of each, again and again
        for way in list(steps):
            if (step := next(steps[way], None)) is None:
                del steps[way]
            else:
                last[way] = step.latents
    for way, latents in last.items():
        assert torch.equal(samplers[way].decode(latents, "pt"), alone[way]), way


def test_reading_a_part_waits_while_a_copy_is_made_of_it(half):
    model = sd.load(half)
    with at_rest(model.unet):
        thread = threading.Thread(target=lambda: model.unet.state_dict())
        thread.start()
        thread.join(0.3)
        assert target(model.unet)
    thread.join()
    assert target(model.unet) is None

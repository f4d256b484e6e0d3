"""Attention against its definition; chunks against the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from sd.attention import (
    BasicTransformerBlock,
    CrossAttention,
    Workspace,
    attention,
    chunked_attention,
    use_attention,
)


def qkv(heads=2, queries=7, keys=5, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, heads, n, dim, generator=generator, dtype=torch.float64).to(dtype)
        for n in (queries, keys, keys)
    ]


def definition(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


def test_the_file_and_the_function_in_it():
    import sd

    q, k, v = qkv()
    torch.testing.assert_close(sd.attention.attention(q, k, v), definition(q, k, v), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 33),
    st.integers(1, 33),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(),
)
def test_chunks_are_exact_whatever_the_lengths(heads, queries, keys, dim, chunk, seed):
    q, k, v = qkv(heads, queries, keys, dim, seed=seed % 2**32)
    torch.testing.assert_close(chunked_attention(q, k, v, chunk=chunk), definition(q, k, v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(100, 100, 8), (100, 7, 8), (33, 64, 512)])
def test_in_place_with_a_workspace_nothing_is_allocated(queries, keys, dim, dtype):
    # As the transformer block has them: heads next to each other in memory.
    q, k, v = (torch.randn(2, n, 4, dim).to(dtype).transpose(1, 2) for n in (queries, keys, keys))
    workspace, wanted = Workspace(), definition(q.double(), k.double(), v.double())
    chunked_attention(q, k, v, chunk=32, out=torch.empty_like(q), workspace=workspace)  # allocates
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        out = chunked_attention(q, k, v, chunk=32, out=q, workspace=workspace)
    assert [event.name for event in recorded.events() if event.self_cpu_memory_usage > 0] == []
    assert out is q
    assert (q.double() - wanted).abs().max() < (2e-3 if dtype == torch.float16 else 1e-5)


def test_of_equal_values_comes_that_value():
    """The 2022 pipeline that sliced keys summed the slices' softmaxes: five slices gave 5."""
    q, k, _ = qkv(queries=10, keys=50)
    ones = torch.ones(2, 2, 50, 4, dtype=torch.float64)
    torch.testing.assert_close(chunked_attention(q, k, ones, chunk=10), torch.ones(2, 2, 10, 4).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_logits_stay_finite(dtype):
    q, k, v = qkv(queries=64, keys=64, dim=64)
    q, k, v = (200 * q).to(dtype), (200 * k).to(dtype), v.to(dtype)  # logits up to 10^5, over float16's range
    got = chunked_attention(q, k, v, chunk=16)
    assert got.dtype == dtype
    assert got.isfinite().all()
    expected = definition(q.double(), k.double(), v.double())
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


def test_inputs_are_not_written_into():
    q, k, v = qkv()
    before = [z.clone() for z in (q, k, v)]
    chunked_attention(q, k, v, chunk=2)
    for z, old in zip((q, k, v), before, strict=True):
        assert torch.equal(z, old)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_must_be_positive(chunk):
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        chunked_attention(*qkv(), chunk=chunk)


def test_one_model_is_given_an_attention_and_others_are_not():
    one, other = CrossAttention(8, 2), CrossAttention(8, 2)
    x, calls = torch.randn(1, 3, 8), []

    def counting(q, k, v):
        calls.append(tuple(q.shape))
        return attention(q, k, v)

    def leave_by_an_exception():
        with use_attention(one, counting):
            one(x)
            other(x)
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        leave_by_an_exception()
    one(x)  # restored
    assert calls == [(1, 2, 3, 4)]


def test_the_transformer_block_is_trainable():
    block = BasicTransformerBlock(16, 2, 8)
    block(torch.randn(2, 5, 16), torch.randn(2, 3, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())

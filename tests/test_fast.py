"""The fast model computes what the textbook computes: float64 to 1e-10, float32 to its rounding."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sd
from sd.attention import CrossAttention, FeedForward, SpatialTransformer, attention
from sd.operations import TEXTBOOK, copy_of
from sd.speed.operations import Fast
from sd.speed.packed import Conv, Derived, Linear
from sd.speed.winograd import POINTS, Norm, Winograd, direct, transforms
from sd.unet import ResBlock
from sd.unet import Upsample as UNetUpsample
from sd.vae import AttnBlock, ResnetBlock
from sd.vae import Upsample as VAEUpsample
from sd.weights.unread import read_weights, target
from tests.layouts import make_model

fast_py = inspect.getmodule(sd.fast)  # sd.fast is the function
ops_py = importlib.import_module("sd.speed.operations")
packed = importlib.import_module("sd.speed.packed")
winograd_py = importlib.import_module("sd.speed.winograd")

BOUND = {torch.float64: 1e-10, torch.float32: 5e-6}
DTYPES = [torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def noise(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got, wanted, bound=None):
    assert got.shape == wanted.shape
    error = ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
    assert error < (bound or BOUND[got.dtype])
    return error


@pytest.fixture
def all_ways(monkeypatch):
    """Small layers take the ways of large ones."""
    monkeypatch.setattr(ops_py, "CHANNELS", 1)
    monkeypatch.setattr(ops_py, "TOKENS", 48)
    monkeypatch.setattr(ops_py, "MOMENTS", 1 << 10)
    monkeypatch.setattr(ops_py, "NORMED", 1 << 9)
    monkeypatch.setattr(winograd_py, "TILES", 12)


# ---- Winograd


@pytest.mark.parametrize(("m", "r"), list(POINTS))
def test_a_tile_is_a_correlation(m, r):
    a, g, b = transforms(m, r)
    d, w = noise(m + r - 1), noise(r, seed=1)
    close(a @ ((g @ w) * (b @ d)), torch.stack([d[i : i + r] @ w for i in range(m)]), 1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("tiles", [3, 128])
@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 9, 11), (3, 5, 7), (1, 1, 1), (2, 17, 33)])
def test_winograd(shape, tiles, m, dtype, monkeypatch):
    monkeypatch.setattr(winograd_py, "TILES", tiles)
    batch, height, width = shape
    x, w = noise(batch, height, width, 6, dtype=dtype), noise(16, 6, 3, 3, dtype=dtype, seed=1) / 7
    bias, add = noise(16, dtype=dtype, seed=2), noise(batch, height, width, 16, dtype=dtype, seed=3)
    norm = Norm(noise(batch, 1, 1, 6, dtype=dtype, seed=4), noise(batch, 1, 1, 6, dtype=dtype, seed=5))
    kept = x.clone(), add.clone()

    y = F.silu(x.double() * norm.scale.double() + norm.shift.double()).permute(0, 3, 1, 2)
    wanted = F.conv2d(y, w.double(), bias.double(), padding=1).permute(0, 2, 3, 1) + add.double()
    close(Winograd(w, bias, m)(x, norm, add), wanted)

    big = F.interpolate(x.double().permute(0, 3, 1, 2), scale_factor=2.0)
    wanted = F.conv2d(big, w.double(), bias.double(), padding=1).permute(0, 2, 3, 1)
    close(Winograd(w, bias, m, upsample=True)(x), wanted)
    close(direct(SimpleNamespace(weight=w, bias=bias), pack=True)(x), wanted)
    assert torch.equal(x, kept[0])
    assert torch.equal(add, kept[1])


@pytest.mark.parametrize(("m", "upsample", "bound"), [(4, False, 2.0), (2, False, 1.0), (4, True, 2.0)])
def test_winograd_rounds_hardly_more_than_the_definition(m, upsample, bound):
    x, w = noise(1, 24, 24, 320, dtype=torch.float32), noise(32, 320, 3, 3, dtype=torch.float32, seed=1) / 54
    image = x.permute(0, 3, 1, 2)
    if upsample:
        image = F.interpolate(image, scale_factor=2.0)
    wanted = F.conv2d(image.double(), w.double(), padding=1).permute(0, 2, 3, 1)
    plain = F.conv2d(image, w, padding=1).permute(0, 2, 3, 1)
    fast = Winograd(w, torch.zeros(32), m, upsample)(x)
    errors = [(y.double() - wanted).norm() / wanted.norm() for y in (fast, plain)]
    assert errors[0] < bound * errors[1]


# ---- packed weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", [True, False])
def test_linear_and_conv(dtype, pack):
    x, w, b = noise(3, 40, 24, dtype=dtype), noise(48, 24, dtype=dtype, seed=1) / 5, noise(48, dtype=dtype, seed=2)
    layer = Linear(lambda: w, w, bias=lambda: b, pack=pack)
    wanted = F.linear(x.double(), w.double(), b.double())
    close(layer(x), wanted)
    close(layer(x, gelu=True), F.gelu(wanted))
    close(layer(x[:1, :3]), wanted[:1, :3])
    image, k = noise(2, 9, 11, 24, dtype=dtype), noise(16, 24, 3, 3, dtype=dtype, seed=3) / 15
    for stride in (1, 2):
        conv = Conv(lambda: k, k, bias=lambda: b[:16], stride=stride, padding=1, pack=pack)
        wanted = F.conv2d(image.double().permute(0, 3, 1, 2), k.double(), b[:16].double(), stride, 1)
        close(conv(image), wanted.permute(0, 2, 3, 1))


def test_derived_is_made_anew_when_weights_change():
    w = nn.Parameter(torch.ones(3))
    twice = Derived(lambda factor: w.detach() * factor, w)
    first = twice(2)
    assert twice(2) is first
    assert twice(3).sum() == 9
    w.add_(1)
    assert twice(3).sum() == 18
    w.data = torch.zeros(3)
    assert twice(3).sum() == 0
    twice.forget()
    assert twice.kept is None
    assert twice(3).sum() == 0


def test_derived_is_not_half_made():
    fails = [1]

    def make(size):
        if size in fails:
            raise KeyboardInterrupt
        return size

    kept = Derived(make)
    assert kept(2) == 2
    before = []
    other = Derived(lambda size: before.append(other.kept) or size)
    assert [other(1), other(2)] == [1, 2]
    assert before == [None, None]  # never two in memory
    with pytest.raises(KeyboardInterrupt):
        kept(1)
    assert kept(2) == 2
    fails.clear()
    assert kept(1) == 1


def test_packed_weights_serve_fewer_rows(monkeypatch):
    packs = []
    x, w = noise(3000, 24, dtype=torch.float32), noise(48, 24, dtype=torch.float32, seed=1) / 5
    layer = Linear(lambda: w, w)
    make = layer.packed.make
    layer.packed.make = lambda dtype, rows: packs.append(rows) or make(dtype, rows)
    for rows in (1000, 999, 17):
        close(layer(x[:rows], 1000), F.linear(x[:rows].double(), w.double()))
    assert packs == [1000] * ops_py.onednn(x)


# ---- layers


def given_fast(module, pack=True):
    """A copy of a module, with random weights, that is fast, and the module."""
    for i, p in enumerate(module.parameters()):
        p.copy_(noise(*p.shape, seed=i) / (p[0].numel() ** 0.5 if p.ndim > 1 else 1))
    return module, copy_of(module, Fast(pack))


LAYERS = {
    "conv": lambda: (nn.Conv2d(16, 32, 3, padding=1), noise(2, 16, 13, 26)),
    "1x1": lambda: (nn.Conv2d(16, 32, 1), noise(2, 16, 5, 6)),
    "norm": lambda: (nn.GroupNorm(4, 16), noise(2, 16, 5, 6)),
    "stride 2": lambda: (nn.Conv2d(16, 32, 3, stride=2, padding=1), noise(2, 16, 9, 6)),
    "ResBlock": lambda: (ResBlock(16, 32, 24, 8), noise(2, 16, 13, 14), noise(2, 24)),
    "ResBlock, no shortcut": lambda: (ResBlock(16, 16, 24, 8), noise(3, 16, 27, 25), noise(3, 24)),
    "ResnetBlock": lambda: (ResnetBlock(16, 32, 8), noise(1, 16, 30, 31)),
    "UNet upsample": lambda: (UNetUpsample(16), noise(2, 16, 12, 13), torch.Size((24, 26))),
    "UNet upsample, odd": lambda: (UNetUpsample(16), noise(2, 16, 12, 13), torch.Size((23, 25))),
    "UNet upsample, small": lambda: (UNetUpsample(16), noise(2, 16, 3, 5), torch.Size((6, 10))),
    "VAE upsample": lambda: (VAEUpsample(16), noise(1, 16, 25, 26)),
    "self-attention": lambda: (CrossAttention(32, 4), noise(2, 40, 32)),
    "cross-attention": lambda: (CrossAttention(32, 4, 24), noise(2, 40, 32), noise(2, 77, 24)),
    "feed-forward": lambda: (FeedForward(32), noise(2, 70, 32)),
    "SpatialTransformer": lambda: (SpatialTransformer(32, 4, 24, 2, 8), noise(2, 32, 7, 9), noise(2, 77, 24)),
    "AttnBlock": lambda: (AttnBlock(32, 8), noise(2, 32, 7, 9)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_that_is_replaced(name, pack, dtype, all_ways):
    module, *inputs = LAYERS[name]()
    plain, quick = given_fast(module.double(), pack)
    assert "forward" in quick.__dict__ or isinstance(quick.ops, Fast)
    wanted = plain(*inputs)
    quick.to(dtype)  # after it was made fast
    got = quick(*(z.to(dtype) if isinstance(z, torch.Tensor) else z for z in inputs))
    close(got, wanted)
    assert next(plain.parameters()).dtype == torch.float64
    assert "forward" not in plain.__dict__
    assert getattr(plain, "ops", TEXTBOOK) is TEXTBOOK


def test_every_kind_is_tested(wide):
    tested = {type(LAYERS[name]()[0]) for name in LAYERS} | {nn.Linear}
    assert tested >= set(Fast.layers)
    blocks = {type(m) for part in (wide.unet, wide.vae) for m in part.modules() if hasattr(m, "ops")}
    assert blocks - tested == {
        type(wide.unet),
        type(wide.vae.encoder),
        type(wide.vae.decoder),
    }  # whole networks, below


def test_norms_far_from_zero_keep_their_variance():
    x = noise(2, 40, 30, 16, dtype=torch.float32) * 1e-2 + 30
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    wanted = F.silu(norm.double()(x.double().permute(0, 3, 1, 2).contiguous())).permute(0, 2, 3, 1)
    scale, shift = ops_py.affine(x.double(), norm)
    close(F.silu(ops_py.group_norm(x.double(), norm)), wanted, 1e-9)
    close(F.silu(x.double() * scale + shift), wanted, 1e-9)
    variances = [ops_py.affine(z, norm.to(z.dtype)).scale.double() for z in (x, x.double())]
    near = noise(1, 40, 30, 16, dtype=torch.float32) * 1e-5 + 30  # the mean's own rounding counts
    norm = nn.GroupNorm(4, 16, eps=1e-13)
    close(*(ops_py.affine(z, norm.to(z.dtype)).scale.double() for z in (near, near.double())), 1e-4)
    close(*variances, 1e-4)  # by the mean of squares less the square of the mean: wrong by 1


@pytest.mark.parametrize(
    "shape", [(1, 8, 1024, 77, 80), (2, 3, 700, 700, 40), (1, 1, 300, 300, 64), (1, 2, 2100, 90, 40)]
)
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("scores", [1 << 20, 1])  # 1: pieces of 256 queries, the last one short
def test_fast_attention(shape, scale, scores, monkeypatch):
    monkeypatch.setattr(ops_py, "SCORES", scores)
    b, h, t, s, d = shape
    q, k, v = (noise(b, n, h, d, seed=i).transpose(1, 2) for i, n in enumerate((t, s, s)))
    q = q * scale
    wanted = attention(q, k, v)
    close(ops_py.fast_attention(q, k, v), wanted)
    close(ops_py.fast_attention(q.float(), k.float(), v.float()), wanted, 2e-6 * scale)


# ---- whole models


@pytest.fixture(scope="module")
def wide():
    """A small model in float64, with channels enough for Winograd."""
    unet = sd.UNetConfig(
        model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), context_dim=64
    )
    return make_model(unet=unet, vae=sd.VAEConfig(ch=64, ch_mult=(1, 1), num_res_blocks=1), dtype=torch.float64)


@pytest.mark.parametrize("extra_memory", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 12, 12), (2, 25, 24), (3, 13, 17)])
def test_whole_networks(shape, dtype, extra_memory, wide):
    batch, height, width = shape
    quick = sd.fast(wide, extra_memory=extra_memory)
    x, t, context = noise(batch, 4, height, width), torch.linspace(1, 990, batch), noise(batch, 77, 64)
    image = noise(batch, 3, 2 * height, 2 * width)
    wanted = wide.unet(x, t, context), wide.vae.decode(x), wide.vae.encode(image)
    quick.to(dtype=dtype)
    x, context, image = (z.to(dtype) for z in (x, context, image))
    for got, right in zip(
        (quick.unet(x, t, context), quick.vae.decode(x), quick.vae.encode(image)), wanted, strict=True
    ):
        close(got, right)
    assert wide.dtype == torch.float64


def test_a_deepcopy_is_a_model_of_its_own(wide):
    quick = sd.fast(wide)
    x, t, context = noise(2, 4, 12, 12), torch.tensor([5.0, 5.0]), noise(2, 77, 64)
    wanted = quick.unet(x, t, context)
    other = copy.deepcopy(quick.unet)
    assert torch.equal(other(x, t, context), wanted)
    for p in other.parameters():
        p.mul_(1.01)
    assert not torch.equal(other(x, t, context), wanted)
    assert torch.equal(quick.unet(x, t, context), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_stale_text_and_no_stale_weights(wide, dtype):
    model = copy.deepcopy(wide.unet).to(dtype), wide.vae, wide.text
    plain = sd.StableDiffusion(*model, size=64)
    quick = sd.fast(plain)
    x, t, context = noise(2, 4, 12, 12, dtype=dtype), torch.tensor([5.0, 5.0]), noise(2, 77, 64, dtype=dtype)
    for _ in range(3):
        close(quick.unet(x, t, context), plain.unet(x, t, context))
        context.data += 1  # without a new version
    for p in plain.unet.parameters():
        p.mul_(1.01)
    close(quick.unet(x, t, context), plain.unet(x, t, context))
    plain.unet.load_state_dict({n: p * 1.01 for n, p in plain.unet.state_dict().items()})
    close(quick.unet(x, t, context), plain.unet(x, t, context))


def test_keys_and_values_of_a_text_are_computed_once(wide, monkeypatch):
    calls, compute = [], Linear.__call__
    monkeypatch.setattr(
        Linear, "__call__", lambda self, x, *a, **kw: calls.append(x.shape) or compute(self, x, *a, **kw)
    )
    quick = sd.fast(wide)
    x, t, context = noise(2, 4, 12, 12), torch.tensor([5.0, 5.0]), noise(2, 77, 64)
    quick.unet(x, t, context)
    assert calls.count(context.shape) == 2 * sum(isinstance(m, SpatialTransformer) for m in wide.unet.modules())
    calls.clear()
    quick.unet(x, t, context.clone())
    assert calls
    assert context.shape not in calls


def test_the_original_stays_and_weights_are_shared(wide):
    before = {n: (p, p.clone()) for n, p in wide.unet.state_dict(keep_vars=True).items()}
    quick = sd.fast(wide)
    x, t, context = noise(2, 4, 12, 12), torch.tensor([5.0, 5.0]), noise(2, 77, 64)
    quick.unet(x, t, context)
    assert type(quick) is type(wide)
    assert not quick.unet(x, t, context).requires_grad
    for name, p in quick.unet.state_dict().items():
        assert p.data_ptr() == before[name][0].data_ptr()
    for name, p in wide.unet.state_dict(keep_vars=True).items():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
    for part in (wide.unet, wide.vae):
        assert all("forward" not in m.__dict__ for m in part.modules())
        assert all(m.ops is TEXTBOOK for m in part.modules() if hasattr(m, "ops"))
        assert all(m.attend is attention for m in part.modules() if hasattr(m, "attend"))
    again = sd.fast(quick).to(dtype=torch.float32)  # its modules are its own
    close(again.unet(x.float(), t, context.float()), wide.unet(x, t, context))
    assert quick.dtype == torch.float64


def test_attention_can_still_be_replaced(wide):
    quick = sd.fast(wide)
    called = []

    def mine(q, k, v):
        called.append(q.shape)
        return attention(q, k, v)

    x, t, context = noise(1, 4, 12, 12), torch.tensor([5.0]), noise(1, 77, 64)
    with sd.use_attention(quick.unet, mine):
        close(quick.unet(x, t, context), wide.unet(x, t, context))
    blocks = [m for m in quick.unet.modules() if isinstance(m, CrossAttention)]
    assert len(called) == len(blocks)
    assert all(m.attend is ops_py.fast_attention for m in blocks)


def half(model, dtype):
    result = copy.copy(model)
    result.unet, result.vae = (copy.deepcopy(part).to(dtype) for part in (model.unet, model.vae))
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_textbook_where_products_in_it_are_slow(tiny, dtype, monkeypatch):
    monkeypatch.setattr(packed, "bfloat16_gain", lambda: 0.3)
    model = half(tiny, dtype)
    quick = sd.fast(model)
    x = noise(1, 4, 8, 8, dtype=dtype)
    t, context = torch.tensor([5.0]), noise(1, 77, 64, dtype=dtype)
    assert torch.equal(quick.unet(x, t, context), model.unet(x, t, context))
    assert all(m.ops is TEXTBOOK for m in quick.unet.modules() if hasattr(m, "ops"))


@pytest.mark.parametrize("onednn", [False, True])
def test_bfloat16_is_as_exact_as_the_textbook_in_it(wide, onednn, monkeypatch):
    """By oneDNN where this processor can; its operations by PyTorch's own everywhere."""
    if onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no products in bfloat16")
    monkeypatch.setattr(packed, "bfloat16_gain", lambda: float(onednn) * 2)
    model = half(wide, torch.bfloat16)
    unet, vae = (copy_of(part, Fast(True)) for part in (model.unet, model.vae))
    if onednn:
        quick = sd.fast(model)
        assert isinstance(quick.unet.ops, Fast)
        unet, vae = quick.unet, quick.vae
    x, context = noise(1, 4, 32, 32), noise(2, 77, 64)
    given = torch.cat([x, x]), torch.tensor([5.0, 5.0]), context
    small = tuple(v.bfloat16() if v.ndim > 1 else v for v in given)

    def error(got, expected):
        return ((got.double() - expected).norm() / expected.norm()).item()

    with torch.no_grad():
        expected, decoded = wide.unet(*given), wide.vae.decode(x)
        assert error(unet(*small), expected) < 1.5 * error(model.unet(*small), expected)
        textbook = error(model.vae.decode(x.bfloat16()), decoded)
        assert error(vae.decode(x.bfloat16()), decoded) < 1.5 * textbook


def test_whether_bfloat16_pays_is_measured():
    packed.bfloat16_gain.cache_clear()
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (packed.bfloat16_gain() > 0) == supported


@pytest.mark.parametrize(("gain", "said"), [(0.0, False), (1.2, False), (3.0, True)])
def test_the_command_says_where_bfloat16_is_faster(gain, said, wide, monkeypatch):
    settings = importlib.import_module("sd.cli.settings")
    monkeypatch.setattr(settings, "LARGE", 0)
    monkeypatch.setattr(packed, "bfloat16_gain", lambda: gain)
    for dtype in (None, "float32"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings.make_sampler(wide, settings.Drawing("a star", device="cpu", dtype=dtype))
        assert any("--dtype bfloat16" in str(w.message) for w in caught) == (said and dtype is None)


def test_the_builtin_model_draws_the_same_picture():
    model = sd.load("shapes")
    for prompt, guidance in (
        ("a red star above a blue ring on a white background", 7.5),
        ("a small green cross", 1.0),
    ):
        pictures = [
            np.asarray(
                sd.SimpleSampler(m)(prompt, num_inference_steps=6, guidance_scale=guidance, seed=2)[0], dtype=int
            )
            for m in (model, sd.fast(model))
        ]
        assert abs(pictures[0] - pictures[1]).max() <= 1


def test_the_command_is_fast_unless_it_is_told_to_be_exact(tiny, capsys, monkeypatch):
    from sd.cli import main, settings
    from sd.cli.settings import Drawing, make_sampler

    quickly, exactly = Drawing("a red star", device="cpu"), Drawing("a red star", device="cpu", exact=True)
    assert make_sampler(tiny, quickly).model is tiny  # too small to gain
    monkeypatch.setattr(settings, "LARGE", 1000)
    assert make_sampler(tiny, exactly).model is tiny
    quick = make_sampler(tiny, quickly).model
    assert quick is not tiny
    assert all(isinstance(m.ops, Fast) for m in quick.unet.modules() if isinstance(m, ResBlock))
    assert main(["a red star", "--variant", "lean", "--exact"]) == 2
    assert "--exact only works with --variant simple" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_lazy_model_is_prepared_from_the_file(dtype, wide, tmp_path):
    """The large weights stay as they are in the file, and the function is the same to the bit."""
    path = tmp_path / "model.safetensors"
    sd.save(wide, path, dtype)
    lazy, other = (sd.load(path, dtype=torch.float32) for _ in range(2))
    read_weights(other.unet), read_weights(other.vae)
    quick, loaded = sd.fast(lazy), sd.fast(other)
    assert (quick.dtype, quick.name) == (torch.float32, path.name)
    assert quick.hash == loaded.hash
    large = [p for p in quick.unet.parameters() if p.ndim == 4 and p.numel() > 1 << 15]
    assert len(large) > 8
    assert all(p.dtype == dtype for p in large)
    x, t, image = noise(2, 4, 25, 24).float(), torch.tensor([5.0, 5.0]), noise(1, 3, 50, 48).float()
    context = quick.encode_prompt(["", "a red star"])
    assert torch.equal(context, loaded.encode_prompt(["", "a red star"]))

    def alike(*inputs):
        x, context, image = inputs
        assert torch.equal(quick.unet(x, t, context), loaded.unet(x, t, context))
        assert torch.equal(quick.vae.decode(x), loaded.vae.decode(x))
        assert torch.equal(quick.vae.encode(image), loaded.vae.encode(image))

    alike(x, context, image)
    alike(x[..., :7], context, image)  # layers with too few rows to be packed
    assert dtype == torch.float32 or target(lazy.unet)  # and still as it was, for LeanSampler
    assert all(p.dtype == dtype for p in lazy.unet.parameters())
    if dtype != torch.float64:  # which has lost digits in `loaded`
        for other in (torch.float64, torch.bfloat16):
            quick.to(dtype=other), loaded.to(dtype=other)
            alike(*(z.to(other) for z in (x, context, image)))
    plain = sd.fast(lazy, extra_memory=False)
    assert {p.dtype for p in plain.unet.parameters()} == {torch.float32}
    assert target(lazy.unet) is None


def test_a_lazy_model_is_loaded_where_nothing_is_packed(tiny, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    sd.save(tiny, path, torch.float16)
    monkeypatch.setattr(fast_py, "onednn", lambda x: False)
    quick = sd.fast(sd.load(path, dtype=torch.float32))
    assert {p.dtype for p in quick.unet.parameters()} == {torch.float32}


def test_a_file_that_shrinks_while_it_is_in_use_ends_in_a_sentence(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    sd.save(tiny, path, torch.float16)
    sampler = sd.SimpleSampler(sd.fast(sd.load(path, dtype=torch.float32)))
    with pytest.raises(sd.LoadError, match="has shrunk"):  # noqa: PT012
        for _ in sampler.stream("a red star", num_inference_steps=3):
            path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("kind", ["LeanSampler", "ParallelSampler"])
def test_other_ways_to_run_take_a_fast_model_too(kind, tiny):
    """Each gives its own operations to the same parameters."""
    call = {"num_inference_steps": 2, "output_type": "latent"}
    wanted = sd.SimpleSampler(tiny)("a red star", **call)
    close(getattr(sd, kind)(sd.fast(tiny))("a red star", **call), wanted, 1e-5)


def test_filters_of_another_size_are_dropped():
    conv = ops_py.Conv3x3(nn.Conv2d(64, 64, 3, padding=1), pack=True)

    def prepared():
        return [any(w.kept for w in (way.product.packed, way.plain)) for way in (conv.four, conv.two)]

    conv(noise(1, 24, 24, 64, dtype=torch.float32))
    assert prepared() == [True, False]
    conv(noise(1, 16, 16, 64, dtype=torch.float32))
    assert prepared() == [False, True]


def test_results_lie_in_memory_as_the_textbooks(wide):
    quick = sd.fast(wide)
    x, t, context = noise(1, 4, 12, 12), torch.tensor([5.0]), noise(1, 77, 64)
    assert quick.unet(x, t, context=context).is_contiguous()
    assert quick.vae.decode(x).is_contiguous()
    assert quick.vae.encode(noise(1, 3, 24, 24)).is_contiguous()


def test_the_command_keeps_memory_where_it_is_simple(monkeypatch):
    from sd.adapt import other_vae
    from sd.cli.settings import Drawing, load_model
    from sd.speed import malloc

    seen = []
    monkeypatch.setattr(other_vae, "load", lambda *_, **__: seen.append("load"))
    for name in ("keep", "large_pages"):
        monkeypatch.setattr(malloc, name, lambda name=name: seen.append(name))
    load_model(Drawing("a red star", device="cpu"))
    load_model(Drawing("a red star", device="cpu", exact=True))
    load_model(Drawing("a red star", device="cpu", variant="lean"))
    assert seen == ["large_pages", "keep", "load", "large_pages", "keep", "load", "load"]


@pytest.mark.parametrize("extra_memory", [True, False])
def test_memory_is_kept_only_where_more_is_allowed(tiny, extra_memory, monkeypatch):
    kept = []
    monkeypatch.setattr(fast_py, "keep", lambda: kept.append(1))
    sd.fast(tiny, extra_memory=extra_memory)
    assert bool(kept) == extra_memory


@pytest.mark.parametrize("extra_memory", [True, False])
def test_what_cuda_would_be_given(extra_memory, wide, monkeypatch):
    """As far as a CPU can tell: the layout of the weights, what is compiled, and that no result is written over."""
    buffers = {}

    def compiled(forward, mode):  # as CUDA graphs do, gives the same memory each time
        assert mode == "max-autotune"
        return lambda *args, **kwargs: buffers.setdefault(forward, forward(*args)).copy_(forward(*args, **kwargs))

    monkeypatch.setattr(torch, "compile", compiled)
    quick = wide.with_parts(copy_of(wide.unet, TEXTBOOK), copy_of(wide.vae, TEXTBOOK), wide.text)
    for part in (quick.unet, quick.vae):
        fast_py.on_cuda(part, compile=True, extra_memory=extra_memory)
    assert len(buffers) == 0
    kernel = quick.unet.input_blocks[1][0].in_layers[2].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == extra_memory
    assert wide.unet.input_blocks[1][0].in_layers[2].weight.is_contiguous()
    x, t, context = noise(2, 4, 12, 12), torch.tensor([5.0, 5.0]), noise(2, 77, 64)
    for network, ours, inputs in (
        (quick.unet, wide.unet, (x, t, context)),
        (quick.vae.decode, wide.vae.decode, (x,)),
    ):
        first = network(*inputs)
        kept = first.clone()
        network(*(1 - z for z in inputs))
        assert torch.equal(first, kept)
        close(first, ours(*inputs))
    assert len(buffers) == 2

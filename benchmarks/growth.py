"""How time grows with the size of a picture: `sd.fast`, one UNet call with guidance and one decoding, per pixel.

    python -m benchmarks.growth                            # 512 to 1536, float32; full size, random weights
    python -m benchmarks.growth --sizes 512 1024 --dtype bfloat16
    python -m benchmarks.growth --small --sizes 64 128     # a small model, to try the command

Self-attention grows with the square of the pixels, so the UNet's call is measured as it is, and once more with
attention left out (values are handed on as they are); what is left should grow as the pixels do. Of each size the
least of `--calls` calls after one that warms up, sizes in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sd
from sd.compare.reference import random_model_of

from . import harness


def no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the shape of attention's result, in no time."""
    return v if v.shape[-2] == q.shape[-2] else v[..., :1, :].expand(*q.shape[:-1], v.shape[-1])


@torch.no_grad()
def seconds(model: sd.StableDiffusion, size: int, calls: int) -> dict[str, float]:
    """Of the work by name; each after a call that warms up, for weights are prepared for each size."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, size // 8, size // 8, generator=g).to(model.dtype)
    context = torch.randn(2, 77, model.unet.config.context_dim, generator=g).to(model.dtype)
    both, t = torch.cat([x, x]), torch.tensor([481.0, 481.0])
    found: dict[str, float] = {}

    def measure(name: str, call: Callable[[], Tensor]) -> None:
        times = []
        for _ in range(calls + 1):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[name] = min(times[1:])

    measure("UNet call", lambda: model.unet(both, t, context))
    with sd.use_attention(model.unet, no_attention):
        measure("UNet call without attention", lambda: model.unet(both, t, context))
    measure("VAE decode", lambda: model.vae.decode(x))
    with sd.use_attention(model.vae, no_attention):
        measure("VAE decode without attention", lambda: model.vae.decode(x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 768, 1024, 1536])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model, whose figures mean nothing")
    parser.add_argument("--results", type=Path, help="a Markdown file that the table is put into")
    args = parser.parse_args()
    facts = harness.machine(torch.get_num_threads()) | {"dtype": args.dtype}
    report = harness.Report(args.results, f"Growth on {facts['cpu']}, {args.dtype}", facts)
    model = random_model_of("small" if args.small else "full", getattr(torch, args.dtype))
    found = {size: seconds(sd.fast(model), size, args.calls) for size in args.sizes}
    first, rows = args.sizes[0], []
    for name in found[first]:
        pixel = {size: found[size][name] / size**2 for size in args.sizes}
        rows.append([name, *(f"{found[s][name]:.2f} s, {pixel[s] / pixel[first]:.2f} x" for s in args.sizes)])
    head = [f"seconds, and a pixel's time by that at {first}", *(f"{s} x {s}" for s in args.sizes)]
    report.say(harness.markdown(head, rows))


if __name__ == "__main__":
    main()

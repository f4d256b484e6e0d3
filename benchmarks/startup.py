"""How long until something happens: imports, help, loading a full-size file, one picture by the built-in model.

    python -m benchmarks.startup [--folder DIR]     # writes and removes 2.1 GB there

Each figure is the median of fresh processes, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 5

WRITE = """
import sys, torch, sd
from tests.layouts import full_size_tensors
from sd.weights.checkpoint import write_safetensors
write_safetensors(sys.argv[1], full_size_tensors(torch.float16))
"""
LOAD = """
import sys, time, torch, sd
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
before, start = anonymous(), time.perf_counter()
model = sd.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]), tokenizer=sys.argv[3])
print(time.perf_counter() - start, anonymous() - before)
"""
DRAW = """
import time, sd
model = sd.load("shapes"); sampler = sd.SimpleSampler(model)
def draw(): return sampler("a red star above a blue ring on a white background", num_inference_steps=30)
draw(); start = time.perf_counter(); draw(); print(time.perf_counter() - start, 0)
"""
TIMED = """
import sys, time
start = time.perf_counter(); {0}; middle = time.perf_counter(); {1}
print(time.perf_counter() - middle, 0)
"""


def python(code: str, *args: object) -> tuple[float, float]:
    """What the code prints in a fresh process: seconds, and MB of anonymous memory gained."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def show(what: str, bar: str, results: list[tuple[float, float]]) -> None:
    seconds, memory = zip(*results, strict=True)
    grown = f", {statistics.median(memory):.0f} MB anonymous" if any(memory) else ""
    print(
        f"{what:58} {statistics.median(seconds):7.3f} s ({min(seconds):.3f} to {max(seconds):.3f}){grown}"
        f"   bar: {bar}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where the 2.1 GB file goes for a while")
    args = parser.parse_args()
    import torch
    import transformers

    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads; medians of {RUNS} (smallest to largest)"
    )
    runs = range(RUNS)
    show(
        "import sd after import torch",
        "0.3 s",
        [python(TIMED.format("import torch", "import sd")) for _ in runs],
    )
    names = "import sd; sd.load; sd.SimpleSampler; sd.PNDM; sd.UNet"
    show("the same, and every name used", "0.3 s", [python(TIMED.format("import torch", names)) for _ in runs])
    code = "import subprocess; subprocess.run([sys.executable, '-m', 'sd', '--help'], stdout=subprocess.DEVNULL)"
    show("artist --help, with the interpreter", "0.2 s", [python(TIMED.format("pass", code)) for _ in runs])
    code = "subprocess.run([sys.executable, '-c', 'pass'])"
    show("(the interpreter alone)", "-", [python(TIMED.format("import subprocess", code)) for _ in runs])
    show("one picture, 30 steps, warm: 31 UNet calls of batch 2", "5 s", [python(DRAW) for _ in range(3)])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        from tests.layouts import write_tokenizer

        tokenizer = write_tokenizer(Path(folder) / "tokenizer")
        path = Path(folder) / "full.safetensors"
        subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True, env=os.environ)
        for dtype, bar in (("float16", "1 s"), ("float32", "5 s")):
            results = [python(LOAD, path, dtype, tokenizer) for _ in runs]
            show(f"sd.load, full-size float16 file as {dtype}", bar, results)


if __name__ == "__main__":
    main()

"""One picture over two ranks: how long, how much goes between them, and what the host holds.

    python -m benchmarks.parallel                 # full size, 512 x 512: writes and removes 4.3 GB
    python -m benchmarks.parallel --size 256x320 --rounds 1

The weights are random, in one float32 file, which all ranks map. Each run is a world of fresh processes on gloo; runs
are interleaved and times are ratios of medians. `1 x 2` is one rank with two threads, the same cores as `2 x 1`.
Bytes and exchanges are counted in the run, PSS is read from /proc/self/smaps_rollup: what is shared counts in parts.
The last table is a prediction for GPUs, from operations and counted bytes, at the rates it names.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

RANK = """
import json, os, sys, time
import torch
threads, split, call = int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(threads)
import sd
from sd.parallel.ranks import world
kind = sd.ParallelSampler if split else sd.SimpleSampler
sampler = kind(sd.load(sys.argv[1]), split) if split else kind(sd.load(sys.argv[1]))
context = torch.randn(2, 1, 77, 768, generator=torch.Generator().manual_seed(0))
marks = [time.perf_counter()]
for step in sampler.stream(prompt_embeds=context[0], negative_prompt_embeds=context[1], **call):
    if split and step.index: counted = vars(sampler.traffic).copy()
    if split: sampler.traffic.clear()
    marks.append(time.perf_counter())
image = sampler.decode(step.latents, "pt"); marks.append(time.perf_counter())
pss = next(int(l.split()[1]) for l in open("/proc/self/smaps_rollup") if l.startswith("Pss:")) * 1024
if sys.argv[5]: torch.save(image, sys.argv[5]) if world()[0] == 0 else None
print(json.dumps({"step": min(b - a for a, b in zip(marks[1:-2], marks[2:-1])), "vae": marks[-1] - marks[-2],
                  "pss": pss, "traffic": counted if split else None}))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(file: Path, ranks: int, threads: int, split: dict[str, int], call: dict[str, Any], out: str) -> list[dict]:
    """What each rank of a world reports."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        env = os.environ | {"OMP_NUM_THREADS": f"{threads}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
        env |= {"RANK": f"{rank}", "WORLD_SIZE": f"{ranks}"}
        arguments = [str(file), f"{threads}", json.dumps(split), json.dumps(call), out]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", RANK, *arguments],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in processes:
        output, error = process.communicate()
        if process.returncode:
            raise SystemExit(f"a rank failed:\n{error[-2000:]}")
        results.append(json.loads(output.splitlines()[-1]))
    return results


JOBS: dict[str, tuple[int, int, dict[str, int]]] = {
    "simple, 1 x 1": (1, 1, {}),
    "simple, 1 x 2": (1, 2, {}),
    "guidance, 2 x 1": (2, 1, {"guidance": 2}),
    "rows, 2 x 1": (2, 1, {"rows": 2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", type=Path, help="a float32 file of full size, in place of a temporary one")
    parser.add_argument(
        "--kills", type=int, default=0, help="only this: kill a rank so many times, and see what is said"
    )
    parser.add_argument("--lock", type=Path, help="hold this file's lock during each run")
    args = parser.parse_args()
    if args.kills:
        kills(args.kills)
        return
    import torch

    width, height = map(int, args.size.split("x"))
    call = {"num_inference_steps": args.steps, "height": height, "width": width, "scheduler": "ddim"}
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, gloo, {os.cpu_count()} cores, float32, "
        f"{width} x {height}, guidance on, {args.steps} UNet calls; medians of {args.rounds} rounds (least to most)"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = args.weights or write(Path(folder))
        results: dict[str, list[list[dict]]] = {name: [] for name in JOBS}
        for _ in range(args.rounds):
            for name, (ranks, threads, split) in JOBS.items():
                with locked(args.lock) if args.lock else nullcontext():
                    results[name].append(run(file, ranks, threads, split, call, f"{folder}/{name}.pt"))
                print(".", end="", flush=True)
        print()
        report(results)
        exact(Path(folder))
    predict(height // 8, width // 8)


class locked:  # noqa: N801
    def __init__(self, path: Path):
        self.file = open(path, "w")  # noqa: SIM115

    def __enter__(self) -> None:
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self.file.close()


def write(folder: Path) -> Path:
    """Full-size random weights in float32, by a process of its own: this one shall stay small."""
    code = (
        "import sys, sd; from tests.layouts import TextConfig, make_model\n"
        "sd.save(make_model(sd.UNetConfig(), sd.VAEConfig(), TextConfig(), size=512), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, folder / "full.safetensors"], check=True)
    return folder / "full.safetensors"


def report(results: dict[str, list[list[dict]]]) -> None:
    def times(name: str, key: str) -> list[float]:
        return [max(rank[key] for rank in world) for world in results[name]]

    def median(name: str, key: str) -> float:
        return statistics.median(times(name, key))

    print(f"{'':18} s a step (spread)     x 1x1  / 1x2   VAE s  x 1x1   exchanges  MB received  PSS GB, all ranks")
    for name, worlds in results.items():
        step, low, high = median(name, "step"), min(times(name, "step")), max(times(name, "step"))
        traffic = worlds[0][0]["traffic"]
        moved = f"{traffic['exchanges']:9d}  {traffic['received'] / 1e6:11.1f}" if traffic else " " * 22
        pss = statistics.median(sum(rank["pss"] for rank in world) for world in worlds) / 1e9
        print(
            f"{name:18} {step:6.2f} ({low:.2f} to {high:.2f})  {median('simple, 1 x 1', 'step') / step:6.2f}  "
            f"{step / median('simple, 1 x 2', 'step'):5.2f}  {median(name, 'vae'):6.2f}  "
            f"{median('simple, 1 x 1', 'vae') / median(name, 'vae'):5.2f}  {moved}  {pss:6.2f}"
        )


def exact(folder: Path) -> None:
    import torch

    wanted = torch.load(folder / "simple, 1 x 1.pt")
    for name in list(JOBS)[1:]:
        found = torch.load(folder / f"{name}.pt")
        pixels = (found * 255).round().int() - (wanted * 255).round().int()
        relative = ((found - wanted).norm() / wanted.norm()).item()
        print(f"{name:18} against simple, 1 x 1: {relative:.1e} relative, pixels at most {pixels.abs().max()} apart")


def kills(count: int) -> None:
    """kill -9 on one of three ranks at a random moment, also while they start."""
    chance = random.Random(0)
    took = []
    for k in range(count):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "sd", "a red star", "--variant", "parallel", "--ranks", "3"]
            command += ["--split", "rows=3", "--steps", "1000", "--device", "cpu", "-o", f"{folder}/star.png"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while len(ranks := children(process.pid)) < 3:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 15))
            victim = chance.randrange(3)
            began = time.perf_counter()
            os.kill(ranks[victim], signal.SIGKILL)
            error = process.communicate()[1]
            took.append(time.perf_counter() - began)
            said = [line for line in error.splitlines() if "error:" in line]
            right = len(said) == 1 and f"Rank {victim} failed" in said[0] and "SIGKILL" in said[0]
            left = [pid for pid in ranks if Path(f"/proc/{pid}").exists()] + os.listdir(folder)
            print(f"{k + 1:3}: rank {victim}, {took[-1]:4.1f} s, exit {process.returncode}, left {left}, {said}")
            assert right, error
            assert process.returncode == 1
            assert not left
    print(f"{count} of {count} right; ended after {max(took):.1f} s at most")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def predict(height: int, width: int) -> None:
    """For GPUs, from operations and bytes; not a measurement."""
    import sd
    from sd.parallel.sampler import CUDA, Split, plan_split

    print(
        f"\nPREDICTED, not measured: one picture on GPUs, float16, at {CUDA.flops / 1e12:.0f} TFLOP/s, "
        f"{CUDA.bytes / 1e9:.0f} GB/s and {CUDA.exchange * 1e6:.0f} us an exchange"
    )
    for ranks, split in ((2, Split(1, 2, 1)), (2, Split(1, 1, 2)), (4, Split(1, 2, 2)), (8, Split(1, 2, 4))):
        plan = plan_split(sd.UNetConfig(), ranks, 1, True, (height, width), 2, CUDA, split)
        print(f"{ranks} GPUs, {split!s:22} {plan.seconds[Split()] / plan.seconds[split]:5.2f} times")


if __name__ == "__main__":
    main()

"""Two versions of this project beside each other: python -m benchmarks.versions OTHER_CHECKOUT

    git worktree add ../before v0.1 && python -m benchmarks.versions ../before --tasks unet vae lean rows

Both versions stay open, one process each (two where a picture is cut by rows), and work in turn: one call of the
UNet, one decoding or one step each, so that both see the same machine. Full size, random weights, 512 x 512, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .harness import machine, markdown, spread
from .parallel import free_port

WORKER = """
import json, sys, threading, time
import torch, sd
torch.set_grad_enabled(False)
task, file, threads, memory, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
torch.set_num_threads(threads)
g = torch.Generator().manual_seed(0)
context = torch.randn(2, 77, 768, generator=g)
x = torch.randn(1, 4, 64, 64, generator=g)

def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))

base = anonymous()
most = base
def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()

def work():
    model = sd.load(file, lazy=task == "lean")  # which version 0.1 needs for it
    if task in ("unet", "vae"):
        part = sd.fast(model).unet if task == "unet" else sd.fast(model).vae
        del model
        given = (torch.cat([x, x]), torch.tensor([481.0, 481.0]), context)
        while True:
            part(*given) if task == "unet" else part.decode(x)
            yield task
    sampler = sd.LeanSampler(model, memory) if task == "lean" else sd.ParallelSampler(model, {"rows": 2})
    call = dict(prompt_embeds=context[:1], negative_prompt_embeds=context[1:], scheduler="ddim", height=512)
    call["width"] = 512
    while True:
        for step in sampler.stream(num_inference_steps=steps, **call):
            yield "step"
            if task == "rows":
                sampler.traffic.clear()
        sampler.decode(step.latents)
        yield "decode"

units = work()
for _ in sys.stdin:
    start = time.perf_counter()
    what = next(units)
    seconds = time.perf_counter() - start
    traffic = vars(units.gi_frame.f_locals["sampler"].traffic) if task == "rows" else {}
    print(json.dumps({"what": what, "seconds": seconds, "peak": most - base, **traffic}), flush=True)
"""


class Version:
    """One version at work: a process, or one for each of two ranks."""

    def __init__(self, checkout: Path, task: str, file: Path, memory: str, steps: int):
        ranks = 2 if task == "rows" else 1
        threads = (os.cpu_count() or 2) // ranks
        env = os.environ | {"OMP_NUM_THREADS": f"{threads}"}
        if ranks > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}", "WORLD_SIZE": f"{ranks}"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", WORKER, task, f"{file}", f"{threads}", memory, f"{steps}"],
                cwd=checkout,  # first on the path of `python -c`, before an installed version
                env=env | ({"RANK": f"{rank}"} if ranks > 1 else {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def one(self) -> dict[str, Any]:
        """One unit of work; of two ranks, the slower one's account."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        if not all(lines):
            raise SystemExit("A version ended: its error stands above.")
        return max((json.loads(line) for line in lines), key=lambda found: float(found["seconds"]))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def compare(task: str, before: Path, file: Path, units: int, memory: str, steps: int) -> None:
    checkouts = {"before": before, "now": Path(__file__).parents[1]}
    versions = {name: Version(checkout, task, file, memory, steps) for name, checkout in checkouts.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in versions}
    try:
        for round_ in range(1 + units):
            for name in list(versions) if round_ % 2 else reversed(versions):
                found[name].append(versions[name].one())
                print(".", end="", flush=True)
    finally:
        for version in versions.values():
            version.end()
    print()
    rows = []
    for what in dict.fromkeys(unit["what"] for unit in found["now"]):
        times = {name: [u["seconds"] for u in units[1:] if u["what"] == what] for name, units in found.items()}
        for name, seconds in times.items():
            last = [u for u in found[name] if u["what"] == what][-1]
            ratio = f"{min(seconds) / min(times['before']):.3f}, {median_ratio(seconds, times['before']):.3f}"
            traffic = f"{last['exchanges']}, {last['received'] / 1e6:.1f} MB" if "exchanges" in last else ""
            rows.append([f"{task}: {what}", name, spread(seconds), f"{min(seconds):.2f}", ratio, traffic,
                         f"{last['peak'] / 1e6:.0f}"])  # fmt: skip
    head = [
        "work",
        "version",
        "seconds",
        "least",
        "to before: least, median",
        "exchanges, received",
        "peak MB (RssAnon)",
    ]
    print(markdown(head, rows), flush=True)


def median_ratio(seconds: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the other version")
    parser.add_argument("--tasks", nargs="*", default=["unet", "vae", "lean", "rows"])
    parser.add_argument("--units", type=int, default=8, help="calls, decodings or steps of each, after the first")
    parser.add_argument("--memory", default="300MB", help="of lean")
    parser.add_argument("--steps", type=int, default=3, help="of a picture, by lean and by rows")
    args = parser.parse_args()
    import torch

    import sd
    from tests.layouts import write_full_size

    print(json.dumps(machine(torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as folder:
        file, _ = write_full_size(Path(folder))
        wide = Path(folder) / "float32.safetensors"
        for task in args.tasks:
            if task == "rows" and not wide.exists():  # ranks share what is mapped, if nothing need be converted
                sd.convert(file, wide, torch.float32)
            compare(
                task, args.before.resolve(), wide if task == "rows" else file, args.units, args.memory, args.steps
            )


if __name__ == "__main__":
    main()

"""How fast: ours beside diffusers and OpenVINO, in turn, in fresh processes, with the same weights and inputs.

    python -m benchmarks.speed --json speed.json --plot speed.png       # everything, which takes long on a CPU
    python -m benchmarks.speed --tasks unet --rounds 3                  # one task; --peers textbook diffusers: some
    python -m benchmarks.speed --tasks vae --json speed.json --add      # puts this task's figures to the others
    python -m benchmarks.speed --device cuda --dtype float16 --steps 50

Tasks:  unet     one call, full size, guidance on (a batch of 2); seconds after a first call, which warms up
        vae      one decode of a picture
        first    from the start of the process to the first call of the UNet: imports, loading, the text; and to the
                 end of that call, in which sd.fast prepares its weights
        picture  from the start of the process to the PNG
Peers:  textbook               SimpleSampler's modules; of a picture `artist --exact`
        fast                   sd.fast(model); of a picture `artist` as it is (on a GPU the textbook, so left out)
        fast, no extra memory  sd.fast(model, extra_memory=False); not a picture
        fast compiled          on a GPU: sd.fast(model, compile=True); not a picture
        diffusers, diffusers channels-last     eager, in both memory formats
        diffusers compiled     torch.compile of the UNet, of the decoder
        diffusers best         on a GPU: channels-last, fused QKV, torch.compile(mode="max-autotune")
        OpenVINO               of diffusers' models, converted; computes in `--dtype` (pip install -e '.[bench]')

The weights are random, in float16 files (2.1 GB twice, and 3.8 GB for OpenVINO), computed in `--dtype`. Errors are
relative differences from the textbook's modules in float64: the largest, and by the norm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import harness

SCHEDULERS = ("pndm", "dpmpp_2m", "euler")  # as in benchmarks/peers.py, which takes long to import

FAST = ("fast", "fast, no extra memory", "fast compiled")
BARS = {  # what is to be reached on the CPU, by task and peer
    ("unet", "fast"): "1.45 x",
    ("unet", "OpenVINO"): "fast: 1.2 x faster than this",
    ("vae", "fast"): "1.50 x",
    ("first", "fast"): "4 s, and 2.00 x",
    ("picture", "fast"): "1.40 x",
}

TASKS = {
    "unet": "UNet call, batch 2 (guidance)",
    "vae": "VAE decode",
    "first": "process start to the first UNet call",
    "picture": "process start to PNG",
}
CPU = [
    "textbook",
    "fast",
    "fast, no extra memory",
    "diffusers",
    "diffusers channels-last",
    "diffusers compiled",
    "OpenVINO",
]
GPU = ["textbook", "fast", "fast compiled", "diffusers", "diffusers compiled", "diffusers best"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--peers", nargs="+", choices=list(dict.fromkeys(CPU + GPU)))
    add("--size", type=int, default=512)
    add("--steps", type=int, default=20, help="of a picture; PNDM calls the UNet once more")
    add("--scheduler", choices=SCHEDULERS, default="pndm", help="of a picture")
    add("--rounds", type=int, default=3, help="processes for each peer and task")
    add("--calls", type=int, default=2, help="timed calls in each process")
    add("--threads", type=int, help="torch's choice if not given")
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--weights", type=Path, help="folder to make the weights in, or with them from an earlier run; kept")
    add("--json", type=Path)
    add("--add", action="store_true", help="keep the figures of other tasks that are in the JSON file")
    add("--plot", type=Path)
    add("--results", type=Path, help="a Markdown file, such as benchmarks/RESULTS.md, that the tables are put into")
    add("--lock", type=Path, help="a file that each process holds (flock), where several share a machine")
    return parser.parse_args()


def present(peers: list[str] | None, device: str) -> tuple[list[str], dict[str, str]]:
    """The peers that can run here, and of the others why not."""
    missing: dict[str, str] = {}
    for peer, package in (("OpenVINO", "openvino"), ("diffusers", "diffusers")):
        if importlib.util.find_spec(package) is None:
            missing |= {p: f"{package} is not installed" for p in CPU + GPU if p.startswith(peer)}
    if not any(map(shutil.which, ("c++", "g++", "clang++"))) and device == "cpu":
        missing["diffusers compiled"] = "there is no C++ compiler"
    wanted = peers or (CPU if device == "cpu" else GPU)
    return [p for p in wanted if p not in missing], {p: missing[p] for p in wanted if p in missing}


def make_weights(folder: Path, lock: Path | None) -> tuple[Path, Path]:
    if not (folder / "hub/model_index.json").exists():
        print("making the weights", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        harness.fresh("benchmarks.peers", "weights", "", json.dumps({"folder": str(folder)}), lock=lock)
    return folder / "full.safetensors", folder / "hub"


def main() -> None:
    args = arguments()
    import torch

    threads = args.threads or torch.get_num_threads()
    peers, missing = present(args.peers, args.device)
    facts = harness.machine(threads) | {"device": args.device, "dtype": args.dtype, "size": args.size}
    if args.device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name(args.device)
    on = facts.get("gpu", facts["cpu"])
    report = harness.Report(args.results, f"Speed on {on}, {threads} threads, {args.dtype}", facts)
    print(json.dumps(facts, indent=1))
    for peer, why in missing.items():
        print(f"left out: {peer} ({why})")
    results: dict[str, Any] = {"machine": facts, "tasks": {}}
    if args.add and args.json and args.json.exists():
        results["tasks"] = json.loads(args.json.read_text())["tasks"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.weights or Path(scratch) / "weights"
        file, hub = make_weights(folder, args.lock)
        how = {"file": str(file), "hub": str(hub), "threads": threads, "calls": args.calls, "steps": args.steps}
        how |= {"size": args.size, "device": args.device, "dtype": args.dtype, "scheduler": args.scheduler}
        for task in args.tasks:
            print(f"{TASKS[task]}:", flush=True)
            entry = results["tasks"][task] = {"machine": facts, "steps": args.steps, "peers": {}}

            def keep(runs: dict[str, list[dict]], entry: dict = entry) -> None:
                entry["peers"] = runs
                if args.json:
                    harness.write_json(args.json, results)

            measure(task, peers, how, Path(scratch), args, keep)
            differences(task, entry, how, Path(scratch), args.lock)
            keep(entry["peers"])
            report.say(table(task, entry))
    if args.plot:
        panels = {
            TASKS[task]: {p: samples(task, runs) for p, runs in entry["peers"].items() if "failed" not in runs[0]}
            for task, entry in results["tasks"].items()
        }
        harness.plot_bars(panels, args.plot)


def measure(task: str, peers: list[str], how: dict, scratch: Path, args: argparse.Namespace, keep: Any) -> None:
    """All runs of a task, in turn."""
    from .peers import openvino_file

    def run(peer: str) -> dict[str, Any]:
        suffix = "npy" if task in ("unet", "vae") else "png"
        given = how | {"out": str(output(scratch, task, peer, suffix))}
        result = harness.fresh("benchmarks.peers", task, peer, json.dumps(given), lock=args.lock)
        if "marks" in result:
            first, *_, end = (mark - result["start"] for mark in result["marks"])
            result["times"] = {"to the first call": [first]}
            if task == "first":
                result["times"] |= {"to its end": [end]}
            if task == "picture":
                marks = result["marks"][:-1]
                steps = [b - a for a, b in pairwise(marks)]
                result["times"] |= {"whole": [end]} | ({"step": steps} if steps else {})
        return result

    if task in ("first", "picture"):
        peers = [p for p in peers if p not in ("OpenVINO", *FAST[1:])]
        if args.device != "cpu":
            peers = [p for p in peers if p != "fast"]
    if task == "first":
        peers = [p for p in peers if p not in ("diffusers channels-last", "diffusers compiled", "diffusers best")]
    if "OpenVINO" in peers and not openvino_file(task, how).exists():
        print("  converting to OpenVINO", flush=True)
        try:
            harness.fresh("benchmarks.peers", f"convert {task}", "OpenVINO", json.dumps(how), lock=args.lock)
        except harness.RunError as error:
            print(f"  OpenVINO is left out: {error}")
            peers = [p for p in peers if p != "OpenVINO"]
    harness.in_turn({peer: partial(run, peer) for peer in peers}, args.rounds, keep)


def output(scratch: Path, task: str, peer: str, suffix: str) -> Path:
    return scratch / f"{task}-{peer.replace(' ', '-')}.{suffix}"


def differences(task: str, entry: dict, how: dict, scratch: Path, lock: Path | None) -> None:
    """To each peer's last result: its error against float64, or how far its pixels are from the textbook's."""
    import numpy as np

    sound = {peer: runs for peer, runs in entry["peers"].items() if "failed" not in runs[0]}
    if task in ("unet", "vae"):
        reference = output(scratch, task, "float64", "npy")
        given = how | {"out": str(reference), "calls": 0}
        try:
            harness.fresh("benchmarks.peers", task, "float64", json.dumps(given), lock=lock)
        except harness.RunError as error:  # the times are sound without
            print(f"  no errors, for the float64 reference failed: {error}", flush=True)
            return
        exact = np.load(reference)
        for peer, runs in sound.items():
            got = np.load(output(scratch, task, peer, "npy")).astype(np.float64)
            runs[-1]["error"] = float(np.abs(got - exact).max() / np.abs(exact).max())
            runs[-1]["norm"] = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    elif task == "picture" and "textbook" in sound:
        from PIL import Image

        pixels = {p: np.asarray(Image.open(output(scratch, task, p, "png"))).astype(int) for p in sound}
        for peer, runs in sound.items():
            runs[-1]["pixels"] = int(np.abs(pixels[peer] - pixels["textbook"]).max())


KEY = {"unet": "call", "vae": "call", "first": "to the first call", "picture": "whole"}


def samples(task: str, runs: list[dict]) -> list[float]:
    return [value for run in runs for value in run["times"][KEY[task]]]


def table(task: str, entry: dict[str, Any]) -> str:
    """Seconds, how many times faster than diffusers eager in its better memory format, and the bar for that."""
    import statistics

    sound = {peer: runs for peer, runs in entry["peers"].items() if "failed" not in runs[0]}
    medians = {peer: statistics.median(samples(task, runs)) for peer, runs in sound.items()}
    eager = [medians[p] for p in ("diffusers", "diffusers channels-last") if p in medians]
    last = {"unet": "error", "vae": "error", "picture": "pixels"}.get(task)
    head = [TASKS[task], "seconds", "against diffusers", "bar"]
    head += ["first call s" if task in ("unet", "vae") else "note", "peak MB"]
    bars = BARS if entry.get("machine", {}).get("device", "cpu") == "cpu" else {}
    head += {"error": ["error against float64: largest, norm"], "pixels": ["pixels apart from textbook"]}.get(
        last or "", []
    )
    rows = []
    for peer, runs in entry["peers"].items():
        if "failed" in runs[0]:
            why = runs[0]["failed"].splitlines()[-1][:80]
            rows.append([peer, "failed", "", bars.get((task, peer), ""), why] + [""] * (len(head) - 5))
            continue
        times = runs[-1]["times"]
        ratio = f"{min(eager) / medians[peer]:.2f} x" if eager else ""
        note = f"{times['first call'][0]:.1f}" if "first call" in times else ""
        if "to its end" in times:
            note = f"to its end {harness.spread([s for r in runs for s in r['times']['to its end']])}"
        if "step" in times:
            note = f"step {harness.spread([s for r in runs for s in r['times']['step']])}"
        peak = max(run["peak"] for run in runs) / 1e6  # of the process, with the file's pages that it has read
        row = [peer, harness.spread(samples(task, runs)), ratio, bars.get((task, peer), ""), note, f"{peak:.0f}"]
        if last:
            value = runs[-1].get(last)
            if value is not None and last == "error":
                value = f"{value:.1e}, {runs[-1].get('norm', float('nan')):.1e}"
            row.append("" if value is None else str(value))
        rows.append(row)
    loads = [run["load"] for runs in sound.values() for run in runs]
    busy = f"load of the machine (1 minute) after each process: {harness.spread(loads, 1)}\n" if loads else ""
    return f"{harness.markdown(head, rows)}\n{busy}"


if __name__ == "__main__":
    main()

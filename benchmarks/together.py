"""Calls of ours and of the peers in turn, in one process: for machines whose own speed wanders from second to second.

    python -m benchmarks.together --weights FOLDER --dtype bfloat16
    python -m benchmarks.together --weights FOLDER --tasks vae --peers fast OpenVINO --rounds 20

Peers and tasks are those of benchmarks/speed.py (`unet`, `vae`). All peers are in memory at once, and have the
process's setting of the allocator: freed memory is kept, as `artist` does it, so the peers gain by that here, which
their users do not. Errors are relative differences from the textbook in float32, by the norm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from . import harness
from .peers import inputs, maker, openvino_file
from .speed import make_weights, present


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder to make the weights in, or with them; kept")
    parser.add_argument("--tasks", nargs="+", choices=["unet", "vae"], default=["unet", "vae"])
    parser.add_argument("--peers", nargs="+", default=["fast", "diffusers channels-last", "OpenVINO"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--results", type=Path, help="a Markdown file that the tables are put into")
    args = parser.parse_args()
    from sd.speed.malloc import keep, large_pages

    large_pages()
    keep()
    threads = torch.get_num_threads()
    facts = harness.machine(threads) | {"dtype": args.dtype, "size": args.size}
    report = harness.Report(args.results, f"In turn on {facts['cpu']}, {threads} threads, {args.dtype}", facts)
    peers, _ = present(args.peers, "cpu")
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        file, hub = make_weights(args.weights or Path(scratch), None)
        how = {"file": str(file), "hub": str(hub), "threads": threads, "size": args.size, "device": "cpu"}
        for task in args.tasks:
            if "OpenVINO" in peers and not openvino_file(task, how).exists():
                given = json.dumps(how | {"dtype": args.dtype, "calls": 0})
                harness.fresh("benchmarks.peers", f"convert {task}", "OpenVINO", given)
            report.say(in_turn(task, peers, how | {"dtype": getattr(torch, args.dtype)}, args.rounds))


def in_turn(task: str, peers: list[str], how: dict, rounds: int) -> str:
    """The table of a task."""
    exact = maker("textbook")(task, "textbook", how | {"dtype": torch.float32})
    expected = exact(*inputs(task, how | {"dtype": torch.float32}))
    del exact
    calls, given = {peer: maker(peer)(task, peer, how) for peer in peers}, inputs(task, how)
    errors, times = {}, {peer: [] for peer in peers}
    for peer, call in calls.items():
        call(*given)  # prepares weights
        difference = call(*given).double() - expected
        errors[peer] = f"{(difference.norm() / expected.double().norm()).item():.1e}"
    for _ in range(rounds):
        for peer, call in calls.items():
            start = time.perf_counter()
            call(*given)
            times[peer].append(time.perf_counter() - start)
    least, median = min(times[peers[0]]), statistics.median(times[peers[0]])
    rows = []
    for peer, own in times.items():
        figures = [f"{value:.2f}" for value in (min(own), statistics.median(own), max(own))]
        ratios = [f"{min(own) / least:.2f} x", f"{statistics.median(own) / median:.2f} x"]
        rows.append([peer, *figures, *ratios, errors[peer]])
    head = [f"{task}, {rounds} calls of each", "least s", "median s", "most s", f"least, by {peers[0]}'s"]
    return harness.markdown([*head, f"median, by {peers[0]}'s", "error"], rows)


if __name__ == "__main__":
    main()

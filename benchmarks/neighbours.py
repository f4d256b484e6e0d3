"""What one busy program beside it costs: a UNet call alone, and while another process keeps one core at work.

    python -m benchmarks.neighbours --weights FOLDER                    # full size, random weights; float32
    python -m benchmarks.neighbours --weights FOLDER --dtype bfloat16

`artist` looks how many cores are free when it starts and computes with that many threads, so "fast" is measured so,
and with all threads as well, which is what a library's user gets who says nothing. The neighbour is a loop that does
nothing else. Each figure is of a process of its own, in turn; of `--calls` calls the median, with the least and the
largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import harness
from .peers import openvino_file
from .speed import make_weights, present


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Within the block, if `busy`, another process computes on one core."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="folder to make the weights in, or with them; kept")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, help="a Markdown file that the table is put into")
    args = parser.parse_args()
    threads = torch.get_num_threads()
    facts = harness.machine(threads) | {"dtype": args.dtype}
    report = harness.Report(args.results, f"One neighbour, on {facts['cpu']}, {args.dtype}", facts)
    peers, _ = present(["fast", "diffusers channels-last", "OpenVINO"], "cpu")
    runs = {("fast", max(1, threads - 1)): "fast, the threads that are free"}
    runs |= {(peer, threads): f"{peer}, all {threads} threads" for peer in peers}
    times: dict[tuple[str, int, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        file, hub = make_weights(args.weights or Path(scratch), None)
        how = {"file": str(file), "hub": str(hub), "calls": args.calls, "size": 512, "device": "cpu"}
        how |= {"dtype": args.dtype, "threads": threads}
        if "OpenVINO" in peers and not openvino_file("unet", how).exists():
            harness.fresh("benchmarks.peers", "convert unet", "OpenVINO", json.dumps(how))
        for _ in range(args.rounds):
            for (peer, count), name in runs.items():
                for busy in (False, True):
                    with neighbour(busy):
                        result = harness.fresh("benchmarks.peers", "unet", peer, json.dumps(how | {"threads": count}))
                    times.setdefault((peer, count, busy), []).extend(result["times"]["call"])
                    print(f"  {name}, {'busy' if busy else 'alone'}: {harness.values(result, 'call')}", flush=True)
    alone = statistics.median(times["fast", threads, False])
    rows = []
    for (peer, count), name in runs.items():
        own, busy = times[peer, count, False], times[peer, count, True]
        of_own = statistics.median(busy) / (alone if peer == "fast" else statistics.median(own))
        rows.append([name, harness.spread(own), harness.spread(busy), f"{of_own:.2f} x"])
    head = ["UNet call, batch 2", "alone, s", "beside one busy process, s", "against alone with all threads"]
    report.say(harness.markdown(head, rows))


if __name__ == "__main__":
    main()

"""What a ControlNet adds to a step, ours beside diffusers': a guided call of the UNet without it, and with it.

    python -m benchmarks.controlnet                           # full size, 512 x 512: writes and removes 5.7 GB
    python -m benchmarks.controlnet --rounds 3 --calls 3 --json controlnet.json
    python -m benchmarks.controlnet --small --size 64         # a small model, to try the command

Peers, each in a process of its own, in turn: the textbook's modules; `sd.fast` of the model and the ControlNet; and
diffusers' UNet2DConditionModel with its ControlNetModel, eager and contiguous, which is its faster memory format on a
CPU. In a process the two kinds of a step alternate, after one of each that warms up. Ours reads the picture once for
a drawing, before its steps, diffusers in every step. The weights are random, in float16 files, the same for all, and
computed with in float32. "ahead" is diffusers' time by ours: with a ControlNet it is to be no less than without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.peers import inputs

PEERS = ("textbook", "fast", "diffusers")
KINDS = ("without", "with")
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def write_files(folder: Path, small: bool) -> None:
    """A model and a ControlNet of random weights, each as one file and in the Hub's layout, in float16."""
    import sd
    from sd.compare.reference import diffusers_controlnet, random_controlnet
    from tests.layouts import make_model, write_full_size, write_hub

    if (folder / "controlnet/config.json").exists():
        return
    print("making the weights", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    if small:
        sd.save(make_model(dtype=torch.float16), folder / "full.safetensors")
        write_hub(folder / "hub", make_model(dtype=torch.float16))
    else:
        write_full_size(folder, hub=True)
    net = random_controlnet(sd.load(folder / "full.safetensors", dtype=torch.float16))
    sd.save_controlnet(net, folder / "net.safetensors", force=True)
    diffusers_controlnet(net).save_pretrained(folder / "controlnet")


# ---- one process


def ours(peer: str, folder: Path, picture: Tensor) -> dict[str, Step]:
    import sd
    from sd.pictures.control import Control

    if peer == "fast":  # as `artist` does
        from sd.speed.malloc import keep, large_pages

        large_pages()
        keep()
    model = sd.load(folder / "full.safetensors")
    net = sd.load_controlnet(folder / "net.safetensors", model=model)
    if peer == "fast":
        model, net = sd.fast(model), sd.fast(net)
    hint = net.hint(picture)
    control = Control(net, picture, (0,))

    def step(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return model.unet(x, t, context, control=control.added(x, t, context, hint))

    return {"without": model.unet, "with": step}


def diffusers(peer: str, folder: Path, picture: Tensor) -> dict[str, Step]:
    from diffusers import ControlNetModel, UNet2DConditionModel

    how = {"torch_dtype": torch.float32}
    unet = UNet2DConditionModel.from_pretrained(folder / "hub/unet", **how)
    net = ControlNetModel.from_pretrained(folder / "controlnet", **how)

    def step(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        skips, middle = net(x, t, context, picture, return_dict=False)
        more = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        return unet(x, t, context, return_dict=False, **more)[0]

    return {"without": lambda *given: unet(*given, return_dict=False)[0], "with": step}


@torch.no_grad()
def one(peer: str, how: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the two kinds of a step, by turns; what the one with a ControlNet returns goes to a file."""
    torch.set_num_threads(how["threads"])
    given = inputs("unet", {**how, "device": "cpu", "dtype": torch.float32})
    size = how["size"]
    picture = (
        (torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) > 0.9).float().expand(2, -1, -1, -1)
    )
    steps = (diffusers if peer == "diffusers" else ours)(peer, Path(how["folder"]), picture)
    for kind in KINDS:
        out = steps[kind](*given)
    np.save(how["out"], out.numpy())
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(how["calls"]):
        for kind in KINDS:
            start = time.perf_counter()
            steps[kind](*given)
            times[kind].append(time.perf_counter() - start)
    return {"times": times}


# ---- all of them


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    sound = {peer: runs for peer, runs in results.items() if runs and "failed" not in runs[0]}
    samples = {
        peer: {kind: [s for r in runs for s in r["times"][kind]] for kind in KINDS} for peer, runs in sound.items()
    }
    middle = {peer: {kind: statistics.median(s[kind]) for kind in KINDS} for peer, s in samples.items()}
    rows = []
    for peer, runs in results.items():
        if peer not in sound:
            rows.append([peer, "failed: " + runs[0]["failed"].splitlines()[-1][:80], *[""] * 4])
            continue
        ahead = [
            f"{middle['diffusers'][kind] / middle[peer][kind]:.2f} x" if "diffusers" in middle else ""
            for kind in KINDS
        ]
        apart = runs[-1].get("apart")
        rows.append([peer, *(harness.spread(samples[peer][kind]) for kind in KINDS), *ahead,
                     "" if apart is None else f"{apart:.1e}"])  # fmt: skip
    head = ["a step with guidance", "seconds without", "with a ControlNet", "ahead without", "ahead with", "apart"]
    return harness.markdown(head, rows)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    add("--size", type=int, default=512)
    add("--rounds", type=int, default=2, help="processes for each peer")
    add("--calls", type=int, default=3, help="timed steps of each kind in a process")
    add("--threads", type=int, help="torch's choice if not given")
    add("--small", action="store_true", help="a small model, whose figures mean nothing")
    add("--weights", type=Path, help="folder to make the weights in, or with them from an earlier run; kept")
    add("--json", type=Path)
    add("--results", type=Path, help="a Markdown file, such as benchmarks/RESULTS.md, that the table is put into")
    add("--lock", type=Path, help="a file that each process holds (flock), where several share a machine")
    args = parser.parse_args()
    facts = harness.machine(args.threads or torch.get_num_threads()) | {"size": args.size, "small": args.small}
    heading = f"A ControlNet in a step, on {facts['cpu']}, {facts['threads']} threads, float32"
    report = harness.Report(args.results, heading, facts)
    print(json.dumps(facts, indent=1))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.weights or Path(scratch) / "weights"
        write_files(folder, args.small)
        how = {"folder": str(folder), "threads": facts["threads"], "size": args.size, "calls": args.calls}
        how |= {"context_dim": 64} if args.small else {}

        def run(peer: str) -> dict[str, Any]:
            out = Path(scratch) / f"{peer}.npy"
            result = harness.fresh(
                "benchmarks.controlnet", "--one", peer, json.dumps(how | {"out": str(out)}), lock=args.lock
            )
            theirs = Path(scratch) / "diffusers.npy"
            if theirs.exists():
                got, expected = np.load(out), np.load(theirs)
                result["apart"] = float(np.abs(got - expected).max() / np.abs(expected).max())
            return result

        def keep(results: dict[str, list[dict[str, Any]]]) -> None:
            if args.json:
                harness.write_json(args.json, {"machine": facts, "peers": results})

        order = sorted(args.peers, key=lambda peer: peer != "diffusers")  # first, for the others are held against it
        report.say(table(harness.in_turn({peer: partial(run, peer) for peer in order}, args.rounds, keep)))
    report.say('"apart": the largest difference from diffusers with the ControlNet, relative to the largest value.')


if __name__ == "__main__":
    main()

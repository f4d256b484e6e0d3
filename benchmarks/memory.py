"""How much memory a picture takes, and how long: simple, lean and diffusers, each in fresh processes.

    python -m benchmarks.memory                       # full size, 512 x 512, 2 steps: writes and removes 2.1 GB
    python -m benchmarks.memory --budgets 300MB 600MB --size 768x520 --steps 1 --only lean

The weights are random, in one float16 file (for diffusers, the same in the Hub's layout). Each run is a process
that has imported torch; memory is counted from there, sampled every 5 ms from
/proc/self/smaps-like counters in /proc/self/status: RssAnon is what a process needs, RssFile is the page cache's
and can be dropped by the system at any time, VmHWM is the peak of both with the libraries' own.
The order of runs is interleaved, and times are ratios to SimpleSampler in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WATCH = """
import json, sys, threading, time
import torch
def status():
    wanted = ("RssAnon", "RssFile", "VmHWM")
    return {k: int(v.split()[0]) * 1024 for k, v in (l.split(":") for l in open("/proc/self/status")) if k in wanted}
base, curve, stage, stop = status(), [], ["load"], threading.Event()
def watch():
    start = time.perf_counter()
    while not stop.is_set():
        curve.append((round(time.perf_counter() - start, 3), status()["RssAnon"] - base["RssAnon"], stage[0]))
        time.sleep(0.005)
thread = threading.Thread(target=watch, daemon=True); thread.start()
def report(times, **more):
    stop.set(); thread.join(); end = status()
    peaks = {}
    for _, anon, name in curve: peaks[name] = max(peaks.get(name, 0), anon)
    step = max(1, len(curve) // 400)
    print(json.dumps({"anon": max(c[1] for c in curve), "peaks": peaks, "file": end["RssFile"] - base["RssFile"],
                      "hwm": end["VmHWM"], "times": times, "curve": curve[::step], **more}))
call = json.loads(sys.argv[2])
marks = []
def go(sampler):
    with torch.no_grad(): request = sampler.request("a photograph of a horse", **call)
    stage[0] = "UNet"; marks.append(time.perf_counter())
    for step in sampler.run(request): marks.append(time.perf_counter())
    stage[0] = "VAE"; marks.append(time.perf_counter())
    sampler.decode(step.latents); marks.append(time.perf_counter())
    return request
def times():
    steps = [b - a for a, b in zip(marks[:-3], marks[1:-2])]
    return {"step": min(steps), "vae": marks[-1] - marks[-2]}
"""
SIMPLE = "import sd; s = sd.SimpleSampler(sd.load(sys.argv[1])); stage[0] = 'text'; go(s); report(times())"
LEAN = """
import sd
s = sd.LeanSampler(sd.load(sys.argv[1]), sys.argv[3]); stage[0] = 'text'
request = go(s); plan = s.make_plan(request)
report(times(), predicted=plan.peaks, plan=str(plan))
"""
DIFFUSERS = """
from diffusers import DDIMScheduler, StableDiffusionPipeline
p = StableDiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32, safety_checker=None)
p.set_progress_bar_config(disable=True); p.tokenizer.model_max_length = 77
p.scheduler = DDIMScheduler.from_config(p.scheduler.config)
if sys.argv[3] == "lean":
    import os, pathlib, tempfile
    from diffusers.hooks import apply_group_offloading, group_offloading
    if not hasattr(group_offloading, "send_to_device"):  # accelerate's; nothing to send on the CPU
        group_offloading.send_to_device = lambda value, *_, **__: value
    p.enable_attention_slicing("max"); p.vae.enable_slicing(); p.vae.enable_tiling()
    # Sequential offload needs an accelerator; group offload of single layers to files runs on the CPU as well.
    cpu, files = torch.device("cpu"), tempfile.TemporaryDirectory(dir=os.path.dirname(sys.argv[1]))
    for name in ("unet", "vae", "text_encoder"):
        apply_group_offloading(getattr(p, name), onload_device=cpu, offload_device=cpu, offload_type="leaf_level",
                               offload_to_disk_path=str(pathlib.Path(files.name, name)))
    import gc; gc.collect()
stage[0] = "text"
def mark(pipe, i, t, kwargs): marks.append(time.perf_counter()); stage[0] = "UNet"; return kwargs
marks.append(time.perf_counter())
p("a photograph of a horse", num_inference_steps=call["num_inference_steps"], height=call["height"],
  width=call["width"], callback_on_step_end=mark, output_type="pil")
marks.append(time.perf_counter()); marks.insert(-1, marks[-2])
report(times())
"""


def run(code: str, *args: str) -> dict:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WATCH + code, *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a run failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budgets", nargs="*", default=["300MB", "600MB", "2GB", "6GB"])
    parser.add_argument("--size", default="512x512", help="WIDTHxHEIGHT")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["simple", "lean", "diffusers"])
    parser.add_argument("--folder", type=Path, help="where the weights go for a while")
    parser.add_argument("--plot", type=Path, help="write the curves of memory over time as PNG")
    args = parser.parse_args()
    import torch
    import transformers

    width, height = map(int, args.size.split("x"))
    call = {"num_inference_steps": args.steps, "height": height, "width": width, "scheduler": "ddim"}
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads, float32 from a float16 file, {width} x {height}, guidance on: "
        f"{args.steps} UNet calls of batch 2; least of {args.runs} runs"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        from tests.layouts import write_full_size

        file, hub = write_full_size(Path(folder), hub="diffusers" in args.only)
        jobs: dict[str, tuple[str, ...]] = {}
        if "simple" in args.only:
            jobs["simple"] = (SIMPLE, str(file), json.dumps(call))
        if "lean" in args.only:
            jobs |= {f"lean {b}": (LEAN, str(file), json.dumps(call), b) for b in args.budgets}
        if "diffusers" in args.only:
            jobs["diffusers"] = (DIFFUSERS, str(hub), json.dumps(call), "plain")
            jobs["diffusers, leanest"] = (DIFFUSERS, str(hub), json.dumps(call), "lean")
        results: dict[str, list[dict]] = {name: [] for name in jobs}
        for _ in range(args.runs):
            for name, job in jobs.items():
                results[name].append(run(*job))
                print(".", end="", flush=True)
    print()
    report(results)
    if args.plot:
        plot({name: runs[0]["curve"] for name, runs in results.items()}, args.plot)


def report(results: dict[str, list[dict]]) -> None:
    def least(name: str, key: str) -> float:
        return min(r["times"][key] for r in results[name])

    print(f"{'':20} RssAnon MB  text  UNet   VAE   predicted  RssFile  VmHWM   s/step (x simple)   VAE s")
    for name, runs in results.items():
        peaks = {k: statistics.median(r["peaks"].get(k, 0) for r in runs) / 1e6 for k in ("text", "UNet", "VAE")}
        anon = statistics.median(r["anon"] for r in runs) / 1e6
        guess = max(runs[0]["predicted"].values()) / 1e6 if "predicted" in runs[0] else None
        ratio = f"({least('simple', 'step') / least(name, 'step'):.2f})" if "simple" in results else ""
        print(
            f"{name:20} {anon:10.0f} {peaks['text']:5.0f} {peaks['UNet']:5.0f} {peaks['VAE']:5.0f}"
            f"   {f'{guess:5.0f} {guess / anon - 1:+4.0%}' if guess else '          '}"
            f" {runs[0]['file'] / 1e6:7.0f} {runs[0]['hwm'] / 1e6:7.0f}"
            f"   {least(name, 'step'):6.2f} {ratio:10}  {least(name, 'vae'):6.2f}"
        )


def plot(curves: dict[str, list], path: Path) -> None:
    """Memory over time, drawn with pillow: no plotting library for one picture."""
    from PIL import Image, ImageDraw

    wide, high, left, low = 900, 420, 60, 40
    image = Image.new("RGB", (wide, high), "white")
    draw = ImageDraw.Draw(image)
    end = max(t for curve in curves.values() for t, _, _ in curve)
    top = max(m for curve in curves.values() for _, m, _ in curve) / 1e6 * 1.05

    def at(t: float, megabytes: float) -> tuple[float, float]:
        return left + (wide - left - 10) * t / end, (high - low) * (1 - megabytes / top)

    for k in range(6):
        y = at(0, top * k / 5)[1]
        draw.line([(left, y), (wide - 10, y)], fill="#dddddd")
        draw.text((8, y - 6), f"{top * k / 5:.0f} MB", fill="black")
    for k in range(6):
        draw.text((at(end * k / 5, 0)[0] - 10, high - low + 6), f"{end * k / 5:.0f} s", fill="black")
    colours = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2"]
    for colour, (name, curve) in zip(colours, curves.items(), strict=False):
        points = [at(t, m / 1e6) for t, m, _ in curve]
        draw.line(points, fill=colour, width=2)
        draw.text((wide - 200, 10 + 14 * list(curves).index(name)), name, fill=colour)
    image.save(path)


if __name__ == "__main__":
    main()

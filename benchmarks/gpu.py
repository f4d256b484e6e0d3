"""How fast on an NVIDIA GPU: ours beside diffusers, in turn, in one process, with the same weights and inputs.

    python -m benchmarks.gpu --json gpu.json             # two minutes; --dtypes float16: one of them
    python -m benchmarks.gpu --results benchmarks/RESULTS.md    # and puts the tables there, under the card's name
    python -m benchmarks.gpu --compiled                  # and torch.compile(mode="max-autotune"), which takes long

Full size, random weights, 512 x 512. Prints a table for each dtype, as Markdown, each as soon as it is measured:

    UNet call       a batch of 2, for guidance
    VAE decode      of one picture
    picture         20 steps of PNDM (21 calls), text left out, from latents to pixels on the GPU; and its peak
    little memory   4 steps, the UNet's weights in the processor's memory: `LeanSampler` beside diffusers'
                    enable_sequential_cpu_offload (one layer at a time); a call's seconds, and the peak

"textbook, graph" is the textbook's UNet replayed as a CUDA graph: what remains of a call when launching kernels costs
nothing. Times are medians with the least and the largest. Errors are largest relative differences from the first
dtype that is given, without TF32: float32, if nothing is said.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sd
from sd.compare.reference import diffusers_scheduler, diffusers_unet, diffusers_vae, random_model_of

from . import harness

Calls = dict[str, Callable[[], Any]]


def seconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Times by name, after two calls that warm up; a call that fails says so and is left out."""
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            seconds(call), seconds(call)
            times[name] = []
        except Exception as error:
            print(f"  {name} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
    for _ in range(rounds):
        for name in times:
            times[name].append(seconds(calls[name]))
    return times


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call, captured as a CUDA graph. Its result is overwritten by the next one."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def row(name: str, times: list[float], eager: float, *more: str) -> list[str]:
    ms = [1e3 * t for t in times]
    return [name, harness.spread(ms, 1), f"{1e3 * eager / statistics.median(ms):.2f} x", *more]


def table(
    title: str, calls: Calls, rounds: int, expected: Tensor | None, result: dict, report: harness.Report
) -> None:
    """Print a task's table; the ratios are to diffusers eager, in its better memory format."""
    with torch.no_grad():
        times = in_turn(calls, rounds)
        errors = {n: "" if expected is None else f"{relative(calls[n](), expected):.1e}" for n in times}
    eager = min((statistics.median(t) for n, t in times.items() if n in EAGER), default=float("nan"))
    rows = [row(name, t, eager, errors[name]) for name, t in times.items()]
    report.say(harness.markdown([title, "ms", "against diffusers eager", "error"], rows) + "\n")
    result[title] = {name: {"seconds": t, "error": errors[name]} for name, t in times.items()}


EAGER = ("diffusers", "diffusers, channels last")


def parts_of(model: sd.StableDiffusion, compiled: bool) -> dict[str, tuple[Any, Any]]:
    """UNet and VAE of each peer; diffusers' without channels last share our memory."""
    fast = sd.fast(model)
    theirs = diffusers_unet(model), diffusers_vae(model)
    last = tuple(copy.deepcopy(part).to(memory_format=torch.channels_last) for part in theirs)
    parts = {"textbook": (model.unet, model.vae), "fast": (fast.unet, fast.vae)}
    parts |= {"diffusers": theirs, "diffusers, channels last": last}
    if compiled:
        fast = sd.fast(model, compile=True)
        parts["fast, compiled"] = fast.unet, fast.vae
        unet, vae = (copy.deepcopy(part) for part in last)
        unet.fuse_qkv_projections(), vae.fuse_qkv_projections()
        vae.decode = torch.compile(vae.decode, mode="max-autotune")
        parts["diffusers, max-autotune"] = torch.compile(unet, mode="max-autotune"), vae
    return parts


def measure_dtype(
    cpu: sd.StableDiffusion, dtype: torch.dtype, args: argparse.Namespace, exact: dict, report: harness.Report
) -> dict:
    """`exact`, if empty, is filled with what the UNet and the VAE give in this dtype: the others' reference."""
    result: dict[str, Any] = {}
    model = cpu.with_parts(*(copy.deepcopy(part).to("cuda", dtype) for part in (cpu.unet, cpu.vae)), cpu.text)
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 64, 64, generator=g), torch.randn(2, 77, 768, generator=g)
    x, context = torch.cat([x, x]).to("cuda", dtype), context.to("cuda", dtype)
    t = torch.tensor([481.0, 481.0], device="cuda")
    if not exact:
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
        with torch.no_grad():
            exact["unet"], exact["vae"] = model.unet(x, t, context), model.vae.decode(x[:1])
        torch.backends.cudnn.allow_tf32 = before
    parts = parts_of(model, args.compiled)
    calls: Calls = {}
    for name, (unet, _) in parts.items():
        if name.startswith("diffusers"):
            calls[name] = lambda unet=unet: unet(x, t, context, return_dict=False)[0]
        else:
            calls[name] = lambda unet=unet: unet(x, t, context)
    with torch.no_grad():
        calls["textbook, graph"] = graphed(calls["textbook"])
    table(f"UNet call, {dtype}", calls, args.rounds, exact["unet"], result, report)
    scale = model.vae.config.scale_factor
    calls = {}
    for name, (_, vae) in parts.items():
        if name.startswith("diffusers"):
            calls[name] = lambda vae=vae: vae.decode(x[:1] / scale, return_dict=False)[0]
        else:
            calls[name] = lambda vae=vae: vae.decode(x[:1])
    table(f"VAE decode, {dtype}", calls, args.rounds, exact["vae"], result, report)
    if dtype != torch.float32:
        pictures(model, parts, context, args, result, report)
    return result


def peak_of(call: Callable[[], Any]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def pipeline_of(unet: Any, vae: Any) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae, None, None, unet, diffusers_scheduler("pndm"), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(
    model: sd.StableDiffusion,
    parts: dict,
    context: Tensor,
    args: argparse.Namespace,
    result: dict,
    report: harness.Report,
) -> None:
    embeds = {"negative_prompt_embeds": context[:1], "prompt_embeds": context[1:]}
    size = {"num_inference_steps": args.steps, "guidance_scale": 7.5}
    calls: Calls = {}
    for name in ("textbook", "fast"):
        sampler = sd.SimpleSampler(model.with_parts(*parts[name], model.text))
        sampler.encode_prompt = given(context)  # type: ignore[method-assign]
        calls[name] = partial(sampler, "a", output_type="pt", seed=0, **size)
    for name in EAGER:
        calls[name] = partial(pipeline_of(*parts[name]), output_type="pt", **embeds, **size)
    table(f"picture, {args.steps} steps, {model.dtype}", calls, 3, None, result, report)
    peaks = {name: peak_of(call) for name, call in calls.items()}
    said = ", ".join(f"{name} {peak / 1e6:.0f}" for name, peak in peaks.items())
    report.say(f"Peak of a picture beside the weights, {model.dtype}, MB: {said}.\n")
    result["peaks"] = peaks


def given(context: Tensor) -> Callable[[list[str]], Tensor]:
    """In place of `encode_prompt`: the first for no words, which are the negative prompt, the second for others."""
    return lambda texts, **how: context[:1] if texts == [""] else context[1:]


def little_memory(cpu: sd.StableDiffusion, folder: Path, report: harness.Report) -> dict:
    """Weights in the processor's memory, in float16; what each takes of the GPU, and how long a call is."""
    dtype, file = torch.float16, folder / "full.safetensors"
    sd.save(cpu, file)
    context = torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    size = {"num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "pt"}
    embeds = {"negative_prompt_embeds": context[:1], "prompt_embeds": context[1:]}
    calls: Calls = {}
    for memory in ("400MB", "800MB"):
        calls[f"LeanSampler, {memory}"] = partial(lean_picture, str(file), memory, context, size)
    pipe = pipeline_of(diffusers_unet(cpu), diffusers_vae(cpu))
    pipe.enable_sequential_cpu_offload()
    calls["diffusers, sequential offload"] = partial(pipe, **embeds, **size)
    result, rows = {}, []
    for name, call in calls.items():
        try:
            peak = peak_of(call)
            times = [seconds(call)]
        except Exception as error:
            print(f"  {name} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        rows.append([name, harness.spread(times), f"{peak / 1e6:.0f}"])
        result[name] = {"seconds": times, "peak": peak}
    report.say(harness.markdown([f"4 steps in little memory, {dtype}", "s", "peak MB"], rows) + "\n")
    return result


def lean_picture(file: str, memory: str, context: Tensor, size: dict) -> Tensor:
    sampler = sd.LeanSampler(sd.load(file, device="cuda"), memory)
    sampler.encode_prompt = given(context)  # type: ignore[method-assign]
    return sampler("a", seed=0, **size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path, help="a Markdown file that the tables are put into")
    args = parser.parse_args()
    facts = harness.machine(torch.get_num_threads()) | {"gpu": torch.cuda.get_device_name()}
    print(json.dumps(facts))
    report = harness.Report(args.results, f"Speed on {facts['gpu']}", facts)
    results: dict[str, Any] = {"machine": facts}
    cpu, exact = random_model_of("full", torch.float16), {}
    for name in args.dtypes:
        results[name] = measure_dtype(cpu, getattr(torch, name), args, exact, report)
        torch.cuda.empty_cache()
        if args.json:
            harness.write_json(args.json, results)
    with tempfile.TemporaryDirectory() as folder:
        results["little memory"] = little_memory(cpu, Path(folder), report)
    if args.json:
        harness.write_json(args.json, results)


if __name__ == "__main__":
    main()

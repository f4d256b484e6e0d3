"""One measurement in a process of its own, for benchmarks/speed.py: python -m benchmarks.peers TASK PEER JSON.

Prints, as its last line, JSON with `times`: lists of seconds by name.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

PROMPT = "a photograph of a horse"
FAST: dict[str, dict[str, bool]] = {
    "fast": {},
    "fast, no extra memory": {"extra_memory": False},
    "fast compiled": {"compile": True},
}
SCHEDULERS = {"pndm": "PNDMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}
COMPILE = {"diffusers compiled": "default", "diffusers best": "max-autotune"}


class FirstCall(BaseException):
    """Raised out of the first call of a UNet, to stop there; no error, so nobody on the way catches it."""


def inputs(task: str, how: dict[str, Any]) -> tuple[Tensor, ...]:
    """Of a UNet call with guidance on, both halves from the same latents; or of a VAE decode."""
    g, side = torch.Generator().manual_seed(0), how["size"] // 8
    x = torch.randn(1, 4, side, side, generator=g)
    if task == "vae":
        return (x.to(how["device"], how["dtype"]),)
    context = torch.randn(2, 77, how.get("context_dim", 768), generator=g)
    given = torch.cat([x, x]), torch.tensor([481.0, 481.0]), context
    return tuple(v.to(how["device"], torch.float32 if k == 1 else how["dtype"]) for k, v in enumerate(given))


# ---- the peers: a function that computes a UNet call, or a VAE decode of scaled latents


def ours(task: str, peer: str, how: dict[str, Any]) -> Callable[..., Tensor]:
    import sd

    if peer == "float64":  # the reference of every error; only the part that is used
        model = sd.load(how["file"])
        part = model.unet if task == "unet" else model.vae
        part.to(how["device"], torch.float64)
        call = part if task == "unet" else model.vae.decode
        return lambda *given: call(*(v.double() for v in given))
    plain = peer not in FAST
    if peer == "fast" and how["device"] == "cpu":  # as `artist` does
        from sd.speed.malloc import keep, large_pages

        large_pages()
        keep()
    model = sd.load(how["file"], device=how["device"], dtype=how["dtype"])
    if not plain:
        from sd.speed.fast_model import fast

        model = fast(model, **FAST[peer])
    return model.unet if task == "unet" else model.vae.decode


def diffusers(task: str, peer: str, how: dict[str, Any]) -> Callable[..., Tensor]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = UNet2DConditionModel if task == "unet" else AutoencoderKL
    model = kind.from_pretrained(Path(how["hub"]) / task, torch_dtype=how["dtype"]).to(how["device"])
    if peer in ("diffusers channels-last", "diffusers best"):
        model.to(memory_format=torch.channels_last)
    if peer == "diffusers best":
        model.fuse_qkv_projections()
    scale = model.config.scaling_factor if task == "vae" else 1.0
    forward = model if task == "unet" else model.decode
    if peer in COMPILE:
        compiled = torch.compile(forward, mode=COMPILE[peer])

        def forward(*given: Tensor, **options: Any) -> tuple[Tensor]:
            return (compiled(*given, **options)[0].clone(),)  # a CUDA graph writes the next result there

    if task == "vae":
        return lambda z: forward(z / scale, return_dict=False)[0]
    return lambda *given: forward(*given, return_dict=False)[0]


def openvino_file(task: str, how: dict[str, Any]) -> Path:
    return Path(how["hub"]).parent / f"openvino-{task}-{how['size']}.xml"


def convert_to_openvino(task: str, how: dict[str, Any]) -> None:
    """diffusers' model as a file of OpenVINO's, in float32 and for inputs of this size."""
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self, model: Any):
            super().__init__()
            self.model = model

        def forward(self, *given: Tensor) -> Tensor:
            if task == "unet":
                return self.model(*given, return_dict=False)[0]
            return self.model.decode(given[0] / self.model.config.scaling_factor, return_dict=False)[0]

    from diffusers import AutoencoderKL, UNet2DConditionModel

    kind = UNet2DConditionModel if task == "unet" else AutoencoderKL
    model = kind.from_pretrained(Path(how["hub"]) / task, torch_dtype=torch.float32)
    given = inputs(task, how | {"dtype": torch.float32})
    converted = openvino.convert_model(
        Plain(model), example_input=given, input=[(v.shape, openvino.Type.f32) for v in given]
    )
    openvino.save_model(converted, openvino_file(task, how), compress_to_fp16=False)


def openvino(task: str, peer: str, how: dict[str, Any]) -> Callable[..., Tensor]:
    import openvino as ov

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[how["dtype"]]
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    options["INFERENCE_NUM_THREADS"] = how["threads"]
    compiled = ov.compile_model(openvino_file(task, how), "CPU", options)
    return lambda *given: torch.from_numpy(compiled([v.float().numpy() for v in given])[0])


def maker(peer: str) -> Callable[..., Callable[..., Tensor]]:
    if peer in ("textbook", "float64", *FAST):
        return ours
    return openvino if peer == "OpenVINO" else diffusers


# ---- the tasks


@torch.no_grad()
def one_call(task: str, peer: str, how: dict[str, Any]) -> dict[str, Any]:
    """Load, one call to warm up (which compiles, where that is done), then `calls` timed ones."""

    def wait() -> float:
        if how["device"] != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = wait()
    call = maker(peer)(task, peer, how)
    given, loaded = inputs(task, how), wait()
    result = call(*given)
    marks = [wait()]
    for _ in range(how["calls"]):
        call(*given)
        marks.append(wait())
    if how.get("out"):
        np.save(how["out"], result.float().cpu().numpy() if peer != "float64" else result.cpu().numpy())
    times = {"load": [loaded - start], "first call": [marks[0] - loaded]}
    return {"times": times | {"call": [b - a for a, b in pairwise(marks)]}}


def picture(task: str, peer: str, how: dict[str, Any]) -> dict[str, Any]:
    """From nothing to a PNG; `marks` are moments by the system's clock, for the caller knows when it began.

    With the task "first", there are two: where the UNet is called for the first time, and where that call is done,
    which is what counts where weights are prepared in it. It stops there.
    """
    marks: list[float] = []

    def is_unet(module: torch.nn.Module) -> bool:
        kind = type(module).__name__
        return "UNet" in kind and "Block" not in kind

    def before(module: torch.nn.Module, args: Any) -> None:
        # The UNet itself, or, where a peer has another form of it, the first convolution: the text has none.
        if is_unet(module) or (not marks and "Conv" in type(module).__name__):
            marks.append(time.time())

    def after(module: torch.nn.Module, args: Any, out: Any) -> None:
        if is_unet(module):
            raise FirstCall

    hooks = []
    if peer not in COMPILE:  # a compiled model would be compiled with the hook
        hooks.append(register_module_forward_pre_hook(before))
        if task == "first":
            hooks.append(register_module_forward_hook(after))
    try:
        with suppress(FirstCall):
            draw(peer, how, marks)
    finally:
        for hook in hooks:
            hook.remove()
    return {"times": {}, "marks": [*marks, time.time()]}


def draw(peer: str, how: dict[str, Any], marks: list[float]) -> None:
    if peer in ("textbook", "fast"):
        from sd import cli

        options = ["--model", how["file"], "--steps", how["steps"], "--height", how["size"], "--width", how["size"]]
        options += ["-o", how["out"], "--device", how["device"], "--force", "--quiet"]
        options += ["--scheduler", how.get("scheduler", "pndm")]
        options += ["--dtype", str(how["dtype"]).removeprefix("torch.")]
        if peer == "textbook":
            options.append("--exact")
        code = cli.main([PROMPT, *map(str, options)])
        assert code == 0, code
        return
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        how["hub"], torch_dtype=how["dtype"], safety_checker=None
    )
    # As the real repository's files have it, which weights that were kept from an earlier run may not.
    kind = getattr(diffusers, SCHEDULERS[how.get("scheduler", "pndm")])
    pipe.scheduler = kind.from_config(pipe.scheduler.config, skip_prk_steps=True, steps_offset=1)
    pipe.tokenizer.model_max_length = 77
    pipe.to(how["device"])
    if peer in ("diffusers channels-last", "diffusers best"):
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if peer == "diffusers best":
        pipe.fuse_qkv_projections()
    if peer in COMPILE:
        pipe.unet.compile(mode=COMPILE[peer])
        set_timesteps = pipe.scheduler.set_timesteps
        pipe.scheduler.set_timesteps = lambda *a, **k: (marks.append(time.time()), set_timesteps(*a, **k))[1]
    pipe.set_progress_bar_config(disable=True)
    side, generator = how["size"], torch.Generator().manual_seed(0)
    result = pipe(PROMPT, num_inference_steps=how["steps"], height=side, width=side, generator=generator)
    result.images[0].save(how["out"])


def main() -> None:
    task, peer, how = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if task == "weights":
        from tests.layouts import write_full_size

        write_full_size(Path(how["folder"]), hub=True)
        print(json.dumps({"times": {}}))
        return
    how["dtype"] = getattr(torch, how["dtype"])
    torch.set_num_threads(how["threads"])
    if task.startswith("convert "):
        convert_to_openvino(task.removeprefix("convert "), how)
        result: dict[str, Any] = {"times": {}}
    else:
        result = (one_call if task in ("unet", "vae") else picture)(task, peer, how)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps(result | {"peak": peak}))


if __name__ == "__main__":
    main()

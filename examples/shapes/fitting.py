"""What the three stages of train.py share: the loop, its checkpoints, its log, and what can go wrong with them."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stepping import Batch, Graphed, stepper
from torch import Tensor, nn
from tqdm import tqdm

from sd.files import writing

SECONDS = 120  # between two checkpoints
EACH = 100  # steps between two lines of the log


class TrainingError(ValueError):
    """A run that cannot go on; one sentence: what is wrong, and what to do."""


def outcome(train: Callable[[], None], threads: int | None) -> int:
    """Train by so many threads (None: torch's choice). Returns the exit code, and says why where it is not 0."""
    if threads:
        torch.set_num_threads(threads)
    try:
        train()
    except (ValueError, OSError) as error:  # TrainingError, and of the files that are given
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class Run:
    """Where a run's files are, and how it computes.

    folder    checkpoints, log.csv, latents.pt
    device    as torch names it
    bfloat16  whether the forward passes compute in bfloat16 (autocast)
    graphs    whether steps are replayed as CUDA graphs, where a stage's can be
    """

    folder: Path
    device: str = "cpu"
    bfloat16: bool = False
    graphs: bool = False

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.bfloat16)

    def log(self, stage: str, step: int, loss: float, seconds: float) -> None:
        path = self.folder / "log.csv"
        with open(path, "a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write("stage,step,loss,seconds a step\n")
            file.write(f"{stage},{step},{loss:.5g},{seconds:.4f}\n")


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all: the checkpoint that was there stays until the new one is on the disk."""
    try:
        with writing(path, force=True) as file:
            torch.save(dict(content), file)
    except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError where the disk is full
        kept = "the one before is kept" if path.exists() else "there is none yet"
        raise TrainingError(f"The checkpoint {path} cannot be written ({error}): make room, {kept}.") from error


def read_checkpoint(path: Path, recipe: Mapping[str, Any], device: str = "cpu") -> dict[str, Any] | None:
    """A checkpoint of this recipe; None where there is none. Raises TrainingError for any other."""
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        theirs = json.loads(saved["recipe"])
    except Exception as error:  # torch raises many kinds for a file that is cut short
        raise TrainingError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}): remove it, and its stage begins anew."
        ) from error
    ours = json.loads(json.dumps(dict(recipe)))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise TrainingError(
                f"{path} is of another recipe ({key} is {theirs.get(key)!r} in it, and {ours.get(key)!r} here): "
                "give the same options, or another folder as --out."
            )
    return saved


def fit(
    name: str,
    module: nn.Module,
    batch_of: Callable[[int], Batch],
    loss_of: Callable[..., Tensor],
    run: Run,
    recipe: Mapping[str, Any],
    average: nn.Module | None = None,
) -> None:
    """AdamW over recipe["steps"] losses: warm-up, cosine to zero, checkpoints each two minutes, resume.

    batch_of  from the number of a step to the tensors of its batch; all that is random is drawn here
    loss_of   from these tensors to the loss
    average   becomes the moving average of the weights

    The learning rate is recipe["lr"]. Raises TrainingError; the last good checkpoint stays.
    """
    steps = recipe["steps"]
    path, start = run.folder / f"{name}.pt", 0
    take_step = stepper(module, loss_of, recipe["lr"], run.autocast, run.graphs)
    if saved := read_checkpoint(path, recipe, run.device):
        module.load_state_dict(saved["module"])
        take_step.load(saved["optimizer"])
        start = saved["step"]
        if average is not None:
            average.load_state_dict(saved["average"])

    def save(step: int) -> None:
        content = {"module": module.state_dict(), "optimizer": take_step.optimizer.state_dict(), "step": step}
        if average is not None:
            content["average"] = average.state_dict()
        write_checkpoint(path, content | {"recipe": json.dumps(dict(recipe))})

    def checked(mean: Tensor, step: int) -> float:
        if not math.isfinite(value := mean.item()):
            kept = f"the checkpoint before ({path}) is kept" if path.exists() else "there is no checkpoint yet"
            raise TrainingError(
                f"The loss of {name} is {value} at step {step}, and {kept}: run it again with a smaller --{name}-lr "
                "in another folder, or with --no-bfloat16."
            )
        return value

    graphed = isinstance(take_step, Graphed)
    weights = (list(average.parameters()), list(module.parameters())) if average is not None else ([], [])
    check_each = 20 if graphed else 1  # to look at a number of a GPU is to wait for it
    module.train()
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=10)
    saved_at, logged_at, at = time.time(), time.time(), start
    mean = torch.tensor(0.0, device=run.device)
    with take_step.place():
        for step in bar:
            torch.manual_seed(step)  # a resumed run draws what an unbroken one would have drawn
            loss = take_step(
                batch_of(step), recipe["lr"] * min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            )
            if average is not None:
                decay = min(0.9995, (step + 1) / (step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(*weights, 1 - decay)
            mean = torch.lerp(mean, loss, max(0.01, 1 / (step + 1 - start)))
            if (step + 1) % check_each == 0:
                value = checked(mean, step)
            if (step + 1) % EACH == 0:
                bar.set_postfix(loss=f"{value:.4f}")
                run.log(name, step + 1, value, (time.time() - logged_at) / (step + 1 - at))
                logged_at, at = time.time(), step + 1
            if time.time() - saved_at > SECONDS:
                checked(mean, step)
                save(step + 1)
                saved_at = time.time()
        if start < steps:
            checked(mean, steps - 1)
            save(steps)
    module.eval().requires_grad_(False)

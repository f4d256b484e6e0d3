"""One step of training: eager, or replayed as a CUDA graph, which takes a GPU a fraction of the time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
EAGER_STEPS = 3  # before a graph is captured: libraries choose their kernels in the first of them


class Eager:
    """Forward, backward, clipping to a norm of 1, AdamW."""

    def __init__(
        self,
        module: nn.Module,
        loss_of: Callable[..., Tensor],
        lr: float,
        autocast: Callable[[], AbstractContextManager],
        **options: bool,
    ):
        self.parameters = list(module.parameters())
        self.loss_of, self.autocast = loss_of, autocast
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True, **options
        )

    def set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def load(self, state: dict) -> None:
        """Go on with an optimizer's state, whichever way its steps were taken."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["capturable"] = isinstance(self, Graphed)

    def place(self) -> AbstractContextManager:
        """Where steps are to be taken."""
        return nullcontext()

    def compute(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach().float()

    def __call__(self, batch: Batch, lr: float) -> Tensor:
        """The loss of the batch; the weights have moved by `lr`."""
        self.set_rate(lr)
        return self.compute(batch)


class Graphed(Eager):
    """The same, captured after some eager steps and replayed: once for each shape of a batch.

    A small model's step is hundreds of kernels of microseconds, and launching them one by one takes longer than
    computing them.
    """

    def __init__(self, module: nn.Module, *args, **kwargs):
        super().__init__(module, *args, **kwargs, capturable=True)
        self.rate = torch.zeros((), device=self.parameters[0].device)
        self.stream = torch.cuda.Stream()
        self.seen: dict[tuple[torch.Size, ...], int] = {}
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}

    def place(self) -> AbstractContextManager:
        self.stream.wait_stream(torch.cuda.current_stream())  # for the weights that a checkpoint held
        return torch.cuda.stream(self.stream)

    def set_rate(self, lr: float) -> None:
        self.rate.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def compute(self, batch: Batch) -> Tensor:
        shapes = tuple(tensor.shape for tensor in batch)
        self.seen[shapes] = self.seen.get(shapes, 0) + 1
        if self.seen[shapes] <= EAGER_STEPS:
            return super().compute(batch)
        if shapes not in self.graphs:
            self.optimizer.zero_grad()  # gradients are made anew in the graph's own memory
            still, graph = tuple(tensor.clone() for tensor in batch), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                loss = super().compute(still)
            self.graphs[shapes] = graph, still, loss
        graph, still, loss = self.graphs[shapes]
        for place, tensor in zip(still, batch, strict=True):
            place.copy_(tensor)
        graph.replay()
        return loss


def stepper(
    module: nn.Module, loss_of: Callable[..., Tensor], lr: float, autocast: Callable, graphs: bool
) -> Eager | Graphed:
    return (Graphed if graphs else Eager)(module, loss_of, lr, autocast)

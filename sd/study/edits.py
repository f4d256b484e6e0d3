"""`edit`: read or replace what any module returns, by its name, while the model draws."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .around import Change, around_attention
from .calls import Now, listen, model_of, rows_of


@dataclass(frozen=True)
class Here:
    """Where an edit stands: what a function given to `edit` is told.

    Of what is computed outside a call of the UNet (the text encoder and the VAE): step -1, timestep nan, cond all
    rows, uncond none, whatever the rows are told.
    """

    name: str  # of the module
    module: nn.Module  # of the model that `edit` was given; a sampler may compute with a copy that shares its weights
    inputs: tuple[Any, ...]  # what the module was called with
    step: int  # of the sampling, from 0; -1 outside
    timestep: float  # what the UNet was told
    cond: slice  # the rows of the output that are told what to draw
    uncond: slice  # the rows that are told the negative prompt


Edit = Callable[[Any, Here], Any]


def names(
    model: Any, pattern: str = "*", *, vae: bool = True, text: bool = True, controlnet: Any = None
) -> dict[str, nn.Module]:
    """Every module that `edit` can reach, by name: those of the UNet as they are, "vae." and "text." before others.

    The parts themselves are "unet", "vae" and "text". `pattern`, as of `edit`: only those that it is on; with
    ".attend" at its end, the attentions whose probabilities it is on. controlnet: as of `edit`.
    """
    model = model_of(model)
    parts = {"unet": model.unet} | {name: m for name, m in model.unet.named_modules() if name}
    for part, root in (("vae", model.vae), ("text", model.text.model)):
        if vae if part == "vae" else text:
            parts |= {f"{part}.{name}".rstrip("."): m for name, m in root.named_modules()}
    for i, net in enumerate(nets_of(controlnet)):
        part = f"control.{i}" if isinstance(controlnet, list | tuple) else "control"
        parts |= {f"{part}.{name}".rstrip("."): m for name, m in net.named_modules()}
    return _matching(parts, pattern)


def nets_of(controlnet: Any) -> list[nn.Module]:
    """The ControlNets of an argument of a sampler: one, a list of them, or None."""
    nets = list(controlnet) if isinstance(controlnet, list | tuple) else [] if controlnet is None else [controlnet]
    if odd := [net for net in nets if not isinstance(net, nn.Module)]:
        raise ValueError(f"controlnet must be what sd.load_controlnet gives, or a list of such, not {odd[0]!r}.")
    return nets


def _matching(known: Mapping[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    stem, inside = pattern.removesuffix(".attend"), pattern.endswith(".attend")
    return {n: m for n, m in known.items() if fnmatchcase(n, stem) and (not inside or hasattr(m, "attend"))}


def nobody() -> None:
    """No call is under way."""


@contextmanager
def edit(model: Any, edits: Mapping[str, Edit], *, controlnet: Any = None) -> Iterator[None]:
    """Within the block, functions see what modules return, and may return something else in its place.

        with edit(model, {"middle_block": lambda out, at: 1.5 * out}):
            sampler("a red star")

    model   from `sd.load`, or a sampler
    edits   name -> function(out, at) -> the new output, or None to leave it as it is. `out` is a copy, which may be
            written into; `at` (`Here`) says which module, step and rows. Names are those of checkpoints, and may
            have the wildcards * ? [ ], as "input_blocks.4.1.*.attn2"; `names` lists them. With ".attend" after the
            name of an attention, the function gets its probabilities (B, heads, queries, keys) before they are
            multiplied with the values. Several functions on one module run in the order given.
    controlnet   as a sampler is given it, for edits on its modules: "control.zero_convs.3" is what it adds to the
            UNet's fourth skip; of a list, "control.0.zero_convs.3"

    No hook is left behind, also after an exception. Raises ValueError for a name that there is not, a result of
    another shape, and an output written into but not returned (not seen under torch.inference_mode). Warns
    (UserWarning) of a function that never ran, as one on a module that is done without.
    """
    model = model_of(model)
    known = names(model, text=any(p.split(".")[0] == "text" for p in edits), controlnet=controlnet)
    ran = dict.fromkeys(edits, False)

    def apply(pattern: str, name: str, inputs: tuple[Any, ...], out: Any) -> Any:
        ran[pattern] = True
        at = Here(name, known[name], inputs, -1, float("nan"), slice(None), slice(0, 0))
        if call := now():
            cond, uncond = rows_of(call, len(out) if isinstance(out, Tensor) else 0)
            at = Here(name, known[name], inputs, call.step, call.timestep, cond, uncond)
        given = out.clone() if isinstance(out, Tensor) else out
        result = edits[pattern](given, at)
        if result is None:
            # Tensors of inference mode keep no count of what was written.
            if isinstance(given, Tensor) and not given.is_inference() and given._version:
                raise ValueError(f"The edit {pattern!r} wrote into its output but returned nothing: return it.")
            return out
        if isinstance(out, Tensor) and (not isinstance(result, Tensor) or result.shape != out.shape):
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"The edit {pattern!r} must return {tuple(out.shape)}, as {name} does, not {got}.")
        # Not the caller's own tensor: some forwards go on in place, and would write into it.
        return result.to(out, copy=result is not given) if isinstance(out, Tensor) else result

    def on_output(pattern: str, name: str) -> Callable[..., Any]:
        return lambda module, inputs, out: apply(pattern, name, inputs, out)

    def on_probabilities(pattern: str, name: str) -> Change:
        return lambda probs, inputs: apply(pattern, name, inputs, probs)

    attends: dict[str, list[Change]] = {}
    now: Now = nobody  # until the listener is there: another thread may be drawing
    with ExitStack() as stack:
        for pattern in edits:
            stem, inside = pattern.removesuffix(".attend"), pattern.endswith(".attend")
            found = _matching(known, pattern)
            if not found:
                near = difflib.get_close_matches(stem, known, 3, 0.5)
                hint = f"there are {', '.join(near)}" if near else "sd.study.names(model) lists them"
                raise ValueError(f"No {'attention' if inside else 'module'} is called {stem!r}: {hint}.")
            for name, module in found.items():
                if inside:
                    attends.setdefault(name, []).append(on_probabilities(pattern, name))
                else:
                    stack.callback(module.register_forward_hook(on_output(pattern, name)).remove)
        for name, changes in attends.items():
            stack.enter_context(around_attention(known[name], changes=changes))
        # Last: hooks on the UNet itself still belong to its call.
        now = stack.enter_context(listen(model, nets_of(controlnet)))
        yield
    for pattern, did in ran.items():
        if not did:
            warnings.warn(f"The edit {pattern!r} never ran: nothing that it is on was called.", stacklevel=3)

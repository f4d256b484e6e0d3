"""What a source holds, for people who want to know: `info`, also of files that `load` refuses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import PlainError, printable
from . import names
from .configs import PARTS, LoadError
from .controlnets import find_controlnet
from .embeddings import OF_SDXL, bundles_words, holds_words, read_words
from .layout import OtherLayoutError
from .source import METADATA, Source, find, inferred, modules, refuse_other_kinds
from .vaes import FoundVAE, find_vae

CONTROLNET = "ControlNet"  # stands among the parts of a source
MEANS = {"epsilon": "the noise (epsilon)", "v_prediction": "the velocity (v)", "sample": "the clean latents"}


def info(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: Any = None,
) -> dict[str, Any]:
    """What a source holds, as plain data, without loading its weights; also of files that `load` refuses.

    `problem` says why `load` refuses it; it is None where `load` takes it (a tokenizer may be missing all the same).
    """
    how: dict[str, Any] = {"revision": revision, "variant": variant, "token": token, "look": True}
    try:
        found = find(source, **how)
    except (LoadError, OtherLayoutError) as error:
        looks_further = isinstance(error, OtherLayoutError) or os.path.isdir(source)
        facts = facts_of_controlnet(source, str(error), **how) if looks_further else None
        if facts is not None:
            return facts
        if isinstance(error, OtherLayoutError):
            raise
        found = vae_folder(source, error)
    problem = found.problem
    if problem is None:
        try:
            refuse_other_kinds(found)
            modules(found, {})
        except LoadError as error:
            problem = str(error)
    if holds_words(found.tensors):
        found.kind, found.unknown = "file", []
    elif vae := vae_in(found):
        found.kind, found.unknown = "file", []
        found.parts, found.configs = of_vae(vae), {"vae": vae.config}
    tensors = found.tensors or {f"{p}.{n}": t for p, ts in found.parts.items() for n, t in ts.items()}
    prefixed = found.tensors or {names.PREFIXES[p] + n: t for p, ts in found.parts.items() for n, t in ts.items()}
    if names.kind_of(prefixed) == "ControlNet" and (facts := facts_of_controlnet(source, str(problem), **how)):
        return facts
    configs = dict(found.configs)
    for part in PARTS:
        if part not in configs and found.parts[part]:
            try:
                configs[part] = inferred(found, part)
            except (KeyError, IndexError, ValueError, ZeroDivisionError):
                configs[part] = {}

    return {
        "source": found.name,
        "form": found.kind,
        "kind": kind_told(found, prefixed),
        "words": words_in(found),  # of a textual inversion: names, number of vectors, their width
        "total": sums(tensors),
        "parts": {part: sums(ts) | {"config": configs.get(part)} for part, ts in found.parts.items() if ts},
        "ema": any(n.startswith("model_ema.diffusion_model") for n in tensors),
        "tokenizer": found.tokenizer is not None,
        "image_size": found.size,
        "prediction_type": found.defaults.prediction_type if found.defaults else found.prediction.kind,
        "prediction_by": found.prediction.by,  # what decided
        "defaults": found.defaults.as_dict() if found.defaults else None,
        "unknown": found.unknown,
        "problem": problem,
        "metadata": {k: v for k, v in found.metadata.items() if k != METADATA},
    }


def kind_told(found: Source, tensors: Mapping[str, Tensor]) -> str:
    """A short name for what a source holds, by its tensors under CompVis names."""
    if holds_words(found.tensors):
        of_sdxl = found.tensors.keys() & set(OF_SDXL)
        return f"{'words of SDXL' if of_sdxl else 'words of their own'} (textual inversion)"
    if not found.parts["unet"] and not found.parts["text"] and found.parts["vae"]:
        tiny = names.vae_kind(found.parts["vae"]) == "TAESD"
        return f"{'TAESD, a small VAE' if tiny else 'a VAE'} of Stable Diffusion v1"
    return names.kind_of(tensors)


def vae_in(found: Source) -> FoundVAE | None:
    """The VAE of a file that holds nothing else, as far as it can be read."""
    if names.vae_kind(found.tensors):
        with contextlib.suppress(ValueError, OSError):
            return find_vae(found.weights)
    return None


def vae_folder(source: Any, problem: LoadError) -> Source:
    """A folder with a VAE alone, of which no model can be made. Raises the problem for any other source."""
    try:
        vae = find_vae(source) if Path(source).is_dir() else None
    except (ValueError, OSError, TypeError):
        vae = None
    if vae is None:
        raise problem
    return Source(vae.name, "Hub layout", of_vae(vae), [], vae.weights, {"vae": vae.config}, problem=str(problem))


def of_vae(vae: FoundVAE) -> dict[str, dict[str, Tensor]]:
    return {"unet": {}, "vae": vae.tensors, "text": {}}


def words_in(found: Source) -> list[dict[str, Any]]:
    """The words of a textual inversion, as far as they can be read."""
    if not holds_words(found.tensors) and not bundles_words(found.tensors):
        return []
    try:
        words = read_words(found.weights)
    except LoadError:
        return []
    return [{"names": [w.name, *w.also], "vectors": len(w.vectors), "width": w.vectors.shape[1]} for w in words]


def sums(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """How many there are of tensors, parameters and bytes, and of which types."""
    return {
        "tensors": len(tensors),
        "parameters": sum(t.numel() for t in tensors.values()),
        "bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
    }


def facts_of_controlnet(source: Any, problem: str, **how: Any) -> dict[str, Any] | None:
    """What `info` says of a ControlNet; None where there is none.

    `difference` says whether its tensors are to be added to those of a UNet.
    """
    try:
        found = find_controlnet(source, **how)
    except PlainError:
        return None
    return {
        "source": found.name,
        "form": found.form,
        "kind": "ControlNet",
        "total": sums(found.tensors),
        "parts": {CONTROLNET: sums(found.tensors) | {"config": {**found.inferred, **found.told}}},
        "words": [],
        "difference": found.difference,
        "ema": False,
        "tokenizer": False,
        "image_size": None,
        "prediction_type": None,
        "defaults": None,
        "unknown": [],
        "problem": problem,
        "metadata": found.metadata,
    }


def format_info(facts: Mapping[str, Any]) -> str:
    """What `info` found, for people."""
    total = facts["total"]
    lines = [
        f"{printable(facts['source'])}: {facts['kind']}, {facts['form']}",
        f"{total['tensors']:,} tensors, {total['bytes'] / 1e6:,.1f} MB, {', '.join(total['dtypes'])}",
    ]
    for word in facts["words"]:
        called, count = ", ".join(printable(name, 60) for name in word["names"]), word["vectors"]
        lines.append(f"a word        {called}: {count} vector{'s' * (count > 1)} of {word['width']} numbers")
    for part, p in facts["parts"].items():
        lines.append(
            f"{names.PARTS.get(part, part):13} {p['parameters']:>13,} parameters in {p['tensors']} tensors, "
            f"{', '.join(p['dtypes'])}"
        )
        if p["config"]:
            lines.append("              " + ", ".join(f"{k}={printable(v, 60)}" for k, v in p["config"].items()))
    if facts.get("difference"):
        lines.append("difference    to be added to the weights of the model's UNet")
    if facts["parts"] and CONTROLNET not in facts["parts"]:
        lines.append(f"EMA weights   {'yes: --ema takes them' if facts['ema'] else 'no'}")
        none = "none of its own: CLIP's is looked for when a text is encoded"
        lines.append(f"tokenizer     {'its own' if facts['tokenizer'] else none}")
    if facts["parts"] and (usual := facts["defaults"]):
        options = "".join(f", {key}={printable(value, 60)}" for key, value in usual.get("options", {}).items())
        lines.append(
            f"draws with    {usual['scheduler']}{options}, {usual['num_inference_steps']} steps, guidance "
            f"{usual['guidance_scale']:g}; the UNet predicts {MEANS[usual['prediction_type']]}"
        )
    if facts["parts"] and facts.get("prediction_by"):
        lines.append(f"prediction    told by {printable(facts['prediction_by'], 200)}")
    if facts["parts"] and (facts["parts"].get("unet", {}).get("config") or {}).get("guidance_dim"):
        lines.append("guidance      the UNet is told its guidance scale, as LCM's are: there is no second half")
    if facts["metadata"]:
        some = list(facts["metadata"].items())[:20]
        more = f", and {len(facts['metadata']) - 20} more" if len(facts["metadata"]) > 20 else ""
        lines.append("metadata      " + ", ".join(f"{printable(k, 60)}={printable(v, 60)}" for k, v in some) + more)
    if facts["unknown"]:
        shown = ", ".join(printable(name, 100) for name in facts["unknown"][:5])
        lines.append(
            f"unknown       {len(facts['unknown'])} tensors: {shown}{', ...' if facts['unknown'][5:] else ''}"
        )
    if facts["problem"]:
        lines.append(f"not loaded    {printable(facts['problem'], 600)}")
    return "\n".join(lines)

"""What is at a source, before a model is made of it: `find`, and `modules`, into which its tensors fit.

Nothing here reads weights: tensors are names, shapes and a memory map.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import SmallFileError, parse_json, read_json
from ..schedule import PREDICTIONS
from ..text import CLIPText, TextConfig, own_names
from ..unet import UNet, UNetConfig
from ..vae import VAE, VAEConfig
from . import embeddings, hub, layout, names
from .checkpoint import read
from .configs import PARTS, LoadError, config_of, text_from_hub, unet_from_hub, vae_from_hub
from .defaults import Defaults, as_turbo, check_schedule, defaults_from_hub, defaults_of_file, is_turbo
from .predictions import DOUBT, NOISE, STATISTIC, Prediction, by_statistic, prediction_of
from .tokenizer import ADDED, padding_of, read_tokenizer

BUILT_IN = Path(__file__).parents[1] / "shapes.safetensors"
EXPECTED = (
    "give a .ckpt or .safetensors file, a folder of the Hub's layout, a repository such as "
    'CompVis/stable-diffusion-v1-4, or "shapes", the built-in model'
)
METADATA = "sd"  # the header entry of a self-contained file: JSON with config, tokenizer and more


@dataclass
class Source:
    """What was found at a source, before a model is made of it."""

    name: str
    kind: str  # "CompVis file", "self-contained file", "Hub layout"
    parts: dict[str, dict[str, Tensor]]  # "unet", "vae", "text" -> CompVis name without prefix -> tensor
    unknown: list[str]
    weights: Path  # the file, or that of the UNet; the first, if it has several
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # as far as the source tells
    tokenizer: dict[str, str] | None = None
    family: str = names.SD1  # or names.SD2
    size: int | None = None
    known_words: list[str] | None = None
    defaults: Defaults | None = None  # of a drawing, as far as the source tells
    prediction: Prediction = NOISE
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of a single file: all, by its own names
    metadata: dict[str, Any] = field(default_factory=dict)
    maps: list[tuple[Path, mmap]] = field(default_factory=list)  # of all files that tensors are mapped from
    files: dict[str, list[Path]] = field(default_factory=dict)  # of each part; of a single file, that as "unet"
    problem: str | None = None  # why `load` refuses it, where `find` was told to look only


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: Any = None,
    variant: str | None = None,
    look: bool = False,
) -> Source:
    """Look at a source without loading it: tensors are names, shapes and a memory map. Raises as `load` does.

    With `look`, the weights of a repository are not downloaded (only .safetensors headers are), and a folder
    that `load` refuses is described, with the reason as `problem`.
    """
    if isinstance(source, str) and source == "shapes":
        if not BUILT_IN.exists():
            raise LoadError(f"The built-in model is missing ({BUILT_IN.name}): install the package again.")
        return find_file(BUILT_IN, "shapes")
    hub.check_names(revision, variant, token)
    place = place_of(source, revision, EXPECTED)
    if isinstance(place, str):
        repository = hub.Repository(place, revision=revision, token=token)
        folder = repository.small_files()
        if not look:
            read_configs(folder, place)  # refuses other models before their gigabytes come
        elif headers := repository.headers(variant):
            return describe_folder(folder, place, headers, folder, look)
        return find_folder(repository.all_files(variant), place, variant, look)
    return find_folder(place, os.fspath(source), variant, look) if place.is_dir() else find_file(place, place.name)


def place_of(source: str | os.PathLike[str], revision: str | None, expected: str) -> Path | str:
    """The file or the folder at a source, or the name of a repository. Raises LoadError, which says what is expected.

    A folder of the Hub's cache stands for the snapshot of a revision in it.
    """
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str):
        raise LoadError(f"A source is a path or a repository's name, not {source!r}: {expected}.")
    path, text = Path(os.path.expanduser(source)), os.fspath(source)
    if text and path.is_dir():  # Path("") is the folder here
        return hub.snapshot_in(path, revision)
    if text and path.exists():
        return path
    looks_like_file = path.suffix.lower() in {".ckpt", ".safetensors", ".pt", ".pth", ".bin"}
    if not looks_like_file and hub.is_repository(text):
        return text
    shown = text if text and text.isprintable() else repr(text)
    raise LoadError(f"There is no file or folder {shown}: {expected}.")


def find_file(path: Path, name: str) -> Source:
    file = read(path, embeddings.INSIDE)
    parts, unknown = names.split(file.tensors)
    found = Source(name, "CompVis file", parts, unknown, path, tensors=file.tensors, metadata=file.metadata)
    found.family = names.SD2 if names.is_sd2(parts["unet"]) else names.SD1
    doubtful = found.family == names.SD2 and METADATA not in file.metadata
    decide(found, prediction_of(path, file.metadata, file.tensors, parts["unet"], doubtful))
    found.maps, found.files = [(path, file.map)], {"unet": [path]}
    if METADATA in file.metadata:
        try:
            ours = parse_json(file.metadata[METADATA])
            found.configs, found.tokenizer = ours["config"], ours["tokenizer"]
            found.size, found.known_words = ours["image_size"], ours["known_words"]
            found.kind = "self-contained file"
            sound = all(isinstance(found.configs[part], dict) for part in names.PARTS)
            sound &= all(isinstance(found.tokenizer[name], str) for name in names.TOKENIZER_FILES)
            sound &= isinstance(found.tokenizer.get(ADDED, ""), str)
            found.tokenizer = {
                name: found.tokenizer[name] for name in (*names.TOKENIZER_FILES, ADDED) if name in found.tokenizer
            }
            sound &= type(found.size) is int and found.size > 0
            sound &= all(isinstance(word, str) for word in found.known_words or [])
            if not sound:
                raise ValueError("values of other types")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LoadError(f"{path} has damaged metadata ({error!r}): convert it again.") from None
        try:
            found.defaults = Defaults.from_dict(ours.get("defaults") or {})  # files of version 0.1 have none
        except (ValueError, TypeError, AttributeError) as error:
            raise LoadError(f"{path} has defaults that cannot be used ({error}): convert it again.") from None
    return found


def decide(found: Source, prediction: Prediction) -> None:
    """Let a source predict this: it has the defaults that belong to it, and the size, where files do not tell it."""
    found.prediction = prediction
    if found.kind != "CompVis file" or prediction.kind not in PREDICTIONS:
        return
    turbo = found.family == names.SD2 and is_turbo(found.name, str(found.metadata.get("modelspec.title", "")))
    found.defaults = defaults_of_file(prediction.kind, found.metadata, found.tensors, turbo)
    if found.family == names.SD2:
        found.size = 768 if prediction.kind == "v_prediction" else 512


# ---- the Hub's layout


def find_folder(folder: Path, name: str, variant: str | None, look: bool = False) -> Source:
    """A folder of the Hub's layout; tensors get their CompVis names here."""
    if not (folder / "unet/config.json").is_file():
        layout.check_links(folder, ["unet/config.json"], name)
        for where in () if (folder / "unet").exists() else ("config.json", "vae/config.json"):  # no model at all
            kind = read_config_file(folder, name, where).get("_class_name") if (folder / where).is_file() else None
            if kind in ("AutoencoderKL", "AutoencoderTiny"):
                raise vae_alone(name, kind)
            if "ControlNet" in str(kind):
                raise controlnet_alone(name)
        files = sorted(p.name for p in folder.iterdir() if p.suffix in {".ckpt", ".safetensors"})
        hint = f"give the path of {files[0]} in it" if files else "give a weights file or another folder"
        raise LoadError(f"{name} is a folder without unet/config.json, not of the Hub's layout: {hint}.")
    chosen = layout.local_weights(folder, variant, name)  # a part may be in several files
    opened = {part: {file: read(folder / file) for file in files} for part, files in chosen.items()}
    tensors = {p: layout.merged({n: file.tensors for n, file in files.items()}, name) for p, files in opened.items()}
    found = describe_folder(folder, name, tensors, folder / chosen["unet"][0], look)
    found.maps = [(file.path, file.map) for files in opened.values() for file in files.values()]
    found.files = {part: [file.path for file in files.values()] for part, files in opened.items()}
    return found


def describe_folder(
    folder: Path, name: str, tensors: dict[str, dict[str, Tensor]], weights: Path, look: bool
) -> Source:
    """The tensors of a Hub layout under CompVis names; with `look`, under their own where that fails."""
    try:
        configs = read_configs(folder, name)
        parts = {part: rename(part, found, configs) for part, found in tensors.items()}
    except LoadError as error:
        if not look:
            raise
        return Source(name, "Hub layout", dict(tensors), [], weights, problem=str(error))
    try:
        texts = read_tokenizer(folder / "tokenizer")
        padding = padding_of(folder / "tokenizer", texts) if texts else None
    except ValueError as error:
        raise LoadError(f"{name} has a tokenizer that cannot be read ({error}): replace it.") from None
    if texts is None and configs["unet"].get("use_linear_in_transformer"):
        padding = 0  # SD 2's, whichever tokenizer is given
    configs["text"] |= {} if padding is None else {"padding": padding}
    side = read_config_file(folder, name, "unet/config.json").get("sample_size") or 64
    side = side if type(side) is int else 64
    size = 2 ** (len(configs["vae"]["ch_mult"]) - 1) * side
    found = Source(name, "Hub layout", parts, [], weights, configs, tokenizer=texts, size=size)
    found.family = names.SD2 if configs["unet"].get("use_linear_in_transformer") else names.SD1
    if (folder / "scheduler/scheduler_config.json").exists():
        found.defaults = defaults_from_hub(read_config_file(folder, name, "scheduler/scheduler_config.json"), name)
        found.prediction = Prediction(found.defaults.prediction_type, "scheduler_config.json")
    elif found.family == names.SD2:  # as of a single file that says nothing
        bias = parts["unet"].get(STATISTIC)
        found.prediction = by_statistic(None if bias is None or bias.is_meta else bias)
        if found.prediction.kind in PREDICTIONS:
            found.defaults = defaults_of_file(found.prediction.kind, {}, {})
    if found.family == names.SD2 and is_turbo(called(name)):
        found.defaults = as_turbo(found.defaults or Defaults())
    return found


def called(name: str) -> str:
    """What a folder or a repository is called, also one in the Hub's cache, where a commit is the folder's name."""
    path = Path(name)
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name


def rename(part: str, tensors: dict[str, Tensor], configs: Mapping[str, Any]) -> dict[str, Tensor]:
    if part == "text":
        return own_names(tensors)
    with torch.device("meta"):
        if part == "unet":
            unet = config_of(UNetConfig, configs["unet"])
            wanted = UNet(unet).state_dict()
            table = names.unet_to_hub(wanted, unet)
        else:
            vae = config_of(VAEConfig, configs["vae"])
            wanted = VAE(vae).state_dict()
            table = names.vae_to_hub(wanted, vae)
    return names.from_hub(tensors, table, {n: t.shape for n, t in wanted.items()})


def read_config_file(folder: Path, name: str, where: str) -> dict[str, Any]:
    try:
        content = read_json(folder / where)
    except SmallFileError as error:
        raise LoadError(f"{name} has no readable {where} ({error.reason}): give the whole folder.") from None
    if not isinstance(content, dict):
        raise LoadError(f"{name} has no readable {where} (it is no JSON object): give the whole folder.")
    return content


def read_configs(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """The sizes of the three parts. Raises LoadError for what is no Stable Diffusion v1."""
    with only_v1(name):
        configs = {
            "unet": unet_from_hub(read_config_file(folder, name, "unet/config.json")),
            "vae": vae_from_hub(read_config_file(folder, name, "vae/config.json")),
            "text": text_from_hub(read_config_file(folder, name, "text_encoder/config.json")),
        }
        if (folder / "scheduler/scheduler_config.json").exists():
            check_schedule(read_config_file(folder, name, "scheduler/scheduler_config.json"))
        for part, (kind, _) in PARTS.items():
            config_of(kind, configs[part])
    return configs


@contextmanager
def only_v1(name: str) -> Iterator[None]:
    """Within the block, a ValueError about the model called `name` becomes a LoadError, which is a whole sentence."""
    try:
        yield
    except LoadError:
        raise
    except (ValueError, TypeError) as error:
        raise LoadError(
            f"{name} is not Stable Diffusion v1, text to image: {error}; give a v1 model, such as "
            "CompVis/stable-diffusion-v1-4."
        ) from None


def vae_alone(name: str, kind: str) -> LoadError:
    what = "TAESD, a small VAE" if kind in ("TAESD", "AutoencoderTiny") else "a VAE"
    return LoadError(f"{name} holds {what} and no model: give it beside a model, with sd.with_vae (--vae).")


def controlnet_alone(name: str) -> LoadError:
    return LoadError(
        f"{name} holds ControlNet weights: give it beside a model, with sd.load_controlnet (--controlnet)."
    )


def refuse_other_kinds(found: Source) -> None:
    """Raise LoadError for weights of another model, by its name."""
    tensors = found.tensors or {
        names.PREFIXES[part] + n: t for part, tensors in found.parts.items() for n, t in tensors.items()
    }
    if found.tensors and embeddings.holds_words(found.tensors):
        raise LoadError(
            f"{found.name} holds words of their own (textual inversion) and no model: give it beside a model, with "
            "sd.textual_inversion (--embedding)."
        )
    if scale := names.scaled(tensors):
        raise LoadError(
            f"{found.name} holds weights in float8 that are to be multiplied by scales ({scale}), which are not "
            "read: give them in float16, or in plain float8."
        )
    if kind := names.vae_kind(tensors):
        raise vae_alone(found.name, kind)
    kind = names.kind_of(tensors)
    if kind == "LoRA":
        raise LoadError(f"{found.name} holds a LoRA, not a model: add it to one with sd.lora (--lora).")
    if kind == "ControlNet":
        raise controlnet_alone(found.name)
    if kind not in (names.SD1, names.SD2):
        what = "weights that are not recognised" if kind == "unknown" else f"{kind} weights"
        raise LoadError(
            f"{found.name} holds {what}: this library draws with Stable Diffusion v1 and 2 (text to image) only; "
            "give such a checkpoint, as CompVis/stable-diffusion-v1-4."
        )
    if found.prediction.kind == DOUBT:
        raise LoadError(
            f"{found.name} holds Stable Diffusion 2 and does not say whether it predicts the noise (epsilon) or the "
            'velocity (v_prediction), nor do its weights: give config={"defaults": {"prediction_type": "epsilon"}}, '
            'or "v_prediction" (--config with a file of that).'
        )
    if found.prediction.kind not in PREDICTIONS:
        raise LoadError(
            f"{found.name} says that it predicts {found.prediction.kind!r}: this library draws only with models that "
            f"predict {', '.join(PREDICTIONS[:-1])} or {PREDICTIONS[-1]}; give one of those."
        )
    if found.unknown:
        more = f" and {len(found.unknown) - 3} more" if len(found.unknown) > 3 else ""
        raise LoadError(
            f"{found.name}: a tensor is surplus ({', '.join(found.unknown[:3])}{more}); "
            "the file is not of Stable Diffusion v1 alone."
        )


def ema_weights(found: Source) -> dict[str, Tensor]:
    table = names.ema_names(found.parts["unet"])
    missing = [name for name in table.values() if name not in found.tensors]
    if missing:
        raise LoadError(
            f"{found.name} has no EMA weights (such as {missing[0]}): leave ema out, or give a full-EMA checkpoint."
        )
    return {name: found.tensors[flat] for name, flat in table.items()}


# ---- the networks that its tensors are of


def inferred(found: Source, part: str) -> dict[str, Any]:
    """Fields of a part's config that its tensors tell. Raises KeyError and the like where some are missing."""
    settings = PARTS[part][1](found.parts[part])
    if part == "text" and found.family == names.SD2:  # OpenCLIP's
        settings |= {"hidden_act": "gelu", "padding": 0}
    return settings


def sizes(found: Source, config: Mapping[str, Any]) -> tuple[UNetConfig, VAEConfig, TextConfig]:
    """What the source tells of the sizes, or else its shapes; `config` overrides both. Raises LoadError."""
    result = []
    for part, (kind, _) in PARTS.items():
        if not found.parts[part]:
            remedy = "give the full checkpoint or the repository"
            if part == "vae" and found.parts["text"]:
                remedy += ", or give a VAE as vae= (--vae)"
            raise LoadError(
                f"{found.name} has no {names.PARTS[part]}: a model needs all three parts (UNet, VAE, text "
                f"encoder) in one file; {remedy}."
            )
        settings = found.configs.get(part)
        if settings is None:
            try:
                settings = inferred(found, part)
            except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
                raise LoadError(
                    f"{found.name} has a {names.PARTS[part]} that is not Stable Diffusion v1's or is incomplete: "
                    f"tensor {error} is missing or misshapen; give another file, or its sizes as config= (--config)."
                ) from None
        result.append(config_of(kind, {**settings, **config.get(part, {})}))
    return tuple(result)


def modules(found: Source, config: Mapping[str, Any]) -> tuple[UNet, VAE, CLIPText]:
    """The three networks on the meta device.

    Raises LoadError, naming some tensors, unless the source has just those of the three parts.
    """
    unet_config, vae_config, text_config = sizes(found, config)
    with torch.device("meta"):
        unet, vae, text = UNet(unet_config), VAE(vae_config), CLIPText(text_config)
    for part, module in (("unet", unet), ("vae", vae), ("text", text)):
        check_fit(found.name, names.PARTS[part], found.parts[part], shapes_of(module))
    return unet, vae, text


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_fit(name: str, part: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise LoadError unless a part has just these tensors in these shapes; the message names some that differ."""
    wrong = {
        "is missing": [name for name in shapes if name not in tensors],
        "is surplus": [name for name in tensors if name not in shapes],
        "has the wrong shape": [
            f"{name} is {tuple(tensors[name].shape)}, not {shape}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
        "is not of floating point": [name for name, t in tensors.items() if not t.is_floating_point()],
    }
    for what, bad in wrong.items():
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise LoadError(
                f"{name}, {part}: a tensor {what} ({', '.join(bad[:3])}{more}); "
                "it is incomplete or not of Stable Diffusion v1."
            )

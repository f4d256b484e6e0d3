"""What the commands share of their command lines: the parser, and options that several of them have.

Nothing here imports torch, so that help is there at once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..files import printable
from .recipes import RECIPES

DTYPES = ("float16", "bfloat16", "float32", "float64")
STYLES = ("plain", "a1111", "comfy", "compel")  # of prompts; as in sd/prompts/styles.py, which needs more to import
LAST_SEED = 2**63 - 1
RANDOM = -1  # a seed that is chosen at random
SHOWN = 60  # characters of a wrong word that its message repeats


class CommandError(ValueError):
    """What is wrong with the command line, in one sentence."""


def nearest(word: str, known: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The known word that may have been meant, if one is near."""
    import difflib

    return next(iter(difflib.get_close_matches(word, known, 1, cutoff)), None)


class Formatter(argparse.RawDescriptionHelpFormatter):
    """For terminals of any width, also one that is too narrow for a word."""

    def __init__(self, prog: str):
        super().__init__(prog, width=min(max(shutil.get_terminal_size().columns - 2, 40), 1000))


class Parser(argparse.ArgumentParser):
    """argparse's parser with plainer words for what is wrong. An option that is not given is not in the result."""

    too_many = ""  # a sentence for words that no option and no argument takes

    def __init__(self, prog: str, description: str, epilog: str | None = None):
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            argument_default=argparse.SUPPRESS,
            formatter_class=Formatter,
        )

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """What is given on the command line, by name. Raises CommandError; --help and --version raise SystemExit."""
        found, unknown = self.parse_known_args(arguments)
        for word in unknown:
            if not word.startswith("-"):
                says = f"{self.prog} --help says what it takes."
                raise CommandError(self.too_many or f"{self.prog} cannot use the word {repeated(word)!r}: {says}")
            option = repeated(word.partition("=")[0])
            near = nearest(option, re.findall(r"--[\w-]+", self.format_help()))
            hint = f"; did you mean {near}?" if near else "."
            raise CommandError(f"There is no option {option}{hint} {self.prog} --help lists the options.")
        return vars(found)

    def error(self, message: str) -> NoReturn:
        message = message.replace("the following arguments are required:", "It still needs to know:")
        message = message.replace("expected one argument", "needs a value after it")
        message = message.replace("expected at least one argument", "needs a value after it")
        message = re.sub(r"^argument (?:\S+/)?(\S+?): ", r"\1 ", message)
        message = printable(message, 300)  # argparse repeats words as they are
        raise CommandError(f"{message.rstrip('.')}. {self.prog} --help lists the options.")


# ---- values: functions for argparse, which puts the option's name before what they say


def repeated(text: str) -> str:
    """A word of the command line, as a message repeats it."""
    return printable(text, SHOWN)


def whole(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """A whole number, within bounds where the command itself sets some."""
    bounds = f" from {least} to {most}" if most is not None else f" of at least {least}" if least is not None else ""

    def read(text: str) -> int:
        try:
            number = int(text)
            if (least is None or least <= number) and (most is None or number <= most):
                return number
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a whole number{bounds}, not {repeated(text)}")

    return read


def seed(text: str) -> int:
    return RANDOM if text.lower() == "random" else whole()(text)


def memory(text: str) -> str:
    """600MB; of a number alone, nobody means bytes"""
    return f"{text}MB" if re.fullmatch(r"\s*[0-9.]+\s*", text) else text


@dataclass(frozen=True)
class Chosen:
    """A LoRA, or a ControlNet, that is drawn with."""

    file: str
    scale: float | dict[str, float] = 1.0  # of both parts, or of "unet" and of "text"


def lora_file(text: str) -> Chosen:
    """FILE or FILE:SCALE"""
    file, colon, end = text.rpartition(":")
    if not colon or os.path.exists(text):
        return Chosen(text)
    try:
        scale = float(end)
    except ValueError:
        return Chosen(text)  # a path with a colon in it, as on Windows
    if not file or not math.isfinite(scale):
        raise argparse.ArgumentTypeError(f"must be like style.safetensors:0.8, not {repeated(text)}")
    return Chosen(file, scale)


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {repeated(text)}") from None


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text in choices:
            return text
        raise argparse.ArgumentTypeError(f"must be {', '.join(choices[:-1])} or {choices[-1]}, not {repeated(text)}")

    return read


def numbers_of(*names: str, least: int, most: int, example: str) -> Callable[[str], dict[str, int]]:
    """Whole numbers by name, such as image=2,rows=1: each of the names at most once, and not all of them 0."""

    def read(text: str) -> dict[str, int]:
        parts = [part.split("=") for part in text.split(",")]
        try:
            result = {name.strip(): int(number) for name, number in parts}
        except ValueError:
            result = {}
        known = result.keys() <= set(names) and len(result) == len(parts)
        if not known or not any(result.values()) or not all(least <= n <= most for n in result.values()):
            raise argparse.ArgumentTypeError(f"must be like {example}, not {repeated(text)}")
        return result

    return read


shares = numbers_of("image", "guidance", "rows", least=1, most=1_000_000, example="image=2,guidance=2,rows=1")
sides = numbers_of("left", "right", "top", "bottom", least=0, most=8192, example="left=128,top=64, in pixels to 8192")


# ---- options

SOURCE: dict[str, dict[str, Any]] = {
    "revision": {"metavar": "REV", "help": "The branch, tag or commit of a Hub repository."},
    "hub-variant": {
        "metavar": "NAME",
        "help": "Which files of a Hub repository to take, such as fp16. Parts that have none of that kind are taken "
        "as they are.",
    },
    "tokenizer": {
        "metavar": "DIR",
        "help": "A folder with vocab.json and merges.txt (or tokenizer.json), for a model that has none.",
    },
    "config": {"metavar": "JSON", "help": "A file with sizes that the weights do not tell, such as the head count."},
    "vae": {
        "metavar": "VAE",
        "help": "Another VAE than the model's own, or for a model without one: a file, a folder or a Hub repository.",
    },
    "ema": {"action": "store_true", "help": "Take the averaged (EMA) weights of a checkpoint that has both kinds."},
}


def add_source_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options about where the weights come from: the named ones, or all."""
    group = parser.add_argument_group("about the model's files")
    for name in names or SOURCE:
        group.add_argument(f"--{name}", **SOURCE[name])


def dtype_option(what: str, choices: Sequence[str] = DTYPES) -> dict[str, Any]:
    return {"type": one_of(*choices), "metavar": "TYPE", "help": f"{what} One of {', '.join(choices)}."}


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Options of any drawing. They are fields of `Drawing`, which has the defaults."""
    add = parser.add_argument_group("what to draw").add_argument
    add("--negative", dest="negative_prompt", metavar="TEXT", help="What to stay away from.")
    add("--prompt-style", type=one_of(*STYLES), metavar="STYLE", help="How the prompts are written: plain, as "
        "diffusers reads them, cut at 75 tokens; a1111 or comfy, with weights such as (word:1.2), of any length; or "
        "compel, with weights such as word++ and (two words)1.3. Default: plain.")  # fmt: skip
    add("--clip-skip", type=whole(0), metavar="N", help="How many of the text encoder's last layers are left "
        "out; 1 is what AUTOMATIC1111 calls 2. Default: 0.")  # fmt: skip
    add("--steps", dest="num_inference_steps", type=whole(), metavar="N", help="How many steps to take, 1 to 1000. "
        "Default: the model's own number; 50 for Stable Diffusion v1.")  # fmt: skip
    add("--guidance", dest="guidance_scale", type=number, metavar="G", help="How closely to follow the prompt, 0 to "
        "100. At 1 or less, --negative has no effect. Default: the model's own; 7.5 for Stable Diffusion "
        "v1.")  # fmt: skip
    add("--guidance-rescale", type=number, metavar="R", help="How much of the contrast that guidance adds is taken "
        "back, 0 to 1; 0.7 is usual for models whose noise goes to the end. Default: 0.")  # fmt: skip
    add("--seed", type=seed, metavar="N", help="Which noise to start from; -1 or random: any, and the command says "
        "which. The next picture starts from the next seed. Default: 0.")  # fmt: skip
    add("--rng", type=one_of("cpu", "cuda"), metavar="KIND", help="Whose noise a seed stands for: cpu, as in "
        "diffusers; or cuda, as an NVIDIA GPU draws it for AUTOMATIC1111; on any machine. Default: cpu.")  # fmt: skip
    add("--height", type=whole(), metavar="PIXELS", help="A multiple of 8. Default: the model's own size.")
    add("--width", type=whole(), metavar="PIXELS", help="A multiple of 8. Default: the model's own size.")
    add("--scheduler", metavar="NAME", help="How noise is removed step by step: pndm, ddim, 'Euler a', "
        "'DPM++ 2M Karras' and others; an unknown name lists them. Default: the model's own; pndm "
        "for Stable Diffusion v1.")  # fmt: skip
    add("--recipe", type=one_of(*RECIPES), metavar="NAME", help="Take fewer steps: quick and draft with any model, "
        "lcm and turbo with models that were made for it. Other options override what it says. artist prints what "
        "it does.")  # fmt: skip
    add("--eta", type=number, metavar="E", help="How much new noise ddim adds in each step, 0 to 1. Default: 0.")
    add = parser.add_argument_group("from which picture").add_argument
    add("--image", metavar="FILE", help="A picture to draw from. It says the size, too, unless --height and --width "
        "do: then it is scaled to cover them, and cut.")  # fmt: skip
    add("--strength", type=number, metavar="S", help="How much is drawn anew, above 0, to 1. Default: 0.8; 1 with "
        "--extend and --mask alpha.")  # fmt: skip
    add("--mask", metavar="FILE", help="A picture of the same size: what is white is drawn anew, black stays, grey "
        "is in between. The word alpha stands for what is transparent in the image.")  # fmt: skip
    add("--paste", action=argparse.BooleanOptionalAction, help="Whether the image itself is put back where the mask "
        "is black. Default: it is.")  # fmt: skip
    add("--extend", type=sides, metavar="SIDES", help="Draw on beyond the edges of the image, for example "
        "left=128,top=64, in pixels.")  # fmt: skip
    add = parser.add_argument_group("what it follows").add_argument
    add("--controlnet", action="append", type=lora_file, metavar="FILE[:SCALE]", help="A ControlNet for the model, "
        "and how much of it: canny.safetensors:0.8. May be given several times. Default of the scale: "
        "1.")  # fmt: skip
    add("--control-image", action="append", metavar="FILE", help="The picture that the ControlNet follows, such as "
        "edges or a pose; one for each of several. It says the size unless --image, or --height and --width "
        "do.")  # fmt: skip
    add("--canny", action="store_true", help="Follow the edges that Canny's method finds in the control image, which "
        "is then any picture. Needs OpenCV: pip install 'artificial-artist[canny]'.")  # fmt: skip
    add("--control-start", type=number, metavar="S", help="The share of the steps before which it is left out, 0 to "
        "1. Default: 0.")  # fmt: skip
    add("--control-end", type=number, metavar="S", help="The share of the steps after which it is left out, 0 to "
        "1. Default: 1.")  # fmt: skip
    add("--guess-mode", action="store_true", help="Let the ControlNet say what to draw, for an empty prompt.")
    add = parser.add_argument_group("with which model, and where it runs").add_argument
    add("--model", help="The built-in model shapes, a .ckpt or .safetensors file, a folder, or a Hub repository. "
        "Default: shapes.")  # fmt: skip
    add("--lora", action="append", type=lora_file, metavar="FILE[:SCALE]", help="A LoRA to add to the model, and how "
        "much of it: style.safetensors:0.8. May be given several times. Default of the scale: 1.")  # fmt: skip
    add("--lora-dir", action="append", metavar="DIR", help="A folder with LoRAs, in which those are looked for "
        "that the prompt names, as <lora:style:0.8>, or a picture that is drawn again.")  # fmt: skip
    add("--embedding", action="append", metavar="FILE", help="A textual inversion file (.pt, .bin, .safetensors): "
        "the model then knows its word, and prompts may use it. May be given more than once.")  # fmt: skip
    add("--device", help="Where to compute: cpu, cuda, cuda:1 or mps. Default: a GPU if there is one.")
    add("--dtype", **dtype_option("The kind of numbers to compute with. Default: float16 on a GPU, else float32."))
    add = parser.add_argument_group("where it goes").add_argument
    add("--force", action="store_true", help="Write over existing files.")
    add("--quiet", action="store_true", help="Show no progress bar.")

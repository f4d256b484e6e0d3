"""`artist PROMPT`, also `artist draw PROMPT`: settle what is drawn and where it goes, load, draw, write."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..files import printable, sha256_of
from ..parallel import launch
from . import compare, convert, describe, given_parts, given_pictures, info, study
from .options import (
    CommandError,
    Parser,
    add_drawing_options,
    add_source_options,
    memory,
    number,
    one_of,
    shares,
    whole,
)
from .output import picture_paths, save_result
from .preview import Previews, check_previews
from .recipes import explain
from .settings import (
    Drawing,
    differences,
    drawing_of,
    hashes_of,
    load_model,
    make_sampler,
    place,
    settings_used,
    with_controls,
    with_solver,
)
from .threads import Neighbours, choose_threads

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..sampler import SimpleSampler

VARIANTS = {  # options that only work with some
    "memory": ("lean",),
    "plan": ("lean", "parallel"),
    "exact": ("simple",),
    "ranks": ("parallel",),
    "split": ("parallel",),
    "threads": ("simple", "lean"),
    "preview_vae": ("simple", "parallel"),  # the plan of lean does not count its memory
}


def parser() -> Parser:
    others = {"study": study, "describe": describe, "info": info, "compare": compare, "convert": convert}
    epilog = ["other commands; artist help NAME tells more about each:"]
    epilog += [f"  artist {name:10}{command.SUMMARY}" for name, command in others.items()]
    epilog += ["To draw a single word that is the name of a command, or looks like one: artist draw WORD."]
    what = "Draw a picture from a text, with Stable Diffusion v1 or with the small built-in model."
    result = Parser("artist", what, "\n".join(epilog))
    result.too_many = 'A prompt of several words needs quotation marks: artist "a red star".'
    result.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help='What to draw: "a red star above a blue ring on a white background".',
    )
    result.add_argument("--version", action="version", version=f"artist {__version__}")
    add_drawing_options(result)
    add = result.add_argument_group("how many pictures, and their names").add_argument
    add("-o", "--output", metavar="PNG", help="A file, or a folder; with a slash at the end, it is made. Default: "
        "the first free artist-001.png.")  # fmt: skip
    add("--count", type=whole(1, 10_000), metavar="N", help="How many pictures to draw. Default: 1.")
    add("--hires", type=number, metavar="N", help="Draw the picture, then enlarge it so many times, above 1 to 8, "
        "and draw it once more from that.")  # fmt: skip
    add("--embedding-dir", action="append", metavar="DIR", help="A folder in which the embeddings are looked for "
        "that the picture of --again names. May be given more than once.")  # fmt: skip
    add("--preview", type=whole(1, 1000), metavar="N", help="Show what is being drawn: a rough picture beside the "
        "output, NAME-preview.png, written anew every N steps and removed at the end. It stays where the drawing is "
        "stopped.")  # fmt: skip
    add("--preview-vae", metavar="FILE", help="Draw the previews with this VAE, such as TAESD, in place of rough "
        "colours.")  # fmt: skip
    add("--again", metavar="PNG", help="Draw a picture that artist drew before; other options change it.")
    add = result.add_argument_group("how the work is done").add_argument
    add("--variant", type=one_of("simple", "lean", "parallel"), metavar="NAME", help="simple; lean, which takes "
        "little memory; or parallel, which shares the work among several processes. Default: simple.")  # fmt: skip
    add("--exact", action="store_true", help="For simple: compute exactly as the textbook code does. This "
        "is slower than the default for large models, and takes less memory.")  # fmt: skip
    add("--memory", type=memory, metavar="SIZE", help="For lean: the most memory to take, for example 1.5GB, 600MB "
        "or 600, which are MB. Default: most of what is free.")  # fmt: skip
    add("--threads", type=whole(1, 4096), metavar="N", help="For simple and lean on a CPU: with how many threads to "
        "compute, at most one a core. Default: as many as there are cores that no other program keeps "
        "busy.")  # fmt: skip
    add("--ranks", type=whole(1, 1024), metavar="N", help="For parallel: how many processes to start on this "
        "machine. Leave it out under torchrun.")  # fmt: skip
    add("--split", type=shares, metavar="SPLIT", help="For parallel: how to divide the work, for example "
        "image=2,guidance=2,rows=1. Default: the fastest way.")  # fmt: skip
    add(
        "--plan", action="store_true", help="For lean and parallel: say how the work would be done, and draw nothing."
    )
    add_source_options(result)
    return result


def run(arguments: Sequence[str]) -> int:
    if not arguments:
        parser().print_help()
        return 2
    neighbours = Neighbours()
    drawing = settle(parser().parse(arguments))
    leads = drawing.variant != "parallel" or launch.rank() == 0  # of several ranks, one writes and shows progress
    if not leads:
        warnings.showwarning = lambda *_: None  # rank 0 says it
    else:
        explain(drawing)
    paths: list[Path] = []
    numbered = False
    if leads and not drawing.plan:  # before any work is done
        paths, numbered = picture_paths(drawing.output, drawing.count, force=drawing.force)
        check_previews(drawing, paths)
    try:
        if drawing.ranks and drawing.ranks > 1 and not launch.is_rank() and not drawing.plan:
            launch.start_ranks(arguments, drawing.ranks, drawing.seed)
            return 0
        carry_out(drawing, paths, neighbours, leads=leads, numbered=numbered)
    finally:
        if paths and drawing.output and drawing.output.endswith(("/", os.sep)):
            with suppress(OSError):  # a folder in which nothing came to lie, made for nothing
                os.rmdir(drawing.output)
    return 0


def carry_out(
    drawing: Drawing, paths: Sequence[Path], neighbours: Neighbours, *, leads: bool, numbered: bool
) -> None:
    if leads:
        hash_ahead(drawing)
    sampler, hashes = prepare(drawing, leads=leads), None
    drawing = with_threads(with_solver(drawing, sampler.model), neighbours)
    drawing = with_controls(drawing, sampler.model)
    if drawing.plan:
        text = say_plan(sampler, drawing)
        if leads:
            print(text)
        return
    previews = Previews(drawing, sampler.model, paths)
    for drawn in pictures(sampler, drawing, previews, show=leads and not drawing.quiet):
        if leads:
            hashes = hashes or hashes_of(sampler.model)  # not before the first step: gigabytes are read for them
            drawn = replace(drawn, settings=drawn.settings | hashes)
            write(drawn, paths[drawn.number], force=drawing.force, numbered=numbered)
            previews.remove(drawn.number)


def hash_ahead(drawing: Drawing) -> None:
    """Read the model's file for its hash in a thread, while this one imports torch: seconds, for gigabytes.

    Not for lean, whose memory is counted, nor where nothing is drawn.
    """

    def read() -> None:
        with suppress(OSError):
            sha256_of(drawing.model)

    if drawing.variant == "simple" and os.path.isfile(drawing.model):
        threading.Thread(target=read, daemon=True).start()


# ---- what is drawn, and where it goes


def settle(given: Mapping[str, Any]) -> Drawing:
    """The drawing that is asked for. Raises ValueError for options that do not fit together."""
    drawing = drawing_of(given)
    if drawing.variant == "parallel":
        launch.check_environment()
    for option, variants in VARIANTS.items():
        if option in given and drawing.variant not in variants:
            option = option.replace("_", "-")
            known = f"--{option} only works with --variant {' or '.join(variants)}"
            if "variant" in given:
                raise CommandError(f"{known}, and you asked for --variant {drawing.variant}: leave one of them out.")
            raise CommandError(f"{known}: add that, or leave --{option} out.")
    if drawing.memory is not None:
        from ..lean.plan import bytes_of

        try:
            bytes_of(drawing.memory)
        except ValueError:
            size = printable(drawing.memory, 60)
            raise CommandError(f"--memory must be a size such as 600MB or 1.5GB, not {size!r}.") from None
    return drawing


# ---- the sampler, and how it would go about it


def prepare(drawing: Drawing, *, leads: bool) -> SimpleSampler:
    model = load_model(drawing)
    if leads and drawing.again and not drawing.plan:
        for difference in [
            *differences(drawing, hashes_of(model)),
            *given_pictures.others(drawing),
            *given_parts.others(drawing),
        ]:
            warnings.warn(difference)
    return make_sampler(model, drawing)


def with_threads(drawing: Drawing, neighbours: Neighbours) -> Drawing:
    """With the number of threads that compute from now on; ranks were given theirs when they were started."""
    if drawing.variant == "parallel" or place(drawing.device) != "cpu" or drawing.plan:
        return drawing
    threads, why = choose_threads(drawing.threads, None if drawing.exact else neighbours)
    if why and not drawing.quiet:
        warnings.warn(why)
    return replace(drawing, threads=threads)


def say_plan(sampler: Any, drawing: Drawing) -> str:
    call = {"prompt": drawing.prompt, **drawing.call}
    if drawing.variant == "parallel":
        call |= {"num_images_per_prompt": drawing.count, "ranks": drawing.ranks}
    plan = str(sampler.plan(**call))
    if not drawing.hires:
        return plan
    from ..pictures import enlarged_size

    width, height = enlarged_size(*size_of_drawing(sampler.model, drawing), drawing.hires)
    # Only the plan: a picture to begin with changes nothing in it but the number of steps.
    larger = sampler.plan(**{k: v for k, v in call.items() if k != "image"} | {"width": width, "height": height})
    return f"The picture:\n{plan}\n\nThe picture, enlarged:\n{larger}"


def size_of_drawing(model: Any, drawing: Drawing) -> tuple[int, int]:
    """Width and height of what is drawn first."""
    given = drawing.given or {}
    picture = given.get("image") or next(iter(given.get("control_image", ())), None)
    own = picture.size if picture else (model.defaults.width or model.size, model.defaults.height or model.size)
    return drawing.width or own[0], drawing.height or own[1]


# ---- drawing


@dataclass(frozen=True)
class Drawn:
    number: int  # 0, 1, ...
    image: Image
    settings: dict[str, Any]  # for the PNG
    seconds: float  # for this picture, and those that were drawn together with it


def pictures(
    sampler: SimpleSampler, drawing: Drawing, previews: Previews | None = None, *, show: bool
) -> Iterator[Drawn]:
    """Draw the pictures one by one, or as many at a time as ranks share among them."""
    from tqdm import tqdm

    done, together = 0, at_once(sampler, drawing)
    while done < drawing.count:
        start, n = time.perf_counter(), min(together, drawing.count - done)
        if n < together and drawing.split:  # fewer are left than the split deals out
            sampler = make_sampler(sampler.model, replace(drawing, split={**drawing.split, "image": n}))
        seed = drawing.seed + done
        numbers = f" {done + 1}{f'-{done + n}' if n > 1 else ''}/{drawing.count}" if drawing.count > 1 else ""
        call = {"prompt": drawing.prompt, "seed": seed, "num_images_per_prompt": n, **drawing.call}
        bar = partial(tqdm, unit="step", disable=not show)
        if drawing.hires:
            from ..pictures import enlarged_size, from_enlarged

            first = size_of_drawing(sampler.model, drawing)
            enlarged_size(*first, drawing.hires)  # too large a picture is named before anything is drawn
        watch = partial(previews.show, first=done) if previews else None
        images, request = draw_once(sampler, call, partial(bar, desc=f"drawing{numbers}"), watch)
        if drawing.hires:
            again = call | from_enlarged(images, drawing.hires)
            images, _ = draw_once(sampler, again, partial(bar, desc=f"enlarged{numbers}"), watch)
        seconds = time.perf_counter() - start
        for i, image in enumerate(images):
            settings = settings_used(drawing, sampler.model, request) | {"seed": seed + i}
            yield Drawn(done + i, image, settings, seconds)
        done += n


def draw_once(
    sampler: SimpleSampler, call: dict[str, Any], bar: Any, watch: Callable[[Any, int], None] | None
) -> tuple[list[Image], Any]:
    """The pictures of a call, and its request; `bar` is tqdm; `watch` is told of every step, and of their number."""
    request = sampler.request(**call)
    if make_plan := getattr(sampler, "make_plan", None):
        make_plan(request)  # too little memory is said before a bar is shown
    steps = len(request.timesteps)
    for step in bar(sampler.run(request), total=steps):
        if watch is not None:
            watch(step, steps)
        latents = step.latents
    images = sampler.finish(latents, request)
    assert isinstance(images, list)
    return images, request


def at_once(sampler: SimpleSampler, drawing: Drawing) -> int:
    """How many pictures are drawn together: one, or as many as ranks deal out among them."""
    if drawing.variant != "parallel":
        return 1
    from ..parallel.sampler import ParallelSampler, world

    assert isinstance(sampler, ParallelSampler)
    images = min(drawing.count, world()[1])
    return sampler.plan(drawing.prompt, num_images_per_prompt=images, **drawing.call).split.image


def write(drawn: Drawn, path: Path, *, force: bool, numbered: bool = False) -> None:
    from ..image import save_png

    def save(path: Path, force: bool) -> None:
        save_png(drawn.image, path, drawn.settings, force=force)

    path = save_result(save, path, "picture", force=force, numbered=numbered)
    width, height = drawn.image.size
    print(f"{path}  {width} x {height}, seed {drawn.settings['seed']}, {drawn.seconds:.1f} s", flush=True)

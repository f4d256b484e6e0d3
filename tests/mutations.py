"""Damaged and hostile files of every kind that is read: python -m tests.mutations --count 50000 --seed 0

Each is a sound file with a few changes: bytes that are changed, cut, doubled or moved, or, where the file has a
structure (JSON, a safetensors header, a pickle in its zip, chunks of a PNG with their checksums), values in it that
are exchanged for odd ones. A reader must take it, or raise the library's own error in one printable line, in little
time and memory. A failure is printed with the number that makes it again: --only KIND:NUMBER.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SECONDS, MEGABYTES, LETTERS = 2.0, 300, 720  # the most that a reader may take, and the longest message


class Kind(NamedTuple):
    sound: bytes
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], Any]
    name: str  # of the file


# ---- changes


def bytes_changed(data: bytes, r: random.Random) -> bytes:
    """A few changes of bytes."""
    made = bytearray(data)
    for _ in range(r.choice([1, 1, 2, 4, 16])):
        at, length = r.randrange(len(made) + 1), r.choice([1, 1, 2, 8, 64, 1024])
        what = r.randrange(6)
        if what == 0:
            made[at : at + length] = r.randbytes(min(length, len(made) - at))
        elif what == 1:
            del made[at : at + length]
        elif what == 2:
            made[at:at] = r.randbytes(length)
        elif what == 3:
            made[at:at] = made[at : at + length] * r.choice([1, 2, 10])
        elif what == 4:
            made[at : at + length] = bytes([r.choice([0, 255, 127, 128])]) * min(length, len(made) - at)
        elif r.random() < 0.3:
            del made[at:]
    return bytes(made)


ODD: list[Callable[[random.Random], Any]] = [
    lambda r: r.choice(
        [None, True, False, 0, -1, 1, 2, 3, 4, 5, 1e308, -1e-308, 0.5, 1 << 31, 1 << 63, 1 << 70, 10**400]
    ),
    lambda r: r.choice(
        ["", "x", "\x1b[31mred\x1b[0m", "\u202e", "\ud83d\ude00", "a" * 5000, "../../etc", "\n", "NaN"]
    ),
    lambda r: r.choice([[], {}, [[]], [1, 2], {"a": 1}, [None], [1.5], [True], [-1, 4], [1 << 40] * 4, ["a"] * 40]),
    lambda r: json.loads("[" * 60 + "]" * 60),
    lambda r: r.choice([float("inf"), float("nan"), -float("inf")]),
    lambda r: [r.randrange(1 << 20) for _ in range(r.choice([1, 4, 5, 100]))],
]


def value_changed(value: Any, r: random.Random) -> Any:
    """JSON with one value exchanged, left out, doubled, or under another name."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        key = r.choice(list(value))
        what = r.randrange(5)
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return {(r.choice(["", "x", "\x1b]0;a\x07", key * 2]) if k == key else k): v for k, v in value.items()}
        return {k: value_changed(v, r) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and r.random() < 0.7:
        at = r.randrange(len(value))
        return [*value[:at], value_changed(value[at], r), *value[at + r.choice([0, 1, 1]) :]]
    return r.choice(ODD)(r)


def json_changed(data: bytes, r: random.Random) -> bytes:
    if r.random() < 0.3:
        return bytes_changed(data, r)
    value = json.loads(data)
    for _ in range(r.choice([1, 1, 2, 5])):
        value = value_changed(value, r)
    return json.dumps(value, ensure_ascii=r.random() < 0.8).encode("utf-8", "surrogatepass")


def safetensors_changed(data: bytes, r: random.Random) -> bytes:
    if r.random() < 0.2:
        return bytes_changed(data, r)
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    where = r.random()
    if where < 0.3 and "__metadata__" in header:
        own = header["__metadata__"]
        name = r.choice(list(own))
        try:
            own[name] = json.dumps(value_changed(json.loads(own[name]), r))
        except ValueError:
            own[name] = value_changed(own[name], r)
    elif where < 0.6:  # a tensor that is left out, with its bytes: sound, but not whole
        name = r.choice([n for n in header if n != "__metadata__"])
        start, stop = header.pop(name)["data_offsets"]
        rest = rest[:start] + rest[stop:]
        for entry in (e for n, e in header.items() if n != "__metadata__"):
            if entry["data_offsets"][0] >= stop:
                entry["data_offsets"] = [n - stop + start for n in entry["data_offsets"]]
    elif where < 0.8:  # a tensor of another shape, whose bytes fit
        entry = header[r.choice([n for n in header if n != "__metadata__"])]
        shape = list(entry["shape"])
        r.shuffle(shape)
        entry["shape"] = r.choice([shape, [*shape, 1], [1, *shape], [-1 * n for n in shape], [0]])
    else:
        header = value_changed(header, r)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    made = len(text).to_bytes(8, "little") + text + rest
    return bytes_changed(made, r) if r.random() < 0.1 else made


def zip_changed(data: bytes, r: random.Random) -> bytes:
    """The pickle in torch's zip, or the zip itself."""
    if r.random() < 0.3:
        return bytes_changed(data, r)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("data.pkl"):
                content = bytes_changed(content, r)
            elif r.random() < 0.02:
                content = content[: len(content) // 2]
            new.writestr(member.filename, content)
    return made.getvalue()


def png_changed(data: bytes, r: random.Random) -> bytes:
    """The chunks of a PNG, with right checksums most of the time."""
    if r.random() < 0.2:
        return bytes_changed(data, r)
    made, at = data[:8], 8
    while at + 8 <= len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        at += 12 + length
        if kind in (b"tEXt", b"iTXt", b"zTXt"):
            head, found, text = body.rpartition(b"\0")
            if r.random() < 0.5 and text.startswith(b"{"):
                text = json_changed(text, r)
            body = head + found + (text if r.random() < 0.6 else bytes_changed(text, r))
            if r.random() < 0.1:  # what unpacks to much
                kind, body = (
                    b"zTXt",
                    b"sd\0\0" + zlib.compress(r.choice([b"[", b"a", b" "]) * (1 << r.randrange(16, 27))),
                )
        elif r.random() < 0.1:
            body = bytes_changed(body, r)
        check = zlib.crc32(kind + body) if r.random() < 0.95 else r.randrange(1 << 32)
        chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)
        made += chunk * r.choice([1] * 30 + [0, 2, 50])
    return made


# ---- kinds


def kinds(folder: Path) -> dict[str, Kind]:
    """Sound files, and what reads them."""
    import torch
    from PIL import Image

    import sd
    from sd.adapt.taesd import TinyVAE
    from sd.cli.settings import drawing_of
    from sd.image import save_png
    from sd.study.traces import Trace
    from sd.text import TextConfig
    from sd.weights.checkpoint import write_safetensors
    from sd.weights.told import read_config
    from tests.layouts import compvis_tensors, make_model, tokenizer_files, write_ckpt

    unet = sd.UNetConfig(
        model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1,), num_heads=2,
        context_dim=8, num_groups=4,
    )  # fmt: skip
    vae = sd.VAEConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, num_groups=4)
    text = TextConfig(517, 8, 16, 1, 1)
    model = make_model(unet, vae, text)
    configs = {
        "unet": {"num_heads": 2, "num_groups": 4},
        "vae": {"num_groups": 4},
        "text": {"num_attention_heads": 1},
    }
    (folder / "config.json").write_text(json.dumps(configs))
    sd.save(model, folder / "own.safetensors")
    write_ckpt(folder / "a.ckpt", compvis_tensors(model))
    settings = {"prompt": "a red star", "negative_prompt": "blue", "seed": 1, "num_inference_steps": 2, "eta": 0.0,
                "guidance_scale": 7.5, "scheduler": "ddim", "width": 64, "height": 64, "model": "shapes",
                "model_hash": "0123456789", "dtype": "float32", "ema": False}  # fmt: skip
    save_png(Image.new("RGB", (64, 64)), folder / "a.png", settings)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 4, 4, 4, generator=g)
    Trace(torch.tensor([900.0, 400.0]), x, x, x, x, x, x[0], torch.randn(5, 3, generator=g), settings).save(
        folder / "trace.safetensors"
    )
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for name, content in tokenizer_files().items():
        (tokenizer / name).write_text(content, encoding="utf-8")
    vocab = json.loads(tokenizer_files()["vocab.json"])
    more = {"id": 516, "content": "<cat>", "single_word": False, "lstrip": False, "rstrip": False}
    one = {"model": {"vocab": vocab, "merges": []}, "added_tokens": [more | {"special": False, "normalized": True}]}

    def load(path: Path) -> None:
        problem = sd.info(path)["problem"]
        refused = None
        try:
            sd.load(path, config=folder / "config.json")
        except ValueError as error:
            own(error)
            refused = error
        # A tokenizer is no matter of `info`: it may come from elsewhere.
        agree = problem or refused is None or "tokenizer" in str(refused)
        assert agree, f"info says no problem, load says {refused}"

    def tokens(path: Path) -> None:
        loaded = sd.load(folder / "a.ckpt", config=folder / "config.json", tokenizer=path.parent)
        loaded.encode_prompt(["a red <cat>"])

    words = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 8)}, "name": "cat", "step": 1}
    torch.save(words, folder / "words.pt")
    write_safetensors(folder / "words.safetensors", {"emb_params": torch.ones(2, 8)}, {"name": "cat"})
    write_safetensors(folder / "vae.safetensors", model.vae.state_dict(), {"a": "b"})
    sizes = sd.VAEConfig(ch=8, ch_mult=(1, 1), num_res_blocks=1, num_groups=1, scale_factor=1.0)
    write_safetensors(folder / "taesd.safetensors", TinyVAE(sizes, vae).state_dict(), {"a": "b"})

    def join(function: Callable[..., Any]) -> Callable[[Path], None]:
        def read(path: Path) -> None:
            sd.info(path)
            function(model, path)

        return read

    sub = folder / "one"
    sub.mkdir()

    def of(name: str) -> bytes:
        return (folder / name).read_bytes()

    return {
        "ckpt": Kind(of("a.ckpt"), zip_changed, load, "m.ckpt"),
        "safetensors": Kind(of("own.safetensors"), safetensors_changed, load, "m.safetensors"),
        "png": Kind(of("a.png"), png_changed, lambda path: drawing_of({"again": str(path)}), "m.png"),
        "config": Kind(of("config.json"), json_changed, lambda path: checked(read_config(path)), "c.json"),
        "vocab": Kind(of("tokenizer/vocab.json"), json_changed, tokens, "tokenizer/vocab.json"),
        "merges": Kind(of("tokenizer/merges.txt"), bytes_changed, tokens, "tokenizer/merges.txt"),
        "tokenizer": Kind(json.dumps(one).encode(), json_changed, tokens, "one/tokenizer.json"),
        "words": Kind(of("words.pt"), zip_changed, join(sd.textual_inversion), "style.pt"),
        "emb_params": Kind(
            of("words.safetensors"), safetensors_changed, join(sd.textual_inversion), "style.safetensors"
        ),
        "vae": Kind(of("vae.safetensors"), safetensors_changed, join(sd.with_vae), "v.safetensors"),
        "taesd": Kind(of("taesd.safetensors"), safetensors_changed, join(sd.with_vae), "e.safetensors"),
        "trace": Kind(of("trace.safetensors"), safetensors_changed, lambda p: Trace.load(p).norms, "t.safetensors"),
    }


def checked(config: Any) -> None:
    from sd.weights.configs import PARTS, config_of

    for part, (kind, _) in PARTS.items():
        config_of(kind, config.get(part, {}))


def own(error: BaseException) -> None:
    """Raise AssertionError unless this is an error of the library's own: one printable line."""
    assert isinstance(error, ValueError | OSError), repr(error)
    assert type(error).__module__.startswith("sd.") or type(error) in (ValueError, OSError, FileExistsError), repr(
        error
    )
    text = str(error)
    assert text.isprintable(), repr(text)
    assert 20 < len(text) <= LETTERS, repr(text)
    assert text.endswith("."), text


def try_one(kind: Kind, number: int, folder: Path) -> tuple[str, str]:
    """What became of a file: "read", "refused" or "FAILED", and what was said."""
    r = random.Random(number)
    path = folder / kind.name
    data = kind.change(kind.sound, r)
    path.write_bytes(data)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        kind.read(path)
        said = "read", ""
    except AssertionError as error:
        said = "FAILED", str(error)
    except Exception as error:
        try:
            own(error)
            said = "refused", str(error)
        except AssertionError:
            said = "FAILED", f"{type(error).__name__}: {error}"[:2000]
    seconds = time.process_time() - start
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    if seconds > SECONDS or megabytes > MEGABYTES + len(data) / 1e6:
        said = "FAILED", f"{seconds:.1f} s and {megabytes:.0f} MB"
    path.write_bytes(kind.sound)
    return said


def run(
    count: int, seed: int, only: list[str] | None = None, keep: Path | None = None, wanted: list[str] | None = None
) -> list[str]:
    """Try `count` files, as many of each kind, or of each of those that are wanted; the failures."""
    failures: list[str] = []
    became: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        all_kinds = {name: kind for name, kind in kinds(folder).items() if not wanted or name in wanted}
        for kind in all_kinds.values():
            kind.read(folder / kind.name) if (folder / kind.name).exists() else None  # what is imported on first use
        jobs = [(k, seed + n) for n in range(count // len(all_kinds)) for k in all_kinds]
        if only:
            jobs = [(k, int(number)) for k, _, number in (word.partition(":") for word in only)]
        for done, (k, number) in enumerate(jobs):
            state, words = try_one(all_kinds[k], number, folder)
            became[k, state] += 1
            if state == "FAILED":
                failures.append(f"{k}:{number} {words}")
                print(failures[-1], flush=True)
                if keep:
                    keep.mkdir(exist_ok=True)
                    kind = all_kinds[k]
                    (keep / f"{k}-{number}").write_bytes(kind.change(kind.sound, random.Random(number)))
            elif only:
                print(k, number, state, words)
            if done % 5000 == 4999:
                print(f"{done + 1} of {len(jobs)}", flush=True)
    print(", ".join(f"{k} {state} {n}" for (k, state), n in sorted(became.items())))
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", metavar="KIND:NUMBER")
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    parser.add_argument("--kinds", nargs="*", metavar="KIND", help="Default: all")
    args = parser.parse_args()
    failures = run(args.count, args.seed, args.only, args.keep, args.kinds)
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

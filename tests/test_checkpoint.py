"""sd.checkpoint against files in their true layouts, damaged ones and hostile ones."""

import argparse
import collections
import datetime
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd.files import printable
from sd.weights import checkpoint
from sd.weights.checkpoint import CheckpointError, read, write_safetensors

LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


# ---- helpers: files as torch writes them, and files as nobody should


@pytest.fixture
def lightning_class(monkeypatch):
    """ModelCheckpoint, importable while a test writes; `monkeypatch.undo` takes it away before it reads."""
    for depth in range(1, 4):
        name = ".".join(LIGHTNING.split(".")[:depth])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    cls = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    monkeypatch.setattr(sys.modules[LIGHTNING], "ModelCheckpoint", cls, raising=False)
    return cls


def pack(path, data_pkl, storages=None, *, root="archive", align=64, byteorder=b"little", method=zipfile.ZIP_STORED):
    """A zip as torch.save lays it out, around any pickle."""
    members = {"data.pkl": data_pkl, "byteorder": byteorder}
    members |= {f"data/{key}": value for key, value in (storages or {}).items()} | {"version": b"3\n"}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, value in members.items():
            info = zipfile.ZipInfo(f"{root}/{name}")
            info.compress_type = method
            gap = -(archive.fp.tell() + 30 + len(info.filename) + 4) % align
            info.extra = struct.pack("<HH", 0x4246, gap) + b"Z" * gap  # torch pads so, in a field "FB"
            archive.writestr(info, value)
    return path


class Stored:  # pickled as a persistent id
    def __init__(self, *pid):
        self.pid = pid


class Called:  # pickled as a call
    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def pickled(value, protocol=2):
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return obj.pid if isinstance(obj, Stored) else None

    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def forged(size, stride, offset=0, numel=12, kind=torch.FloatStorage, key="0"):
    storage = Stored("storage", kind, key, "cpu", numel)
    rebuilt = Called(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())
    return pickled({"w": rebuilt})


TWELVE = np.arange(12, dtype=np.float32).tobytes()


def bits(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def identical(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor)), name


def fault(path, *words):
    """The message of the CheckpointError that reading raises: one line, the file first, a stop last."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.endswith(".")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500
    for word in words:
        assert word in message
    return message


def survives(path):
    """Reading either raises CheckpointError or gives tensors of which every byte can be read."""
    try:
        found = read(path)
    except CheckpointError:
        fault(path)
        return False
    for tensor in found.tensors.values():
        bits(tensor).sum()
    return True


def sample():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "half": torch.randn(3, 5).half(),
        "float": base,
        "row": base[2],
        "transposed": base.t(),
        "steps": base[::2, 1::3],
        "long": torch.arange(5),
        "int": torch.tensor(7, dtype=torch.int32),
        "double": torch.randn(2, dtype=torch.float64),
        "bfloat": torch.randn(4).bfloat16(),
        "empty": torch.empty(0, 4),
    }


# ---- whole files


@pytest.mark.parametrize("form", ["class", "instance"])
@pytest.mark.parametrize("numpy_name", ["numpy.core", "numpy._core"])
def test_lightning_ckpt(tmp_path, lightning_class, monkeypatch, form, numpy_name):
    callback = lightning_class
    if form == "instance":
        callback = lightning_class()
        callback.monitor, callback.best = "val/loss", np.float64(0.5)
    state = collections.OrderedDict(sample())
    state._metadata = collections.OrderedDict([("", {"version": 1})])  # as nn.Module.state_dict() leaves it
    whole = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            callback: {
                "monitor": "val/loss",
                "best_model_score": torch.tensor(0.25),
                "current_score": np.float64(0.5),
                "best_k_models": {"a": np.float32(0.5)},
                "dirpath": None,
            }
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"betas": (0.9, 0.999)}]}],
        "lr_schedulers": [],
        "loss": np.float64(0.125),
        "state_dict": state,
    }
    path = tmp_path / "sd-v1-4.ckpt"
    torch.save(whole, path, pickle_protocol=2)
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        data = archive.read(f"{root}/data.pkl")
        keys = [name for name in archive.namelist() if "/data/" in name]
        storages = {name.rsplit("/", 1)[1]: archive.read(name) for name in keys}
    assert LIGHTNING.encode() in data
    assert b"_codecs\nencode" in data
    data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    data = data.replace(b"cnumpy.core.multiarray\n", f"c{numpy_name}.multiarray\n".encode())
    pack(path, data, storages)

    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # the reason for our own reader
    found = read(path)
    assert LIGHTNING not in sys.modules
    assert found.path == path
    assert found.format == "ckpt"
    assert found.metadata == {"epoch": 3, "global_step": 470000, "pytorch-lightning_version": "1.4.2"}
    identical(found.tensors, sample())
    assert list(found.tensors) == list(sample())
    for name in ("row", "transposed", "steps"):
        assert found.tensors[name].stride() == sample()[name].stride()
        storage = found.tensors[name].untyped_storage()
        assert storage.data_ptr() == found.tensors["float"].untyped_storage().data_ptr()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ".safetensors", ""])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bare_state_dict(tmp_path, suffix, protocol):
    path = tmp_path / f"weights{suffix}"
    torch.save({**sample(), "step": 7, "note": "x", "other": {"w": torch.ones(1)}}, path, pickle_protocol=protocol)
    found = read(str(path))
    assert found.format == "ckpt"
    assert found.metadata == {"step": 7, "note": "x"}
    identical(found.tensors, sample())


def test_parameters_and_modules(tmp_path):
    module = torch.nn.Linear(3, 2)
    torch.save(dict(module.named_parameters()), tmp_path / "a.pt")
    identical(read(tmp_path / "a.pt").tensors, {k: v.detach() for k, v in module.named_parameters()})
    torch.save(module.state_dict(), tmp_path / "b.pt")
    identical(read(tmp_path / "b.pt").tensors, module.state_dict())
    torch.save(module, tmp_path / "c.pt")
    fault(tmp_path / "c.pt", "asks to run 'torch.nn.modules.linear.Linear'", "nothing was run")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_trainers_leave_beside_the_weights_is_no_code(tmp_path, protocol):
    """Only what is a tensor is read; nothing of the rest is called an attempt to run code."""
    weights = {f"w{i}": torch.ones(3).to(dtype) for i, dtype in enumerate(WHOLE_TYPES)}
    beside = {
        "arguments": argparse.Namespace(rate=0.1),
        "path": Path("a/b"),
        "size": torch.Size([1, 2]),
        "set": {1, 2},
        "frozen": frozenset([1]),
        "counts": collections.Counter("abc"),
        "lists": collections.defaultdict(list, a=[1]),
        "number": np.float64(0.5),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "range": range(3),
        "complex": 1j,
        "when": datetime.datetime(2022, 8, 22, tzinfo=datetime.timezone.utc),
        "version": torch.torch_version.TorchVersion("2.0"),
    }
    torch.save({**weights, **beside}, tmp_path / "a.ckpt", pickle_protocol=protocol)
    identical(read(tmp_path / "a.ckpt").tensors, weights)


WHOLE_TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


def tensors_of(count, size, key=b"0", name=b"%d"):
    """A pickle of so many tensors of one storage, in as few bytes as that takes."""
    size = b"](" + b"K\x01" * size + b"e" if size > 9 else b"K\x01\x85"
    start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00"
    start += b"(X\x07\0\0\0storagectorch\nFloatStorage\nX" + struct.pack("<I", len(key)) + key
    start += b"X\x03\0\0\0cpuK\x01tQq\x01"
    start += b"(h\x01K\0" + size + b"q\x02h\x02\x89Ntq\x03}("
    names = (name % i for i in range(count))
    return start + b"".join(b"X" + struct.pack("<I", len(n)) + n + b"h\0h\x03R" for n in names) + b"u."


@linux
@pytest.mark.parametrize("case", ["long sizes", "one storage, a long name", "many tensors", "very many tensors"])
def test_small_files_take_little_time_and_memory(case, tmp_path):
    """Some 1 MB of file: below 300 MB, and what grows with the square of the file would take minutes.

    Each is read by a process of its own, for its memory. (In the mutations of this folder, 2 seconds are the bound.)
    """
    data, storages = {
        "long sizes": (tensors_of(20_000, 10_000), {"0": TWELVE}),
        "one storage, a long name": (tensors_of(20_000, 1, b"k" * 60_000), {"k" * 60_000: TWELVE}),
        "many tensors": (tensors_of(45_000, 1), {"0": TWELVE}),
        "very many tensors": (tensors_of(70_000, 1), {"0": TWELVE}),
    }[case]
    path = pack(tmp_path / "a.ckpt", data, storages)
    assert path.stat().st_size < 1_300_000
    code = (
        "import resource, sys; import sd\n"
        "from sd.weights.checkpoint import read\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000\n"
        "before = most()\n"
        "try: print(len(read(sys.argv[1]).tensors))\n"
        "except ValueError as error: print(error)\n"
        "print(most() - before)"
    )
    command = [sys.executable, "-c", code, path]
    said, megabytes = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=50
    ).stdout.splitlines()
    assert {"long sizes": "does not fit", "very many tensors": "more than"}.get(case, "") in said
    assert float(megabytes) < 300


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_safetensors(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    expected = {name: tensor.clone().contiguous() for name, tensor in sample().items()}
    safetensors.torch.save_file(expected, path, metadata={"format": "pt", "kind": "é"})
    found = read(path)
    assert found.format == "safetensors"
    assert found.metadata == {"format": "pt", "kind": "é"}
    identical(found.tensors, expected)


@pytest.mark.parametrize("align", [64, 1])
def test_any_root_and_alignment(tmp_path, align):
    data, storages = forged((3, 4), (4, 1)), {"0": TWELVE}
    path = pack(tmp_path / "a.ckpt", data, storages, root="sd v1-4 (ü)" if align == 1 else "sd-v1-4", align=align)
    tensor = read(path).tensors["w"]
    assert torch.equal(tensor, torch.arange(12.0).reshape(3, 4))


def test_unaligned_safetensors(tmp_path):
    """As the library wrote them in 2022: no spaces after the header."""
    path, data = tmp_path / "a.safetensors", np.linspace(0, 1, 8192, dtype=np.float32).tobytes()
    for extra in range(4):
        header = {"w" * (extra + 1): {"dtype": "F32", "shape": [64, 128], "data_offsets": [0, len(data)]}}
        head = json.dumps(header).encode()
        path.unlink(missing_ok=True)
        path.write_bytes(struct.pack("<Q", len(head)) + head + data)
        (tensor,) = read(path).tensors.values()
        assert tensor.data_ptr() % 4 == len(head) % 4
        expected = torch.frombuffer(bytearray(data), dtype=torch.float32).view(64, 128)
        assert torch.equal(tensor, expected)
        assert torch.equal(tensor.half(), expected.half())
        x = torch.linspace(-1, 1, 128)
        assert torch.allclose(torch.nn.functional.linear(x, tensor), expected @ x, atol=1e-4)


# ---- memory


def status(key):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key)).split()[1])


def smaps(path):
    """The kernel's account of each mapping of a file, in KiB, with its range and permissions."""
    found, here = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            here = line.endswith(str(path))
            if here:
                found.append({"range": [int(x, 16) for x in words[0].split("-")], "perms": words[1]})
        elif here and words[-1] == "kB":
            found[-1][words[0][:-1]] = int(words[1])
    return found


@linux
@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_tensors_are_views_into_one_private_map(tmp_path, form):
    path = tmp_path / f"big.{form}"
    torch.manual_seed(0)
    big = {f"w{i}": torch.randn(1 << 20) for i in range(24)}  # 96 MiB
    sums = {name: tensor.sum() for name, tensor in big.items()}
    torch.save({"state_dict": big}, path) if form == "ckpt" else safetensors.torch.save_file(big, path)
    del big
    anonymous = status("RssAnon")
    found = read(path)
    assert status("RssAnon") - anonymous < 4 << 10
    (mapped,) = smaps(path)
    assert mapped["perms"].endswith("p")  # private
    assert mapped["Rss"] < 8 << 10  # the pages are not touched
    start, end = mapped["range"]
    assert all(start <= tensor.data_ptr() < end for tensor in found.tensors.values())

    assert {name: tensor.sum() for name, tensor in found.tensors.items()} == sums
    (mapped,) = smaps(path)
    assert mapped["Rss"] >= 96 << 10
    assert mapped["Anonymous"] == 0  # all of it is the page cache's

    content = path.read_bytes()
    for tensor in found.tensors.values():
        tensor.fill_(float("nan"))
    assert smaps(path)[0]["Anonymous"] >= 96 << 10
    assert path.read_bytes() == content
    assert {name: tensor.sum() for name, tensor in read(path).tensors.items()} == sums
    path.unlink()  # and the tensors outlive the file's name
    assert all(tensor.isnan().all() for tensor in found.tensors.values())


@linux
def test_map_goes_with_the_tensors(tmp_path):
    path = pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE})
    files = len(os.listdir("/proc/self/fd"))
    tensor = read(path).tensors["w"]
    assert str(path) in Path("/proc/self/maps").read_text()
    assert tensor.sum() == 66
    del tensor
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) == files


# ---- files that are something else


def content(text):
    return lambda path: path.write_bytes(text)


def old_torch(path):
    torch.save(sample(), path, _use_new_zipfile_serialization=False)


def zip_of_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.ckpt", b"x")


def half_a_zip(path):
    torch.save(sample(), path)
    os.truncate(path, path.stat().st_size // 2)


def half_a_safetensors(path):
    safetensors.torch.save_file({"w": torch.ones(100)}, path)
    os.truncate(path, 200)


NOT_WEIGHTS = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "pipe": (lambda path: os.mkfifo(path), "not a regular file"),
    "empty": (lambda path: path.touch(), "is empty; download it again"),
    "html": (content(b"\n<!DOCTYPE html><html><title>Sign in</title>"), "is a web page"),
    "html, short": (content(b"<html>"), "is a web page"),
    "xml": (content(b'\xef\xbb\xbf<?xml version="1.0"?><Error>AccessDenied</Error>'), "is a web page"),
    "lfs": (
        content(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 4\n"),
        "Git LFS pointer",
    ),
    "text": (content(b"Entry not found"), "neither torch's zip nor safetensors", "Entry not"),
    "json": (content(b'{"error": "gated"}'), "neither"),
    "zeros": (content(bytes(4096)), "neither"),
    "gzip": (content(b"\x1f\x8b\x08" + bytes(50)), "compressed archive; unpack it"),
    "pickle": (content(pickle.dumps({"w": [1.0]})), "bare pickle", "nothing in it was run"),
    "old torch": (old_torch, "before 1.6", "newer torch"),
    "zip of zip": (zip_of_zip, "is a zip, but not torch.save's; unpack it"),
    "truncated zip": (half_a_zip, "is cut short", "download it again"),
    "truncated safetensors": (half_a_safetensors, "its header promises 472 bytes, it has 200"),
    "bad header": (content(struct.pack("<Q", 9) + b'{"w": 13}'), "no sound safetensors file"),
    "endless header": (content(b"\xff" * 7 + b"\0{" + bytes(99)), "no sound safetensors file"),
    "not a dict": (lambda path: torch.save([torch.ones(1)], path), "holds no dict of tensors"),
    "a tensor": (lambda path: torch.save(torch.ones(1), path), "holds no dict of tensors"),
    "state_dict: 3": (lambda path: torch.save({"state_dict": 3}, path), "holds no dict of tensors"),
    "nothing": (lambda path: torch.save({}, path), "holds no tensors"),
    "no tensors": (lambda path: torch.save({"model": {"w": torch.ones(1)}}, path), "no tensors but 'model'"),
    "no tensors, safe": (lambda path: safetensors.torch.save_file({}, path), "holds no tensors"),
}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_not_weights(tmp_path, name, suffix):
    path = tmp_path / f"weights{suffix}"
    make, *words = NOT_WEIGHTS[name]
    make(path)
    fault(path, *words)


def test_odd_paths(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for path, word in [
        (tmp_path / "file" / "below.ckpt", "cannot be opened"),
        (tmp_path / ("x" * 300), "cannot be opened"),
        (tmp_path, "is a folder"),
    ]:
        fault(path, word)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read("nul\0.ckpt")
    assert issubclass(CheckpointError, ValueError)


# ---- pickles that mean harm: nothing runs, nothing is imported, nothing hangs

TUPLE_BOMB = b"\x80\x02)" + b"\x85" * 150_000  # ((((...)))): hashing it overflows the C stack
MARKER = "marker"
EVIL = {
    "os.system": lambda path: pickled({"w": Called(os.system, f"touch {path}")}),
    "eval": lambda path: pickled({"w": Called(eval, f"open({str(path)!r}, 'w')")}, 4),
    "open": lambda path: pickled({"w": Called(open, str(path), "w")}, 2),
    "torch.load": lambda path: pickled({"w": Called(torch.load, str(path))}),
    "INST": lambda path: b"\x80\x02(X\x05\x00\x00\x00touchiposix\nsystem\n.",
    "INST, listed name": lambda path: b"\x80\x02(icollections\nOrderedDict\n.",
    "OBJ": lambda path: b"\x80\x02(cposix\nsystem\nX\x02\x00\x00\x00lso.",
    "dotted name": lambda path: b"\x80\x04\x8c\x05torch\x8c\x0bload.system\x93.",
    "getattr": lambda path: b"\x80\x02cbuiltins\ngetattr\n.",
    "numpy loads": lambda path: b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n.",
    "stack global of listed modules": lambda path: b"\x80\x04\x8c\x0ccollections \x8c\x0bOrderedDict\x93.",
    "other storage": lambda path: pickled(Called(torch.storage.UntypedStorage, 5)),
}


@pytest.mark.parametrize("name", EVIL)
def test_no_code_runs(tmp_path, name, monkeypatch):
    marker = tmp_path / MARKER
    path = pack(tmp_path / "evil.ckpt", EVIL[name](marker), {"0": TWELVE})
    for module, attribute in [(pickle, "Unpickler"), (pickle, "loads"), (pickle, "load"), (torch, "load")]:
        monkeypatch.setattr(module, attribute, lambda *a, **k: pytest.fail("the real unpickler was reached"))
    monkeypatch.setattr(os, "system", lambda *a: pytest.fail("it ran"))
    modules = set(sys.modules)
    fault(path, "refused, and nothing was run; get the weights as .safetensors")
    assert set(sys.modules) == modules
    assert not marker.exists()


def test_the_payloads_are_live(tmp_path):
    """The proof that the test above tests something: pickle itself does run them."""
    marker = tmp_path / MARKER
    pickle.loads(EVIL["os.system"](marker))
    assert marker.exists()


def test_name_in_the_message_is_harmless(tmp_path):
    name = b"\x1b[31m" + b"x" * 10_000
    message = fault(pack(tmp_path / "a.ckpt", b"\x80\x02c" + name + b"\n" + name + b"\n."), "\\x1b[31mxxx")
    assert len(message) < 500 + len(str(tmp_path))


def nested(opcode, n=200_000):
    return b"\x80\x02" + opcode * n


HOSTILE = {
    "tuple bomb as a key": b"\x80\x02}" + TUPLE_BOMB[2:] + b"K\x01s.",
    "tuple bomb as args": b"\x80\x02c_codecs\nencode\n" + TUPLE_BOMB[2:] + b"R.",
    "tuple bomb as a size": b"\x80\x02" + TUPLE_BOMB[2:] + b"0.",
    "shared tuples as a key": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.",
    "shared lists as a name": b"\x80\x04]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60)) + b"]\x93.",
    "marks": nested(b"("),
    "lists": nested(b"]"),
    "dicts": nested(b"}"),
    "memo index": b"\x80\x02}r\xff\xff\xff\xff.",
    "memo missing": b"\x80\x02h\x05.",
    "memoize": b"\x80\x04}" + b"\x94" * 200_000 + b".",
    "bytes of 2^63": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "bytes of 2^32": b"\x80\x04B\xff\xff\xff\xff.",
    "text of 2^32": b"\x80\x02X\xff\xff\xff\xff.",
    "bytearray of 2^63": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "frame of 2^64": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "long of -1 bytes": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "long of 2^31": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "int of many digits": b"I" + b"9" * 5_000 + b"\n.",
    "extension": b"\x80\x02\x82\x01.",
    "extension 4": b"\x80\x02\x84\xff\xff\xff\x7f.",
    "int persistent id": b"\x80\x02K\x01Q.",
    "short persistent id": b"\x80\x02K\x01\x85Q.",
    "text persistent id": b"\x80\x02P0\n.",
    "buffer": b"\x80\x05\x97.",
    "empty stack": b"\x80\x02.",
    "empty": b"",
    "no stop": b"\x80\x02}",
    "not utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "unknown opcode": b"\x80\x02\xff.",
    "odd items": b"\x80\x02}(K\x01u.",
    "setitem on a list": b"\x80\x02]K\x00K\x01s.",
    "append to a dict": b"\x80\x02}K\x01a.",
    "call of text": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "OrderedDict with items": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
    "tensor of nothing": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "tensor without storage": pickled(Called(torch._utils._rebuild_tensor_v2, 1, 0, (1,), (1,))),
    "parameter of nothing": pickled(Called(torch._utils._rebuild_parameter, 1, True, None)),
    "storage as a function": b"\x80\x02ctorch\nFloatStorage\nK\x05\x85R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, name):
    fault(pack(tmp_path / "a.ckpt", HOSTILE[name], {"0": TWELVE}))


def test_build_changes_no_class(tmp_path):
    """BUILD with a slot state sets attributes even on classes; here it must not reach anything."""
    state = b"N}X\x08\x00\x00\x00__call__K\x01s\x86b"
    data = b"\x80\x02}X\x01\x00\x00\x00a"
    data += b"ccollections\nOrderedDict\n" + state + b"s."
    before = (
        dict(vars(collections.OrderedDict)),
        dict(vars(checkpoint._Global)),
        dict(vars(checkpoint._Inert)),
    )
    fault(pack(tmp_path / "a.ckpt", data), "no tensors but 'a'")
    data = data.replace(b"collections\nOrderedDict", LIGHTNING.encode() + b"\nModelCheckpoint")
    fault(pack(tmp_path / "a.ckpt", data), "no tensors but 'a'")
    after = dict(vars(collections.OrderedDict)), dict(vars(checkpoint._Global)), dict(vars(checkpoint._Inert))
    assert after == before


def test_extension_registry_is_not_used(tmp_path):
    import copyreg

    copyreg.add_extension("os", "system", 0x71)
    try:
        fault(pack(tmp_path / "a.ckpt", b"\x80\x02\x82\x71X\x02\x00\x00\x00ls\x85R."), "EXT1: refused")
    finally:
        copyreg.remove_extension("os", "system", 0x71)


def test_pickle_size_limit(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE})
    read(path)
    monkeypatch.setattr(checkpoint, "MAX_PICKLE", 50)
    fault(path, "bytes of pickle, more than 50")


@linux
@pytest.mark.slow
def test_the_largest_pickle_costs_bounded_memory_and_time(tmp_path):
    """In a process with 3 GiB of address space and 60 s of processor time to spend."""
    path = pack(tmp_path / "a.ckpt", b"\x80\x02" + b"}" * (checkpoint.MAX_PICKLE - 2))
    code = (
        "import resource, sys; from sd.weights.checkpoint import *\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30),) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        f"try: read({str(path)!r})\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert "is damaged" in done.stdout, done.stderr


# ---- forged tensors

BIG = 1 << 62
SHARED: list = []
for _ in range(60):  # printing it would take 2^60 steps
    SHARED = [SHARED, SHARED]
OUTSIDE = {
    "size": {"size": (13,), "stride": (1,)},
    "offset": {"size": (12,), "stride": (1,), "offset": 1},
    "offset alone": {"size": (), "stride": (), "offset": 12},
    "negative offset": {"size": (1,), "stride": (1,), "offset": -1},
    "stride": {"size": (3, 4), "stride": (5, 1)},
    "negative stride": {"size": (3, 4), "stride": (-4, 1)},
    "negative size": {"size": (-3, -4), "stride": (4, 1)},
    "stride 0": {"size": (1 << 30,), "stride": (0,)},
    "overlap": {"size": (4, 4), "stride": (2, 1)},
    "more sizes": {"size": (3, 4), "stride": (1,)},
    "more strides": {"size": (3,), "stride": (4, 1)},
    "too many dimensions": {"size": (1,) * 70, "stride": (1,) * 70},
    "size times stride overflows": {"size": (5, 2), "stride": (BIG, 1)},
    "size product overflows": {"size": (1 << 32, 1 << 32), "stride": (1 << 32, 1)},
    "huge offset": {"size": (1,), "stride": (1,), "offset": 1 << 70},
    "huge offset, empty": {"size": (0,), "stride": (1,), "offset": 1 << 39},
    "huge size, empty": {"size": (0, 1 << 70), "stride": (1, 1)},
    "size product overflows, empty": {"size": (1 << 39, 1 << 39, 0), "stride": (1, 1, 1)},
    "huge stride": {"size": (1,), "stride": (1 << 70,)},
    "bool": {"size": (True, 12), "stride": (1, 1)},
    "float": {"size": (3.0, 4), "stride": (4, 1)},
    "text": {"size": "ab", "stride": "cd"},
    "none": {"size": None, "stride": None},
    "shared lists": {"size": SHARED, "stride": SHARED, "offset": SHARED},
    "no numbers": {"size": ({},), "stride": ([],), "offset": ()},
    "numel": {"size": (1,), "stride": (1,), "numel": 13},
    "numel negative": {"size": (1,), "stride": (1,), "numel": -1},
    "numel huge": {"size": (1,), "stride": (1,), "numel": 1 << 900},
    "numel no int": {"size": (1,), "stride": (1,), "numel": 3.0},
    "numel bool": {"size": (1,), "stride": (1,), "numel": True},
    "wider type": {"size": (12,), "stride": (1,), "kind": torch.DoubleStorage},
    "no type": {"size": (12,), "stride": (1,), "kind": "float"},
    "no storage type": {"size": (12,), "stride": (1,), "kind": collections.OrderedDict},
    "missing key": {"size": (12,), "stride": (1,), "key": "1"},
    "key to another member": {"size": (1,), "stride": (1,), "numel": 1, "key": "../data.pkl"},
    "absolute key": {"size": (1,), "stride": (1,), "numel": 1, "key": "/etc/passwd"},
    "key no text": {"size": (1,), "stride": (1,), "numel": 1, "key": 0},
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_tensors_outside_their_storage(tmp_path, name):
    fault(pack(tmp_path / "a.ckpt", forged(**OUTSIDE[name]), {"0": TWELVE}), "is damaged")


@quick
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 13)), max_size=3),
    st.integers(0, 13),
    st.integers(0, 13),
)
def test_extent_is_exactly_torchs(tmp_path, dims, offset, numel):
    """What is accepted is what torch accepts on a storage that cannot grow, less tensors larger than it."""
    size, stride = tuple(d[0] for d in dims), tuple(d[1] for d in dims)
    path = pack(tmp_path / "a.ckpt", forged(size, stride, offset, numel), {"0": TWELVE})
    try:
        expected = torch.as_strided(torch.arange(12.0)[:numel].clone(), size, stride, offset) if numel <= 12 else None
    except RuntimeError:
        expected = None
    if expected is not None and (expected.numel() > numel or offset > numel):
        expected = None
    if expected is None:
        fault(path, "is damaged")
    else:
        found = read(path).tensors["w"]
        assert torch.equal(found, expected)
        assert found.stride() == stride


# ---- zips that lie


def test_zip_compressed(tmp_path):
    path = pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE}, method=zipfile.ZIP_DEFLATED)
    fault(path, "compressed zip")


def test_zip_big_endian(tmp_path):
    fault(
        pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE}, byteorder=b"big"),
        "byte order b'big'",
    )


def test_zip_duplicates(tmp_path):
    path = pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", bytes(48))
    fault(path, "a member twice")
    path = pack(tmp_path / "b.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    fault(path, "a member twice")


def central(data, name):
    """Offset of a member's record in the zip's directory."""
    return data.rindex(b"PK\x01\x02", 0, data.rindex(name))


@pytest.mark.parametrize(
    ("field", "layout", "value"),
    [
        (8, "<H", 1),  # encrypted
        (10, "<H", 8),  # deflated
        (10, "<H", 99),
        (20, "<I", 4),  # compressed size
        (20, "<II", (1 << 30, 1 << 30)),  # both sizes: ends behind the file
        (20, "<II", (47, 47)),  # too short for the storage
        (42, "<I", 1 << 30),  # offset behind the file
        (42, "<I", 0),  # offset of another member
        (28, "<H", 4),  # length of the name
    ],
)
def test_zip_directory_that_lies(tmp_path, field, layout, value):
    path = pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE})
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, central(data, b"archive/data/0") + field, *np.atleast_1d(value).tolist())
    path.write_bytes(data)
    fault(path)


def test_zip_directory_of_many_gigabytes(tmp_path):
    path = pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE})
    data = path.read_bytes()
    os.truncate(path, 64 << 30)  # sparse
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, (1 << 32) - 2, len(data), 0)
        file.write(end)
    fault(path, "is damaged (its directory has 4294967294 bytes)")


# ---- broken files, systematically


def small_files(folder):
    sources = {
        "w": torch.arange(6.0).reshape(2, 3).t(),
        "b": torch.ones(2, dtype=torch.float16),
        "n": torch.tensor(3),
    }
    torch.save({"epoch": 1, "state_dict": sources}, folder / "a.ckpt", pickle_protocol=2)
    write_safetensors(folder / "a.safetensors", sources, {"format": "pt"})
    pack(folder / "b.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE}, align=1)
    return [folder / "a.ckpt", folder / "a.safetensors", folder / "b.ckpt"]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_truncated_at_every_length(tmp_path, index):
    path = small_files(tmp_path)[index]
    data = path.read_bytes()
    assert survives(path)
    for length in range(0, len(data), 1 if len(data) < 2000 else 3):
        path.unlink()  # never shorten a mapped file
        path.write_bytes(data[:length])
        fault(path)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_byte_flipped(tmp_path, index):
    source = small_files(tmp_path)[index]
    data, path = source.read_bytes(), tmp_path / f"flipped{source.suffix}"
    rng = random.Random(0)
    results = []
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1 << rng.randrange(8)
        path.unlink(missing_ok=True)
        path.write_bytes(broken)
        results.append(survives(path))
    assert set(results) == {True, False}


@settings(quick, max_examples=150)
@given(st.data())
def test_pickle_bytes_changed(tmp_path, data):
    """Flips, insertions and deletions in the pickle itself, where every byte counts."""
    broken = bytearray(forged((3, 4), (4, 1)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        cut = data.draw(st.integers(0, 2))
        broken[at : at + cut] = data.draw(st.binary(max_size=3))
    survives(pack(tmp_path / "a.ckpt", bytes(broken), {"0": TWELVE}))


@quick
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", struct.pack("<Q", 40) + b"{"]))
def test_any_bytes(tmp_path, data, start):
    path = tmp_path / "a.ckpt"
    path.unlink(missing_ok=True)
    path.write_bytes(start + data)
    survives(path)


ODD = [None, -1, 0, 8, True, 0.0, 1 << 63, "F32", "F4", "x", [], {}, [0], [[]], {"a": 1}, "\ud800"]


@st.composite
def headers(draw):
    """Headers that describe their data rightly, then up to two things changed; and how long the data is."""
    header, end = {}, 0
    for name in draw(st.permutations("abc")):
        dtype, width = draw(st.sampled_from([("F32", 4), ("F16", 2), ("I64", 8), ("BOOL", 1), ("BF16", 2)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start, end = end, end + int(np.prod(shape, dtype=int)) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(header)))
        entry, odd = header[name], draw(st.sampled_from(ODD))
        key = draw(st.sampled_from(sorted(entry))) if isinstance(entry, dict) and entry else None
        if key and isinstance(entry[key], list) and entry[key] and draw(st.booleans()):
            entry[key][draw(st.integers(0, len(entry[key]) - 1))] = draw(st.integers(-1, 9)) if odd is None else odd
        elif key and draw(st.booleans()):
            entry[key] = odd
        else:
            header[name] = odd
    return header, end + draw(st.sampled_from([0, 0, 0, 1, -1]))


@settings(quick, max_examples=300)
@given(headers())
def test_any_safetensors_header(tmp_path, drawn):
    """What is read is what the official library reads; what it refuses is refused."""
    header, count = drawn
    path = tmp_path / "a.safetensors"
    path.unlink(missing_ok=True)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(range(max(count, 0))))
    try:
        expected = safetensors.torch.load_file(path)
    except Exception:  # of many kinds
        fault(path)
        return
    if survives(path):
        identical(read(path).tensors, expected)
    else:  # refused although the library takes it: only for these reasons
        assert not expected or json.dumps(header).count("true")


def test_deep_safetensors_header(tmp_path):
    for head in (b'{"a":' * 100_000, b'{"a":' + b"[" * 1_000_000):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
        fault(tmp_path / "a.safetensors", "no sound safetensors")


# ---- round trips


@st.composite
def tensors(draw):
    dtype = draw(
        st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64])
    )
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    raw = draw(st.binary(min_size=8, max_size=8))  # any bits: NaN, infinity, -0
    count = int(np.prod(shape)) if shape else 1
    flat = torch.frombuffer(bytearray(raw * (count + 3)), dtype=torch.uint8).view(dtype)
    tensor = flat[draw(st.integers(0, 2)) :][:count].reshape(shape)
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[::2]
    return tensor


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__"
)


@settings(quick, max_examples=100)
@given(st.dictionaries(names, tensors(), min_size=1, max_size=5), st.booleans(), st.integers(2, 5))
def test_round_trip(tmp_path, state, wrapped, protocol):
    state.pop("state_dict", None)
    state = state or {"w": torch.ones(1)}
    path = tmp_path / "a"
    path.unlink(missing_ok=True)
    torch.save({"state_dict": state, "epoch": 1} if wrapped else state, path, pickle_protocol=protocol)
    found = read(path)
    identical(found.tensors, state)
    assert [t.stride() for t in found.tensors.values()] == [t.stride() for t in state.values()]
    assert found.metadata == ({"epoch": 1} if wrapped else {})

    write_safetensors(path, found.tensors, {"ü": "ß"})  # replaces the file that is mapped
    identical(found.tensors, state)
    identical(read(path).tensors, state)
    identical(safetensors.torch.load_file(path), state)
    assert read(path).metadata == {"ü": "ß"}


# ---- writing


def test_write_is_aligned_and_repeatable(tmp_path):
    state = {**sample(), "bool": torch.tensor([True]), "uint8": torch.arange(3, dtype=torch.uint8)}
    for length in range(8):
        write_safetensors(tmp_path / "a", state, {"a": "x" * length})
        assert struct.unpack("<Q", (tmp_path / "a").read_bytes()[:8])[0] % 8 == 0
    write_safetensors(tmp_path / "a", state, {"b": "2", "a": "1"})
    backwards = dict(reversed(state.items()))
    write_safetensors(tmp_path / "b", backwards, {"b": "2", "a": "1"})
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"a": "1", "b": "2"}
    assert all(header[n]["data_offsets"][0] % state[n].element_size() == 0 for n in header)
    identical(safetensors.torch.load_file(tmp_path / "a"), state)


def test_write_converts_floats_only(tmp_path):
    state = {**sample(), "grad": torch.nn.Parameter(torch.randn(3))}
    write_safetensors(tmp_path / "a", state, dtype=torch.float16)
    found = read(tmp_path / "a")
    assert found.metadata == {}
    identical(found.tensors, {k: v.detach().half() if v.is_floating_point() else v for k, v in state.items()})
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@linux
def test_write_holds_one_tensor_at_a_time(tmp_path):
    source = tmp_path / "a.ckpt"
    torch.save({f"w{i}": torch.ones(1 << 20) for i in range(48)}, source)  # 192 MiB
    seen = []

    class Watched(dict):
        def __getitem__(self, name):
            seen.append(status("RssAnon"))
            return super().__getitem__(name)

    write_safetensors(tmp_path / "b", Watched(read(source).tensors), dtype=torch.float16)
    assert max(seen) - seen[0] < 48 << 10  # KiB: some tensors' worth (the allocator keeps a few), not 96 MiB
    assert (tmp_path / "b").stat().st_size > 96 << 20


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")])
def test_write_leaves_nothing_behind(tmp_path, error, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fsync(_):
        assert len(os.listdir(tmp_path)) == 2
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else error) as caught:
        write_safetensors(path, sample())
    assert (
        isinstance(error, type)
        or str(caught.value)
        == f"{path} cannot be written: No space left on device; make room, or choose another place."
    )
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"


def test_write_refuses(tmp_path):
    def refused(path, state, word, metadata=None):
        with pytest.raises(CheckpointError, match=word) as caught:
            write_safetensors(path, state, metadata)
        assert str(caught.value).startswith(f"{printable(path, 700)} cannot be written: ")

    (tmp_path / "folder").mkdir()
    ones = {"w": torch.ones(1)}
    refused(tmp_path / "folder", ones, "folder")
    refused(tmp_path / "none" / "a", ones, "No such file")
    refused(tmp_path / ("x" * 256), ones, "too long")
    refused(f"{tmp_path}/nul\0", ones, "null")
    refused(Path(), ones, "folder")
    (tmp_path / "folder" / "file").touch()
    refused(tmp_path / "folder" / "file" / "a", ones, "Not a directory")
    refused(tmp_path / "a", {"w": torch.ones(1, dtype=torch.complex64)}, "'w' of type torch.complex64")
    refused(tmp_path / "a", {"__metadata__": torch.ones(1)}, "__metadata__")
    refused(tmp_path / "a", {"\ud800": torch.ones(1)}, "Unicode")
    refused(tmp_path / "a", ones, "strings", {"a": 1})
    assert os.listdir(tmp_path) == ["folder"]


def test_reading_in_threads(tmp_path):
    path = pack(tmp_path / "a.ckpt", forged((3, 4), (4, 1)), {"0": TWELVE})
    sums = []
    threads = [threading.Thread(target=lambda: sums.append(read(path).tensors["w"].sum().item())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [66.0] * 8

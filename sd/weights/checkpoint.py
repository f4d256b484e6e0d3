"""Weight files to flat dicts of tensors, and back: torch's .ckpt, .pt, .pth, .bin and .safetensors.

Nothing here knows Stable Diffusion, and **no code in a file ever runs**. torch.save writes a zip of
uncompressed members: `<root>/data.pkl`, a pickle that describes the tensors, and `<root>/data/<key>`, their
bytes. That pickle never reaches `pickle`: `_unpickle` walks its opcodes as `pickletools.genops` spells them
and builds dicts, lists, strings and numbers. It has no means to import or to call anything, so there is no
switch for it, and an opcode or a name that is not listed below is refused. (A `pickle.Unpickler` with a
strict `find_class` would not do: BUILD sets attributes on stand-ins, one LONG_BINPUT asks for 64 GiB of memo,
and a deeply nested tuple as a dict key overflows the C stack.)

Formats: torch/serialization.py, torch/_utils.py (`_rebuild_tensor_v2`), Lib/pickletools.py, and
https://github.com/huggingface/safetensors#format
"""

import io
import json
import mmap
import os
import pickletools
import stat
import struct
import sys
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import PlainError, reason_of, shown, writing

# SD v1 files have 0.2 MB of pickle and 0.1 MB of zip directory. The first bounds what _unpickle may cost.
MAX_PICKLE, MAX_INDEX = 8 << 20, 16 << 20  # bytes
MAX_TENSORS = 50_000  # a v1 file with EMA weights has 2,000
MAX_AXES = 20  # of a tensor

# All the names that a pickle may mention, as pickletools spells them ("module name"), and what _call makes of
# them. The objects that really have these names are never touched. "inert" are harmless things that lie beside
# the weights in files of trainers: a stand-in takes their place, and nothing is known of them.
_GLOBALS: dict[str, Any] = {
    "collections OrderedDict": "dict",
    "collections defaultdict": "dict",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "parameter",
    "torch.nn.modules.container ParameterDict": "parameters",
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch ShortStorage": torch.int16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch BoolStorage": torch.bool,
}
_INERT = {
    "_codecs": ["encode"],
    "argparse": ["Namespace"],
    "collections": ["Counter", "deque"],
    "copyreg": ["_reconstructor"],
    "datetime": ["date", "datetime", "timedelta", "timezone"],
    "numpy": ["dtype"],
    "numpy.core.multiarray": ["scalar"],
    "pathlib": ["Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"],
    "torch": ["Size", "device", "Generator", "float16", "bfloat16", "float32", "float64", "int32", "int64", "bool"],
    "torch.torch_version": ["TorchVersion"],
    "pytorch_lightning.callbacks.model_checkpoint": ["ModelCheckpoint"],
    "pytorch_lightning.callbacks.early_stopping": ["EarlyStopping"],
    "pytorch_lightning.utilities.parsing": ["AttributeDict"],
}
_INERT["numpy._core.multiarray"] = _INERT["numpy.core.multiarray"]
_INERT["copy_reg"] = _INERT["copyreg"]  # Python 2's name, as is __builtin__
_INERT["builtins"] = ["bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object"]
_INERT["builtins"] += ["range", "set", "slice", "str", "tuple", "xrange"]
_INERT["__builtin__"] = _INERT["builtins"]
_GLOBALS |= {f"{module} {name}": "inert" for module, names in _INERT.items() for name in names}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
# opcodes that take so many values off the stack, None: all above the last MARK
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
_TAKES |= {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None}

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
_DTYPES |= {torch.uint8: "U8", torch.bool: "BOOL"}
_DTYPES |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}

# what malformed bytes make of zipfile, genops, torch and the code here
_MALFORMED: tuple[type[Exception], ...] = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)
_MALFORMED += (ArithmeticError, AssertionError, OSError, EOFError)
_MALFORMED += (struct.error, zipfile.BadZipFile)
_AGAIN, _NAME_ONE = "download it again", "give the path of a .ckpt or .safetensors file"
_AS_SAFE, _ALONE = "get the weights as .safetensors", "save the model's state_dict() alone"


class CheckpointError(PlainError):
    """A weight file that is missing, is not one, is damaged, asks for code, or cannot be written.

    The message is one sentence: which file, what is wrong with it, and what to do.
    """


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `read` found in a file.

    `tensors` is flat, on the CPU and memory-mapped: a tensor's bytes come from the disk when they are first
    used. The map is private: writing into a tensor changes this process's copy of the page, never the file.
    `metadata` holds a safetensors header's `__metadata__` (strings), or the numbers and strings beside a
    .ckpt's tensors (`epoch`, `global_step`, `pytorch-lightning_version`).
    """

    path: Path
    format: str  # "ckpt" or "safetensors"
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    map: mmap.mmap  # of the file, which tensors keep alive


class _Fault(Exception):  # noqa: N818
    """What is wrong with a file, and what to do: the rest of a sentence that begins with its path."""

    def __init__(self, what: str, remedy: str = _AGAIN) -> None:
        super().__init__(f"{what}; {remedy}")


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Tensor(NamedTuple):  # as the pickle puts it, unchecked and not copied: _Archive.tensor does that
    storage: _Storage
    offset: Any
    size: Any
    stride: Any


class _Global(NamedTuple):
    name: str


class _Parameters(dict[str, Any]):
    """Stands for torch's ParameterDict: what is among its attributes as `_parameters` is in it."""


class _Inert:
    """Stands for an object that is no tensor: it knows nothing and does nothing."""


_NOTHING = _Inert()  # one for all of them, however many a file has


def read(path: str | os.PathLike[str], inside: Collection[str] = ()) -> Checkpoint:
    """Open a weight file in milliseconds, whatever its size. Its content, not its suffix, says what it is.

    A .ckpt, .pt, .pth or .bin holds a dict with the tensors under `state_dict`, or under one of the keys `inside`, or
    the tensors themselves; values that are no tensors are left out. Raises CheckpointError for all that can be wrong
    with the file.
    While its tensors are in use the file may be replaced or deleted, but not shortened in place.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            form = _recognise(file.read(512))
            size = os.fstat(file.fileno()).st_size
            tensors, metadata, mapped = (
                _read_ckpt(file, size, inside) if form == "ckpt" else _read_safetensors(file, size)
            )
        if not tensors:
            raise _Fault("holds no tensors", "give a file that holds weights")
    except _Fault as fault:
        raise CheckpointError(f"{path} {fault}.") from fault.__cause__
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({reason_of(error)}); {_NAME_ONE}.") from error
    return Checkpoint(path, form, tensors, metadata, mapped)


class _File(io.FileIO):
    def read(self, n: int | None = -1) -> bytes:  # zipfile reads as long a directory as the file tells it to
        if n is not None and n > MAX_INDEX:
            raise zipfile.BadZipFile(f"its directory has {n} bytes")
        return super().read(n) or b""


def _open(path: Path) -> _File:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            return _File(path)
    except FileNotFoundError:
        raise _Fault("does not exist", _NAME_ONE) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _Fault(f"cannot be opened ({_one_line(error)})", _NAME_ONE) from error
    raise _Fault(f"is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}", _NAME_ONE)


def _recognise(head: bytes) -> str:
    """The kind, "ckpt" or "safetensors", by the first bytes; well-known other things are named."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"PK\x03\x04"):
        return "ckpt"
    if head[7:9] == b"\0{":  # before all else: the eight bytes of length may look like anything
        return "safetensors"
    if not head:
        raise _Fault("is empty")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise _Fault("is a web page, not weights", "log in, accept the licence, download the file itself")
    if text.startswith(b"version https://git-lfs"):
        raise _Fault("is a Git LFS pointer, not the weights", "run `git lfs pull` in its repository")
    if head.startswith(b"\x80") and b"l\xfc\x9cF\xf9 j\xa8P\x19." in head[:16]:  # torch's MAGIC_NUMBER
        raise _Fault("is in the form of torch before 1.6", "where you trust it, save it with a newer torch")
    if head.startswith(b"\x80"):
        raise _Fault("is a bare pickle, not torch.save's zip, and nothing in it was run", _AS_SAFE)
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        raise _Fault("is a compressed archive", "unpack it and give the weight file inside")
    raise _Fault(f"is neither torch's zip nor safetensors (it begins with {head[:16]!r})", _NAME_ONE)


def _map(file: _File) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private, so writable but never the file
    except (OSError, ValueError) as error:
        raise _Fault(f"cannot be memory-mapped ({_one_line(error)})", "free some memory") from error


def _flat(mapped: mmap.mmap, dtype: torch.dtype, start: int, numel: int) -> torch.Tensor:
    """Numbers in the map as a flat tensor that keeps the map alive; no page is touched.

    As in the official library they may lie at odd addresses: .safetensors files of 2022 are not aligned, and
    a copy would cost what the map saves. torch's CPU kernels take that, though a sum may round otherwise.
    """
    if numel == 0:  # frombuffer wants at least one
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=numel, offset=start)


def _sane(*lists: Any) -> bool:
    """Whether these are lists of integers that a file can need, few and far from where int64 overflows."""
    return all(
        isinstance(numbers, list | tuple)
        and len(numbers) <= MAX_AXES
        and all(type(n) is int and 0 <= n < 1 << 40 for n in numbers)
        for numbers in lists
    )


def _few(tensors: Mapping[str, Any]) -> None:
    if len(tensors) > MAX_TENSORS:
        raise _Fault(f"holds more than {MAX_TENSORS:,} tensors", "give a file that holds the weights of one model")


# ---- safetensors


def _read_safetensors(file: _File, size: int) -> tuple[dict[str, torch.Tensor], dict[str, Any], mmap.mmap]:
    """Without the official library, whose get_tensor touches a page of every tensor, and then the disk reads
    on: all of a cold 1.7 GB file, tried. Its rules are kept: no byte is left out or used twice.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        if length > MAX_INDEX:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length).decode()) if 8 + length <= size else {}
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        "".join([*header, *metadata, *metadata.values()]).encode()  # all text, and valid
        _few(header)
        end = 8 + length + max([entry["data_offsets"][1] for entry in header.values()], default=0)
        if end != size:
            cut = "cut short" if end > size else "damaged"
            raise _Fault(f"is {cut} (its header promises {end} bytes, it has {size})")
        mapped, tensors, end = _map(file), {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, kind, (start, stop) = entry["shape"], entry["dtype"], entry["data_offsets"]
            if kind not in _DTYPES.values():
                raise _Fault(f"holds {shown(name)} of type {shown(kind)}", "give weights in float16")
            dtype = next(dtype for dtype in _DTYPES if _DTYPES[dtype] == kind)
            if not isinstance(shape, list) or not _sane(shape, (start, stop)):
                raise ValueError(f"{shown(name)} has no size")
            if (start, stop) != (end, end + prod(shape) * dtype.itemsize):
                raise ValueError(f"{shown(name)} does not fit its place")
            tensors[name], end = _flat(mapped, dtype, 8 + length + start, prod(shape)).view(shape), stop
    except _MALFORMED as error:
        raise _Fault(f"is no sound safetensors file ({_one_line(error)})") from error
    return tensors, metadata, mapped


# ---- torch's zip


def _read_ckpt(
    file: _File, size: int, inside: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], mmap.mmap]:
    try:
        archive = _Archive(file, size)
        found = _unpickle(archive.pickle())
        known = [key for key in ("state_dict", *inside) if key in found] if isinstance(found, dict) else []
        state = found[known[0]] if known else found
        if not isinstance(state, dict):
            raise _Fault("holds no dict of tensors", _ALONE)
        described = {name: value for name, value in state.items() if isinstance(value, _Tensor)}
        _few(described)
        if state and not described:
            raise _Fault(f"holds no tensors but {', '.join(shown(key) for key in list(state)[:4])}", _ALONE)
        tensors = {name: archive.tensor(name, value) for name, value in described.items()}
    except _MALFORMED as error:
        raise _Fault(f"is damaged ({_one_line(error)})") from error
    beside = {name: value for name, value in found.items() if isinstance(value, str | int | float)}
    return tensors, beside, archive.map


class _Archive:
    """torch.save's zip under one private memory map. Nothing is ever decompressed."""

    def __init__(self, file: _File, size: int) -> None:
        self.file, self.size = file, size
        try:
            with zipfile.ZipFile(file) as opened:
                entries = opened.infolist()
        except zipfile.BadZipFile as error:
            if "not a zip" not in str(error):
                raise
            raise _Fault(f"is cut short (torch.save's zip, without its end after {size} bytes)") from error
        self.entries = {entry.filename: entry for entry in entries}
        pickles = [name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if not pickles:
            raise _Fault("is a zip, but not torch.save's", "unpack it and give the weight file inside")
        if len(pickles) > 1 or len(self.entries) < len(entries):
            raise _Fault("is damaged (its zip has a member twice)")
        self.root = pickles[0].removesuffix("data.pkl")  # often, but not always, "archive/"
        self.map = _map(file)
        self.storages: dict[_Storage, torch.Tensor] = {}  # many tensors may share one
        if f"{self.root}byteorder" in self.entries:
            start, length = self.span("byteorder")
            order = self.map[start : start + min(length, 8)]
            if order != sys.byteorder.encode():
                raise _Fault(f"has byte order {order!r}, this machine {sys.byteorder!r}", _AS_SAFE)

    def pickle(self) -> bytes:
        start, length = self.span("data.pkl")
        if length > MAX_PICKLE:
            raise _Fault(f"has {length} bytes of pickle, more than {MAX_PICKLE}", _ALONE)
        return self.map[start : start + length]

    def span(self, member: str) -> tuple[int, int]:
        """Where a member's bytes lie: (start, length)."""
        entry = self.entries.get(self.root + member)
        if entry is None:
            raise _Fault(f"is damaged ({shown(member)} is not in its zip)")
        if entry.compress_type or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise _Fault("is a compressed zip, unlike torch.save's", "pack it again without compression")
        name = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        # read(), not the map: a page fault here would read 128 KiB ahead, a thousand times over
        self.file.seek(entry.header_offset)
        header = self.file.read(30 + len(name))
        signature, name_length, extra_length = struct.unpack_from("<4s22xHH", header)
        start = entry.header_offset + 30 + name_length + extra_length
        if (signature, name_length, header[30:]) != (b"PK\x03\x04", len(name), name):
            raise _Fault(f"is damaged ({shown(member)} is not where its zip says)")
        if start + entry.file_size > self.size:
            raise _Fault(f"is damaged ({shown(member)} ends behind the file)")
        return start, entry.file_size

    def storage(self, wanted: _Storage) -> torch.Tensor:
        if wanted not in self.storages:
            dtype, key, numel = wanted
            start, length = self.span(f"data/{key}")
            if not 0 <= numel <= length // dtype.itemsize:
                raise _Fault(f"is damaged (storage {shown(key)} has only {length} bytes)")
            self.storages[wanted] = _flat(self.map, dtype, start, numel)
        return self.storages[wanted]

    def tensor(self, name: str, described: _Tensor) -> torch.Tensor:
        """torch._utils._rebuild_tensor_v2, with every number checked before torch sees it."""
        storage, offset, size, stride = described
        flat = self.storage(storage)
        if _sane((offset,), size, stride) and len(size) == len(stride):
            steps = [(n - 1) * step for n, step in zip(size, stride, strict=True)]
            inside = offset + (0 if 0 in size else 1 + sum(steps)) <= flat.numel()
            # nor more elements than the storage has: stride 0 would make terabytes out of one number
            if inside and prod(size) <= flat.numel():
                return torch.as_strided(flat, size, stride, offset)
        raise _Fault(f"is damaged or forged ({shown(name)} does not fit into its storage)")


# ---- the pickle in it, without pickle


def _unpickle(data: bytes) -> Any:
    """Walk a pickle's opcodes (protocols 2 to 5) into plain data; pickletools.opcodes explains each.

    No recursion, and no size is taken on trust: genops reads what there is, the memo is a dict, and dict keys
    are strings, whose hash is cheap and cannot be aimed at collisions.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each MARK
    memo: dict[Any, Any] = {}
    for opcode, arg, _ in pickletools.genops(data):
        op = opcode.name
        if op in _LITERALS:
            stack.append(arg)
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if op == "MEMOIZE" else arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op == "MARK":
            below.append(stack)
            stack = []
        elif op in _TAKES:
            count = _TAKES[op]
            if count is None:
                items, stack = stack, below.pop()
            else:
                items = [stack.pop() for _ in range(count)][::-1]
            if op.startswith("TUPLE"):
                stack.append(tuple(items))
            else:
                _extend(stack[-1], items, dict if op.startswith("SETITEM") else list)
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op in ("EMPTY_SET", "FROZENSET"):
            stack = below.pop() if op == "FROZENSET" else stack
            stack.append(_NOTHING)
        elif op == "ADDITEMS":
            stack = below.pop()
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in ("GLOBAL", "STACK_GLOBAL", "INST"):
            name = " ".join((stack.pop(-2), stack.pop())) if op == "STACK_GLOBAL" else arg
            if name not in _GLOBALS or op == "INST":
                name = shown(str(name).replace(" ", "."))
                raise _Fault(f"asks to run {name}: refused, and nothing was run", _AS_SAFE)
            stack.append(_Global(name))
        elif op in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(_call(function, args))
        elif op == "BUILD":  # an object's attributes: nothing else that is built here has a use for them
            attributes = stack.pop()
            if isinstance(stack[-1], _Parameters):
                _extend(stack[-1], [x for pair in attributes["_parameters"].items() for x in pair], dict)
        elif op == "BINPERSID":
            stack.append(_persistent(stack.pop()))
        elif op == "STOP":
            break
        elif op not in ("PROTO", "FRAME"):  # all of the data is at hand, so frames do not matter
            raise _Fault(f"has the pickle instruction {op}: refused, and nothing was run", _AS_SAFE)
    return stack.pop()


def _extend(target: Any, items: list[Any], kind: type) -> None:
    if not isinstance(target, kind | _Inert):
        raise ValueError(f"items for a {kind.__name__} where there is none")
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, dict):  # a key that is no string (a Lightning class, an index) names no tensor
        target.update((k, v) for k, v in zip(items[::2], items[1::2], strict=True) if type(k) is str)


def _call(function: Any, args: Any) -> Any:
    """What a call in the pickle stands for: a tensor's description, an empty dict, or nothing at all."""
    meaning = _GLOBALS[function.name]
    if meaning == "inert":
        return _NOTHING
    if meaning == "dict" and all(isinstance(arg, _Global) for arg in args):  # defaultdict names what is in it
        return {}
    if meaning == "parameters" and args == ():
        return _Parameters()
    if meaning == "tensor" and isinstance(args[0], _Storage):
        return _Tensor(*args[:4])
    if meaning == "parameter" and isinstance(args[0], _Tensor):
        return args[0]
    raise ValueError("a call that torch.save does not write")


def _persistent(pid: Any) -> _Storage:
    """torch's persistent ids: ('storage', type, key, device, number of elements); the device is ignored."""
    word, kind, key, _, numel = pid
    dtype = _GLOBALS[kind.name]
    if (word, type(key), type(numel)) != ("storage", str, int) or not isinstance(dtype, torch.dtype):
        raise ValueError("a persistent id that is no storage")
    return _Storage(dtype, key, numel)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- writing


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    *,
    force: bool = True,
) -> None:
    """Write a .safetensors file tensor by tensor, whole or not at all.

    Floating tensors are written as `dtype`, one for all or one for each name, if given.

    One tensor at a time is converted, made contiguous and fetched from its device (the library's save_file
    wants them all ready, and its older versions copy them all). The same tensors give the same bytes: wide
    types first, so that all are aligned, then by name. An existing file is replaced, unless `force` is False, by
    `sd.files.writing`. Old readers of the format want {"format": "pt"} in the metadata. Raises CheckpointError.
    """
    wanted = dtype if isinstance(dtype, Mapping) else dict.fromkeys(tensors, dtype)
    types = {name: (wanted.get(name) if t.is_floating_point() else None) or t.dtype for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: (-types[name].itemsize, name))
    try:
        head = _header({name: (types[name], tuple(tensors[name].shape)) for name in order}, metadata or {})
        with writing(path, force=force) as file:
            file.write(head)
            for name in order:
                tensor = tensors[name].detach().to("cpu", types[name]).contiguous()
                flat = tensor.as_strided((tensor.numel(),), (1,))  # reshape leaves odd strides if numel < 2
                file.write(flat.view(torch.uint8).numpy().data)
    except OSError as error:
        raise CheckpointError(str(error)) from error
    except _Fault as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error


def _header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Eight bytes of length, then JSON, padded with spaces so that the data begins at a multiple of 8."""
    if not all(type(word) is str for pair in metadata.items() for word in pair):
        raise _Fault("its metadata is not all strings", "turn it into strings")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in _DTYPES or name == "__metadata__":
            raise _Fault(f"tensor {shown(name)} of type {dtype} has no place in safetensors", "leave it out")
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    try:
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise _Fault("a name or metadata in it is no valid Unicode", "leave it out") from error
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data

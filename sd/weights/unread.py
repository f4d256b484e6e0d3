"""Weights that stay in their file until somebody computes with them.

A part of a model (its UNet, its VAE) that `load` made is *unread*: its parameters are the file's tensors, mapped, in
the file's dtype. The first call of the part or of a module in it, its `state_dict()`, `.to()` and their like, a deep
copy and pickling read it first: parameter by parameter is moved to where, and converted to what, the part computes
in. Parameters stay the same objects, so an optimizer may hold them before. Once a part is read nothing is left of
this: no hook, and the class that it had.

`named_parameters()` reads nothing, nor does a copy of the part which shares its parameters: `read_weights` does.

A part may be told to change weights when it reads them (`Patch`: a LoRA). Such a part is unread, too, until they are
changed, wherever the weights lie by then.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..operations import TEXTBOOK, copy_of

Target = tuple[torch.device, torch.dtype]
Part = TypeVar("Part", bound=nn.Module)


class Patch(Protocol):
    """What changes a weight when it is read."""

    base: Tensor  # the weight as it is without, in the file or in memory

    def merged(self, target: Target) -> Tensor:
        """The changed weight, in memory of its own."""
        ...


class _Unread:
    """What is known of an unread part; found by the part and by every module in it. Refers to none of them."""

    def __init__(
        self,
        part: nn.Module,
        target: Target,
        patches: Mapping[str, Patch] | None = None,
        twins: tuple[_Unread, dict[nn.Parameter, nn.Parameter]] | None = None,
    ):
        self.target = target
        self.part = ref(part)
        self.kind = type(part)
        self.lock = threading.RLock()  # two threads may call the part first
        self.done = False
        self.patches: dict[Tensor, Patch] = {part.get_parameter(n): patch for n, patch in (patches or {}).items()}
        self.twins = twins  # of another unread part, whose parameters lie in the same memory
        self.places = [
            (ref(module), name, parameter, parameter.data_ptr())
            for module in part.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if twins
            or not patches
            or parameter in self.patches  # of a copy of what is read, the others are as they are
        ]
        self.pointers = {place for *_, place in self.places}
        self.hooks = [
            hook
            for module in part.modules()
            for hook in (
                module.register_forward_pre_hook(_read_first, prepend=True),
                module.register_state_dict_pre_hook(_read_first),
            )
        ]

    def converted(self, tensor: Tensor) -> Tensor:
        """A tensor as the part computes with it; what somebody has changed since loading stays as it is."""
        if tensor.data_ptr() not in self.pointers:
            return tensor
        patch = self.patches.get(tensor)
        return tensor.to(*self.target) if patch is None else patch.merged(self.target)

    def shared(self, parameter: nn.Parameter) -> Tensor:
        """`converted`, in the memory of the twin where there is one, so that two parts have one copy of it."""
        other, twins = self.twins or (self, {})
        if parameter in twins and parameter not in self.patches and parameter.data_ptr() in self.pointers:
            data = other.ahead(twins[parameter])
            if (data.device, data.dtype) == self.target:
                return data
        return self.converted(parameter).detach()

    def ahead(self, parameter: nn.Parameter) -> Tensor:
        """The data of one parameter as the part computes with it; if the part is unread, this one is read now."""
        with self.lock:
            if not self.done:
                with suppress(RuntimeError):  # a device of another kind: it is read when all of the part is
                    parameter.data = self.shared(parameter)
            return parameter.data

    def read(self) -> None:
        with self.lock, torch.inference_mode(False), torch.no_grad():  # else the weights could not be trained
            if self.done:
                return
            for module, name, parameter, _ in self.places:
                self.put(module, name, parameter, self.shared(parameter))
            self.finish()

    def patch(self) -> None:
        """Read the weights that are changed when they are read, and no others."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            for module, name, parameter, _ in self.places if self.patches else ():
                if parameter in self.patches:
                    self.put(module, name, parameter, self.shared(parameter))
            self.patches = {}

    def put(self, module: ref[nn.Module], name: str, parameter: nn.Parameter, data: Tensor) -> None:
        try:
            parameter.data = data
        except RuntimeError:  # a device of another kind, such as meta: the parameter must be another too
            if owner := module():
                setattr(owner, name, nn.Parameter(data, parameter.requires_grad))

    def finish(self) -> None:
        self.done, self.twins, self.patches = True, None, {}
        for hook in self.hooks:
            hook.remove()
        if part := self.part():
            for module in part.modules():
                _UNREAD.pop(module, None)
            part.__class__ = self.kind


_UNREAD: WeakKeyDictionary[nn.Module, _Unread] = WeakKeyDictionary()


def _read_first(module: nn.Module, *_: Any) -> None:
    """The hook: of a module that is the part's own. A copy that has the hook too is nobody's."""
    unread = _UNREAD.get(module)
    if unread:
        unread.read()


def forget_to_read(module: nn.Module) -> None:
    """Take that hook off a module."""
    for hooks in (module._forward_pre_hooks, module._state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook is _read_first]:
            del hooks[key]


class _Part(nn.Module):
    """What an unread part does otherwise than its class; it is of that class again once it is read."""

    plain: type[nn.Module]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """`.to()`, `.half()`, `.cuda()` and so on: read and changed tensor by tensor."""
        unread = _UNREAD.get(self)
        if unread is None:
            return super()._apply(fn, recurse)
        with unread.lock, torch.inference_mode(False):
            if unread.done or not recurse:
                unread.read()
                return self._apply(fn, recurse)
            super()._apply(lambda tensor: fn(unread.converted(tensor)))
            unread.finish()
            return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return self.load_state_dict(*args, **kwargs)

    def settle(self) -> None:
        """Read the part, if this is one, and be of the plain class."""
        kind: Any = self.plain
        read_weights(self)
        self.__class__ = kind

    def __copy__(self) -> nn.Module:
        result = self.plain.__new__(self.plain)
        result.__dict__.update(self.__dict__)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        if not all(id(parameter) in memo for parameter in self.parameters()):
            self.settle()
            return copy.deepcopy(self, memo)
        result = self.plain.__new__(self.plain)  # it shares the parameters, so nothing need be read for it
        memo[id(self)] = result
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for module in result.modules():
            forget_to_read(module)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.settle()
        return self.__reduce_ex__(protocol)


_KINDS: dict[type, type[nn.Module]] = {}


def _unread_kind(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _KINDS:
        own = {"plain": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _KINDS[kind] = type(kind.__name__, (_Part, kind), own)
    return _KINDS[kind]


def sharing(part: Part, patches: Mapping[str, Patch], change: Callable[[Part], None] = lambda copied: None) -> Part:
    """A copy of a part, with parameters that lie in the same memory but for those that are to be changed (by name).

    It is unread, if the part is, or if there are any changes. When it is read, what it shares with an unread part is
    read for both of them, once. `change` may put other modules into the copy, with parameters of their own.
    """
    with at_rest(part):
        unread, device_and_dtype = _UNREAD.get(part), computes_in(part)
        parameters = dict(part.named_parameters())
        own = {}
        for name, p in parameters.items():
            data = patches[name].base if name in patches else p
            own[name] = nn.Parameter(data.detach(), requires_grad=p.requires_grad)
        result = _copy_with(part, own)
        change(result)
        twins = (unread, {own[name]: p for name, p in parameters.items()}) if unread else None
        if unread or patches:
            begin(result, _Unread(result, device_and_dtype, patches, twins))
    return result


def _copy_with(part: Part, own: Mapping[str, nn.Parameter]) -> Part:
    """A copy of a part with these parameters, and with its own hooks: those of now, but for those that read it."""
    if any("forward" in vars(m) or getattr(m, "ops", TEXTBOOK) is not TEXTBOOK for m in part.modules()):
        return copy.deepcopy(part, {id(p): own[name] for name, p in part.named_parameters()})  # of sd.fast, say
    result = copy_of(part, TEXTBOOK, own_hooks=True)  # the same, ten times as fast
    for name, module in result.named_modules():
        forget_to_read(module)
        for leaf in module._parameters:
            if module._parameters[leaf] is not None:
                module._parameters[leaf] = own[f"{name}.{leaf}".removeprefix(".")]
    return result


def begin(part: nn.Module, unread: _Unread) -> None:
    for module in part.modules():
        _UNREAD[module] = unread
    part.__class__ = _unread_kind(type(part))


def leave_in_file(part: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Leave the weights of `part` where they are, until it is to compute on `device` in `dtype`."""
    parameters = list(part.parameters())
    if all((p.device, p.dtype) == (device, dtype) for p in parameters):
        return  # as it is in the file: nothing to do, now or later
    begin(part, _Unread(part, (device, dtype)))


def read_weights(part: nn.Module) -> nn.Module:
    """The part, with its weights where and in what it computes."""
    if unread := _UNREAD.get(part):
        unread.read()
    return part


def patch_weights(part: nn.Module) -> nn.Module:
    """The part, in which the weights that change when they are read are read; others may still be in the file."""
    if unread := _UNREAD.get(part):
        unread.patch()
    return part


def patches_of(part: nn.Module) -> Mapping[str, Patch]:
    """What will change the weights of an unread part, by name; none of a part that is read."""
    unread = _UNREAD.get(part)
    names = {id(p): name for name, p in part.named_parameters()} if unread else {}
    return {names[id(p)]: patch for p, patch in unread.patches.items()} if unread else {}


@contextmanager
def at_rest(part: nn.Module) -> Iterator[None]:
    """Within the block no other thread reads the part: its parameters may be shared by a copy meanwhile."""
    unread = _UNREAD.get(part)
    with unread.lock if unread else nullcontext():
        yield


def target(part: nn.Module) -> Target | None:
    """Where and in what an unread part will compute; None: it is read."""
    unread = _UNREAD.get(part)
    return unread.target if unread else None


def computes_in(part: nn.Module) -> Target:
    """The device and the dtype of a part, read or not."""
    first = next(part.parameters())
    return target(part) or (first.device, first.dtype)


def tensors_of(part: nn.Module) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Of every parameter its name, the tensor as it is now, and the dtype that the part computes with it in.

    A module that has its one table in `pieces`, parameters with these names, gives it whole, under the first's name.
    """
    with at_rest(part):  # all of them at one moment
        unread = _UNREAD.get(patch_weights(part))
        for name, parameter in part.named_parameters():
            owner, _, last = name.rpartition(".")
            module = part.get_submodule(owner)
            pieces: tuple[str, ...] = getattr(module, "pieces", ())
            if last in pieces[1:]:
                continue
            tensor = parameter.detach()
            if pieces:
                parts = [getattr(module, piece).detach() for piece in pieces]  # float8 does not mix with others
                tensor = torch.cat([part.float() if part.dtype.itemsize == 1 else part for part in parts])
            mapped = unread is not None and parameter.data_ptr() in unread.pointers
            yield name, tensor, unread.target[1] if unread and mapped else parameter.dtype

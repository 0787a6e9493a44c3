"""Calls that nobody watches go straight to the native kernels, of a CPU or of CUDA.

Of a call with one token, checks and the dispatcher take some 50 us and the CPU core 3: `python -m benchmarks overhead`. But checks
look at what tensors are, not at what they hold, and the dispatcher leads to the kernels if no mode, transform or subclass stands
between. So a call that went well is remembered, with a guard: a later one that passes it needs neither checks nor dispatcher, and
gives what these would have given. Whatever fails the guard takes the long way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from rode_kernels.backends import cpu
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.reference import accumulation_dtype
from rode_kernels.backends.registry import backend_of_environment
from rode_kernels.mixture import Mixture

try:  # none of it is public: where a torch lacks any, calls go the long way
    from torch._C import (
        DispatchKeySet,
        _dispatch_key_parse,
        _dispatch_keys,
        _dispatch_tls_local_exclude_set,
        _dispatch_tls_local_include_set,
        _len_torch_function_stack,
    )

    # Dynamo's: type, dispatch keys under this thread's modes, dtype, device, sizes, strides, requires_grad, in half a microsecond
    from torch._C._dynamo.guards import TensorGuards
    from torch.autograd import _profiler_enabled
except ImportError:
    TensorGuards = None

# As the operator takes them, up to base.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, None, Tensor | None]

_TYPES = (Tensor, Parameter)
if TensorGuards is not None:
    # By device, which is the backend's name, too: autograd's dispatch key, and all keys of a call that comes to the kernels with
    # nothing in between.
    _AUTOGRAD = {d: _dispatch_key_parse(f"Autograd{d.upper()}") for d in ("cpu", "cuda")}
    _PLAIN = {d: DispatchKeySet(key) for d, key in _AUTOGRAD.items()}
    for _device in _PLAIN:
        for _key in (_device.upper(), "ADInplaceOrView", "BackendSelect"):
            _PLAIN[_device] |= DispatchKeySet(_dispatch_key_parse(_key))
    _AUTOCAST = {d: DispatchKeySet(_dispatch_key_parse(f"Autocast{d.upper()}")) for d in _PLAIN}

_BACKENDS = {"cpu": cpu, "cuda": cuda}

_KEYS, _GUARDS = 1024, 8  # shapes that are remembered, and for each the strides, dtypes, ...


class Shortcut(NamedTuple):
    """A call that may be repeated.

    Attributes:
        guard: whether tensors, and what would see the operator, are as they were.
        run: takes the operator's eight tensors; gives y, u, g.
        backward: the backend's `prepare_backward`'s.
        needs_grad: whether it needs autograd's Function where gradients are enabled.
        mixture: kept, for its address is part of the key.
        autocast: the device on which it was on, if it was; its type is then x's.
        layouts: `_layout` of x, A, B and the router's weight, which `backward` is made for.
        backward_guards: by `goes_back`, of tensors that a backward pass has met.
    """

    guard: Callable[..., bool]
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., list[Tensor | None]]
    needs_grad: bool
    mixture: Mixture
    autocast: str
    layouts: tuple[tuple, ...]
    backward_guards: dict[tuple[bool, bool], Callable[..., bool]]


_known: dict[tuple, list[Shortcut]] = {}


def _key_and_tensors(
    mixture: Mixture, args: Arguments, inplace: bool, dropout_p: float, backend: str | None
) -> tuple[tuple, tuple[Tensor, ...]]:
    """A call's key, the backend that is asked for first, and the tensors that a guard sees."""
    name = backend or backend_of_environment()
    x, A, B, router_weight, router_bias, _, base = args
    tensors = (x, A, B, router_weight)
    if router_bias is not None:
        tensors += (router_bias,)
    if base is not None:
        tensors += (base,)
    key = (name, id(mixture), x.shape, B.shape, router_bias is None, base is None, not inplace, dropout_p)
    return key, tensors


def _eligible(args: Arguments, backend: str | None) -> bool:
    """As far as guards do not tell, and types where a guard is not found without them."""
    return (
        type(args[0]) in _TYPES
        and type(args[2]) in _TYPES
        and (backend is None or type(backend) is str)
        and not _len_torch_function_stack()  # modes of this kind and profilers set no dispatch key
        and not _profiler_enabled()
    )


def unwatched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an operator on these would come to a kernel with nothing in between, and no gradients are recorded."""
    if TensorGuards is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    there = [t for t in tensors if t is not None]
    return (
        all(type(t) in _TYPES for t in there)
        and not _len_torch_function_stack()
        and not _profiler_enabled()
        and _plain(_keys_of(there), there[0].device.type)
    )


def goes_back(known: Shortcut, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether `known.backward` may be given these: dy, dgates, x, u, g, A, B, router_weight, seed. What autograd saved need not
    come back as it was: hooks may have moved it away, and back into other strides."""
    dy, dgates, x, u, g, A, B, router_weight, seed = tensors
    if dy is None or torch.is_grad_enabled() or _len_torch_function_stack() or _profiler_enabled():
        return False
    there = [t for t in tensors if t is not None]
    which = (dgates is None, seed is None)
    guard = known.backward_guards.get(which)
    if guard is not None:
        return guard(*there)
    if not unwatched(tensors) or tuple(map(_layout, (x, A, B, router_weight))) != known.layouts:
        return False
    if not all(t.is_contiguous() for t in (dy, u, g)):
        return False
    known.backward_guards[which] = _guard(there)
    return True


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device


def _guard(tensors: Iterable[Tensor]) -> Callable[..., bool]:
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check


def _plain(keys: DispatchKeySet, device: str) -> bool:
    plain = _PLAIN.get(device)
    return plain is not None and (keys | plain).raw_repr() == plain.raw_repr()


def find(
    mixture: Mixture, args: Arguments, inplace: bool, dropout_p: float, backend: str | None
) -> Shortcut | None:
    """What `remember` made of a call like this one. The arguments may be anything."""
    if TensorGuards is None or not _eligible(args, backend):
        return None
    key, tensors = _key_and_tensors(mixture, args, inplace, dropout_p, backend)
    for shortcut in _known.get(key, ()):
        if shortcut.guard(*tensors):
            cast = shortcut.autocast
            return shortcut if not cast or torch.get_autocast_dtype(cast) == args[0].dtype else None
    return None


def remember(
    mixture: Mixture,
    args: Arguments,
    inplace: bool,
    dropout_p: float,
    backend: str | None,
    base_needed_grad: bool,
) -> None:
    """Of a call that went well, with a router. What depends on where memory lies, `check_inplace` checks each time.

    Args:
        base_needed_grad: before the call; one in place may have changed that.
    """
    if TensorGuards is None or not _eligible(args, backend):
        return
    x, A, B, router_weight, router_bias, _, base = args
    device = x.device.type
    native = _BACKENDS.get(device)
    if native is None or not native.status()[0]:
        return
    key, tensors = _key_and_tensors(mixture, args, inplace, dropout_p, backend)
    if key[0] not in ("", device):
        return
    autocast = device if torch.is_autocast_enabled(device) else ""
    if autocast and torch.get_autocast_dtype(device) != x.dtype:
        return
    if len(_known.get(key, ())) >= _GUARDS:
        return
    keys = _keys_of(tensors)
    # Autocast has nothing to do where x is in its type and the rest, too, or in float32; guards see whether it is on.
    if not _plain(keys - _AUTOCAST[device], device) or any(t.numel() == 0 for t in tensors):
        return
    wide = accumulation_dtype(x.dtype)
    if any(t.dtype not in (x.dtype, wide) for t in (A, B, router_weight)) or (
        base is not None and base.dtype != x.dtype
    ):
        return
    if any(type(t) not in _TYPES for t in tensors):
        return
    if base is not None and not base_needed_grad:
        tensors = (*tensors[:-1], base.detach())
    needs_grad = any(t.requires_grad for t in tensors)
    if needs_grad and not (keys.has(_AUTOGRAD[device]) or torch.is_inference_mode_enabled()):
        return  # within another operator
    if router_bias is not None and not (router_bias.dtype == wide and router_bias.is_contiguous()):
        return
    try:
        rows_of_x, rows_of_base = (None if t is None else t.detach().view(-1, t.shape[-1]) for t in (x, base))
    except RuntimeError:  # strides that do not flatten
        return
    shape = (*x.shape[:-1], B.shape[0])
    run = native.prepare(rows_of_x, A, B, router_weight, rows_of_base, mixture, dropout_p, inplace, shape)
    if run is None:
        return
    backward = native.prepare_backward(rows_of_x, A, B, router_weight, mixture, dropout_p, tuple(x.shape))
    if len(_known) >= _KEYS:
        _known.clear()
    layouts = tuple(map(_layout, (x, A, B, router_weight)))
    shortcut = Shortcut(_guard(tensors), run, backward, needs_grad, mixture, autocast, layouts, {})
    _known.setdefault(key, []).append(shortcut)


def _keys_of(tensors: Iterable[Tensor]) -> DispatchKeySet:
    """Those by which the dispatcher would choose a kernel here and now."""
    keys = _dispatch_tls_local_include_set()
    for t in tensors:
        keys |= _dispatch_keys(t)
    return keys - _dispatch_tls_local_exclude_set()

"""A short way for calls that nobody watches: straight to the native kernels, of a CPU or of CUDA.

For one token, checks and the dispatcher take some 50 us and the CPU core 3 (`python -m benchmarks overhead`). Checks look at
what tensors are, not at the values they hold, and the dispatcher leads to the kernels unless a mode, a transform or a subclass
stands between. So a call is checked once and prepared, with a guard. A later call that passes the guard needs neither checks nor
dispatcher, and gives what these would have given. What fails the guard takes the long way, as every call does without this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from rode_kernels.autocast import autocast_dtype
from rode_kernels.backends import cpu
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.reference import accumulation_dtype
from rode_kernels.backends.registry import backend_of_environment
from rode_kernels.checks import check_inplace, check_inputs, check_linear, check_x, normalize_seed
from rode_kernels.mixture import Mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, MaybeTensor, Settings
from rode_kernels.passes import BackwardPass, Call, ForwardPass, Needs, PlainOperands, StaticArguments
from rode_kernels.torch_ops import gradients, note_write

try:  # none of it is public: where a torch lacks any, calls take the long way
    from torch._C import (
        DispatchKeySet,
        _dispatch_key_parse,
        _dispatch_keys,
        _dispatch_tls_local_exclude_set,
        _dispatch_tls_local_include_set,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )
    from torch._C._autograd import _profiler_enabled

    # Dynamo's: type, dispatch keys under this thread's modes, dtype, device, sizes, strides, requires_grad, in half a microsecond
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    _GUARDED = False
else:
    _GUARDED = True

_TYPES = (Tensor, Parameter)
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
WATCHERS: tuple[Callable[[], object], ...] = ()
"""Functions whose result is 0 or false unless something sees operations that set no dispatch key, as function modes and profilers
do; and Dynamo's guards look past selective checkpointing's modes."""
if _GUARDED:
    WATCHERS = (_len_torch_function_stack, _len_torch_dispatch_stack, _profiler_enabled)
    # For each device, which is the backend's name, too: autograd's dispatch key, and all keys of a call that comes to the kernels
    # with nothing in between.
    _AUTOGRAD = {d: _dispatch_key_parse(f"Autograd{d.upper()}") for d in ("cpu", "cuda")}
    _PLAIN = {d: DispatchKeySet(key) for d, key in _AUTOGRAD.items()}
    for _device in _PLAIN:
        for _key in (_device.upper(), "ADInplaceOrView", "BackendSelect"):
            _PLAIN[_device] |= DispatchKeySet(_dispatch_key_parse(_key))
    _AUTOCAST = {d: DispatchKeySet(_dispatch_key_parse(f"Autocast{d.upper()}")) for d in _PLAIN}

_BACKENDS = {"cpu": cpu, "cuda": cuda}

_KEYS, _GUARDS = 1024, 8  # shapes that are kept, and for each the strides, dtypes, ...


class _Backward(NamedTuple):
    """The backward pass of a prepared call.

    Attributes:
        run: the pass.
        layouts: `_layout` of x, A, B and the router's weight, which `run` is made for.
        guards: of the operands that it has met, by whether dgates and the seed are None.
    """

    run: BackwardPass
    layouts: tuple[_Layout | None, ...]
    guards: dict[tuple[bool, bool], Callable[..., bool]]


class _Prepared(NamedTuple):
    """A call that may be repeated.

    Attributes:
        guard: whether tensors, and what would see the operator, are as they were.
        run: the forward pass.
        needs_grad: whether autograd has to record it where gradients are enabled.
        mixture: kept because its address is part of the key.
        autocast: the device on which autocast was on, with x's dtype; "" for none.
        y_alone, with_gates: what autograd records, with y as the only output or not.
    """

    guard: Callable[..., bool]
    run: ForwardPass
    needs_grad: bool
    mixture: Mixture
    autocast: str
    y_alone: Call
    with_gates: Call


_known: dict[tuple[object, ...], list[_Prepared]] = {}


def call(
    function: type[torch.autograd.Function],
    operands: PlainOperands,
    mixture: Mixture,
    dropout_p: float,
    inplace: bool,
    return_gates: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The result of `rectified_mixture`, or None where the call has to take the long way.

    Args:
        function: records a call: takes the operands and a `Call`.
        operands: without gates and seed, in a plain tuple, for a named one takes 0.4 us more. They may be anything: what the checks
            refuse raises their error, here or on the long way.
    """
    prepared = find(operands, mixture, dropout_p, inplace, backend)
    if prepared is None:
        return None
    if inplace:
        x, base = operands[0], operands[6]
        if base is None or base._is_view():
            return None
        check_inplace(base, x)
    if dropout_p:
        operands = (*operands[:-1], normalize_seed(None, dropout_p, operands[0]))
    y: Tensor
    if prepared.needs_grad and torch.is_grad_enabled():
        # without `Function.apply`'s look for functorch, which takes 2.5 us: the guard has seen that it is not there
        apply: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # the stubs lack it
        if not return_gates:
            y = apply(*operands, prepared.y_alone)
            return y
        y, _, g = apply(*operands, prepared.with_gates)
    else:
        y, _, g = prepared.run(operands)
        if inplace:
            note_write(y)
    return (y, g.view(*y.shape[:-1], mixture.num_experts)) if return_gates else y


def call_linear(
    function: type[torch.autograd.Function],
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    operands: PlainOperands,
    mixture: Mixture,
    dropout_p: float,
    return_gates: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The result of `rectified_linear`, or None where the call has to take the long way.

    Args:
        function: records a call: takes weight, bias, the operands but gates and base, and a `Call`.
        product: the linear layer's, of x, weight and bias.
        operands: as `call` takes them, with None for base.
    """
    linear = (weight,) if bias is None else (weight, bias)
    if any(type(t) not in _TYPES for t in linear):
        return None
    prepared = find(operands, mixture, dropout_p, True, backend, linear)
    if prepared is None:
        return None
    x, A, B, router_weight, router_bias, _, _, _ = operands
    seed = normalize_seed(None, dropout_p, x) if dropout_p else None
    y: Tensor
    if prepared.needs_grad and torch.is_grad_enabled():
        apply: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # as in `call`
        given = (weight, bias, x, A, B, router_weight, router_bias, seed)
        if not return_gates:
            y = apply(*given, prepared.y_alone)
            return y
        y, _, g = apply(*given, prepared.with_gates)
    else:
        with torch.no_grad():  # what autograd records, where weight requires gradients, cannot be written to
            base = product(x, weight, bias)
        y, _, g = prepared.run((x, A, B, router_weight, router_bias, None, base, seed))
    return (y, g.view(*y.shape[:-1], mixture.num_experts)) if return_gates else y


def backward(
    prepared: _Backward | None, operands: BackwardOperands, static: StaticArguments, needs: Needs
) -> Gradients | None:
    """Gradients, or None where the operator has to compute them.

    Args:
        prepared: what `call` left in the `Call`; None if it took the long way.
    """
    if prepared is not None and _repeats_backward(prepared, operands):
        return prepared.run(operands, needs)
    return gradients(operands, static, needs) if _unwatched(operands) else None


def unchanged(
    items: Sequence[tuple[dict[str, Any], str]],
    attributes: Sequence[tuple[object, str]],
    functions: Sequence[Callable[[], object]],
) -> Callable[[], bool]:
    """A function that says whether readings that led to a decision are as they are now.

    A reading is the same if it is the same object (an integer: the same number) and, for a dictionary or a list, has as many
    entries. One that raises an error, or an item that is not there, is a reading, too. Only where there is native code, that is,
    where `find` has found something.

    Args:
        items: dictionaries with a key. attributes: objects with an attribute's name. functions: called without arguments.
    """
    check: Callable[[], bool] = cpu.native_code().Unchanged(items, attributes, functions)
    return check


def find(
    operands: PlainOperands,
    mixture: Mixture,
    dropout_p: float,
    inplace: bool,
    backend: str | None,
    linear: tuple[Tensor, ...] = (),
) -> _Prepared | None:
    """The prepared call for one like this, prepared now where there is none yet; None where it must take the long way.

    Args:
        linear: weight, and bias where there is one, of the layer that will make base.
    """
    x, A, B, router_weight, router_bias, _, base, _ = operands
    if (
        not _GUARDED
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0  # guards do not see tangents
        or type(dropout_p) is not float
        or type(x) not in _TYPES
        or type(B) not in _TYPES
        or not (backend is None or type(backend) is str)
        # modes of functions and profilers set no dispatch key, and Dynamo's guards look past selective checkpointing's
        or _len_torch_function_stack()
        or _len_torch_dispatch_stack()
        or _profiler_enabled()
    ):
        return None
    tensors: tuple[Tensor | None, ...] = (x, A, B, router_weight)
    if router_bias is not None:
        tensors += (router_bias,)
    if base is not None:
        tensors += (base,)
    tensors += linear
    name = backend or backend_of_environment()
    key = (
        name,
        id(mixture),
        x.shape,
        B.shape,
        router_bias is None,
        base is None,
        not inplace,
        dropout_p,
        len(linear),
    )
    same_shapes = _known.get(key, ())
    for prepared in same_shapes:
        if prepared.guard(*tensors):
            cast = prepared.autocast
            return prepared if not cast or torch.get_autocast_dtype(cast) == x.dtype else None
    found = _prepare(ForwardOperands(*operands), Settings(mixture, dropout_p, False), inplace, name, linear)
    if found is not None:  # the oldest makes room, of shapes and of a shape's layouts
        if key not in _known and len(_known) >= _KEYS:
            _known.pop(next(iter(_known)), None)
        guards = _known.setdefault(key, [])
        guards.append(found)
        del guards[:-_GUARDS]
    return found


def _prepare(
    operands: ForwardOperands, settings: Settings, inplace: bool, name: str, linear: tuple[Tensor, ...]
) -> _Prepared | None:
    """Checks and prepares a shape. `check_inplace` checks each time what depends on where memory lies."""
    x, A, B, router_weight, router_bias, _, base, _ = operands
    device, mixture = x.device.type, settings.mixture
    native = _BACKENDS.get(device)
    if native is None or name not in ("", device) or not native.status()[0]:
        return None
    tensors = [t for t in (*operands, *linear) if t is not None]
    if router_weight is None or any(type(t) not in _TYPES for t in tensors):
        return None
    dtype = autocast_dtype(device)
    if dtype not in (None, x.dtype):
        return None
    keys = _keys_of(tensors)
    # Autocast has nothing to do where x is in its dtype and the rest, too, or in float32; guards see whether it is on.
    if not _plain(keys - _AUTOCAST[device], device) or any(t.numel() == 0 for t in tensors):
        return None
    acc_dtype = accumulation_dtype(x.dtype)
    if any(t.dtype not in (x.dtype, acc_dtype) for t in (A, B, router_weight)):
        return None
    if linear:
        if any(t.dtype != x.dtype for t in linear):
            return None
        base = x.new_empty(*x.shape[:-1], B.shape[0])  # like the product
        operands = operands._replace(base=base)
    if (base is None and inplace) or (base is not None and base.dtype != x.dtype):
        return None
    needs_grad = any(t.requires_grad for t in tensors)
    if needs_grad and not (keys.has(_AUTOGRAD[device]) or torch.is_inference_mode_enabled()):
        return None  # within another operator
    if router_bias is not None and not (router_bias.dtype == acc_dtype and router_bias.is_contiguous()):
        return None
    check_x(x)
    check_inputs(operands, settings)
    if linear:
        check_linear(linear[0], linear[1] if len(linear) > 1 else None, x, B.shape[0])
    try:
        rows = operands._replace(x=_rows(x), base=_rows(base))
    except RuntimeError:  # strides that do not flatten
        return None
    run = native.prepare(rows, settings, inplace, (*x.shape[:-1], B.shape[0]))
    if run is None:
        return None
    backward = _Backward(
        native.prepare_backward(rows, settings, tuple(x.shape)),
        tuple(map(_layout, (x, A, B, router_weight))),
        {},
    )
    static = (mixture.ranks, mixture.scaling, settings.dropout_p, False, name)
    y_alone, with_gates = (Call(run, static, inplace, only_y, backward) for only_y in (True, False))
    autocast = "" if dtype is None else device
    return _Prepared(_guard(tensors), run, needs_grad, mixture, autocast, y_alone, with_gates)


def _rows(t: MaybeTensor) -> MaybeTensor:
    return t if t is None else t.detach().view(-1, t.shape[-1])


def _unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an operator on these would come to a kernel with nothing in between, and no gradients are recorded."""
    if not _GUARDED or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    there = [t for t in tensors if t is not None]
    return (
        all(type(t) in _TYPES for t in there)
        and not _len_torch_function_stack()
        and not _len_torch_dispatch_stack()
        and not _profiler_enabled()
        and _plain(_keys_of(there), there[0].device.type)
    )


def _repeats_backward(prepared: _Backward, operands: BackwardOperands) -> bool:
    """Whether `prepared.run` serves these. Saved tensors need not come back as they were: hooks may have moved
    them away, and back into other strides."""
    dy, dgates, x, u, g, A, B, router_weight, seed = operands
    if dy is None or torch.is_grad_enabled():
        return False
    if _len_torch_function_stack() or _len_torch_dispatch_stack() or _profiler_enabled():
        return False
    there = [t for t in operands if t is not None]
    which = (dgates is None, seed is None)
    guard = prepared.guards.get(which)
    if guard is not None:
        return guard(*there)
    if not _unwatched(operands) or tuple(map(_layout, (x, A, B, router_weight))) != prepared.layouts:
        return False
    if not all(t.is_contiguous() for t in (dy, u, g)):
        return False
    prepared.guards[which] = _guard(there)
    return True


def _layout(t: Tensor | None) -> _Layout | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    make: Callable[..., TensorGuards] = TensorGuards  # its stub knows neither the tensors nor lists of sizes
    return make(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check


def _plain(keys: DispatchKeySet, device: str) -> bool:
    plain = _PLAIN.get(device)
    return plain is not None and (keys | plain).raw_repr() == plain.raw_repr()


def _keys_of(tensors: Sequence[Tensor]) -> DispatchKeySet:
    """The dispatch keys by which the dispatcher would choose a kernel here and now."""
    keys = _dispatch_tls_local_include_set()
    for t in tensors:
        keys |= _dispatch_keys(t)
    return keys - _dispatch_tls_local_exclude_set()

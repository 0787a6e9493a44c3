"""The native CPU backend: hands pointers of torch tensors to the C++ core (`csrc/cpu`)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from rode_kernels.backends.native import load, problem_arguments
from rode_kernels.backends.reference import accumulation_dtype
from rode_kernels.mixture import Mixture
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import BackwardPass, ForwardPass, Needs, Outputs, PlainOperands

_native, _why_not = load(
    "_native",
    "no native code in this install (built with RODE_NATIVE=off or without a C++ compiler); "
    "reinstall with a compiler to get it",
)

_Strides = tuple[int, ...]
_Parameter = tuple[int, int, int, bool]
_Key = tuple[torch.dtype, torch.Size, int, Settings, _Parameter, _Parameter, _Parameter]


@lru_cache(maxsize=1)
def status() -> tuple[bool, str]:
    """Whether native code is here, and a line that says what it runs with or why it is missing."""
    if _native is None:
        return False, _why_not
    # Without it the best one is taken, unless the caller has already chosen another.
    if isa := os.environ.get("RODE_CPU_ISA"):
        try:
            _native.set_isa(isa)
        except ValueError as error:
            return False, f"RODE_CPU_ISA: {error}"
    if not _native.has_openmp():
        warnings.warn(
            "rode_kernels: built without OpenMP, the cpu backend uses one thread",
            RuntimeWarning,
            stacklevel=2,
        )
        threads = "one thread (built without OpenMP)"
    else:
        warn_of_two_openmp_runtimes()
        threads = "OpenMP"
    return True, f"C++ with {_native.isa()} instructions, {threads}"


def native_code() -> Any:
    """The compiled module; None where this install has none."""
    return _native


def refuses(x: Tensor, out_features: int, mixture: Mixture) -> str:
    return ""


def warn_of_two_openmp_runtimes() -> None:
    """Warns if this process has loaded a second OpenMP runtime; to be asked again when all libraries are there.

    Two runtimes harm each other by threads that spin while they wait, so nothing is said where threads sleep.
    """
    if not sys.platform.startswith("linux") or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if ".so" in line}
    runtimes = sorted(f for f in files if os.path.basename(f).startswith(("libgomp", "libomp", "libiomp")))
    if len(runtimes) > 1:
        warnings.warn(
            f"rode_kernels: {len(runtimes)} OpenMP runtimes in this process ({', '.join(runtimes)}); "
            "waiting threads of one take cores from the other. Set OMP_WAIT_POLICY=passive before the process starts, or import "
            "torch first",
            RuntimeWarning,
            stacklevel=2,
        )


def scratch_bytes() -> int:
    """Bytes of scratch that the native kernels have used at a time at most, over all threads; up to 32 MiB of each thread's are
    kept for its next call. torch allocates everything else and counts it."""
    return 0 if _native is None else _native.scratch_bytes()


def _parameter(t: Tensor | None, x_dtype: torch.dtype) -> _Parameter:
    """No address yet, the strides, and whether it is float32 beside a 16-bit x."""
    return (0, 0, 0, False) if t is None else (0, t.stride(0), t.stride(1), t.dtype != x_dtype)


def _key(operands: AnyOperands, settings: Settings) -> _Key:
    """Key of a native pass: all that it is made for, except the strides of activations."""
    x, A, B, router_weight = operands.x, operands.A, operands.B, operands.router_weight
    parameters = _parameter(A, x.dtype), _parameter(B, x.dtype), _parameter(router_weight, x.dtype)
    return x.dtype, x.shape, B.shape[0], settings, *parameters


def _problem(key: _Key) -> dict[str, object]:
    dtype, (tokens, in_features), out_features, settings, A, B, router_weight = key
    problem = problem_arguments(dtype, tokens, in_features, out_features, settings)
    return {**problem, "A": A, "B": B, "router_weight": router_weight}


def _native_forward(key: _Key, x: _Strides, base: _Strides | None, y: _Strides) -> Any:
    """The core's forward pass for one problem and one set of strides, to be called with addresses."""
    return _native.ForwardArrays(x=(0, *x), base=(0, *(base or (0, 0))), y=(0, *y), **_problem(key))


@lru_cache(maxsize=4096)
def _native_backward(key: _Key, dy: _Strides | None, x: _Strides) -> Any:
    """The core's backward pass, like `_native_forward`."""
    return _native.BackwardArrays(dy=(0, *(dy or (0, 0))), x=(0, *x), **_problem(key))


@lru_cache(maxsize=4096)
def _forward_pass(
    key: _Key, x: _Strides, base: _Strides | None, inplace: bool, shape: tuple[int, ...]
) -> ForwardPass:
    """The forward pass for one problem and one set of strides. `shape`: of y."""
    dtype, (M, _), O, (mixture, _, _) = key[:4]
    R, N = mixture.total_rank, mixture.num_experts
    native = _native_forward(key, x, base, base if base is not None and inplace else (O, 1))
    empty = torch.empty(0, dtype=dtype).new_empty
    empty_acc = torch.empty(0, dtype=accumulation_dtype(dtype)).new_empty
    threads = torch.get_num_threads

    def run(operands: PlainOperands) -> Outputs:
        x, A, B, router_weight, router_bias, gates, base, seed = operands
        y = base if inplace and base is not None else empty(shape)
        u = empty_acc(M, R)
        g = empty_acc(M, N) if gates is None else gates
        native(
            x.data_ptr(),
            0 if base is None else base.data_ptr(),
            y.data_ptr(),
            A.data_ptr(),
            B.data_ptr(),
            0 if router_weight is None else router_weight.data_ptr(),
            0 if router_bias is None else router_bias.data_ptr(),
            u.data_ptr(),
            g.data_ptr(),
            0 if seed is None else seed.data_ptr(),
            threads(),
        )
        return y, u, g

    return run


def prepare(
    operands: ForwardOperands, settings: Settings, inplace: bool, shape: tuple[int, ...]
) -> ForwardPass:
    """`forward`, decided for operands of these sizes, strides and dtypes. Their x and base need not be flat when it runs.

    Args:
        shape: of y.
    """
    base = None if operands.base is None else operands.base.stride()
    return _forward_pass(_key(operands, settings), operands.x.stride(), base, inplace, shape)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
    """The forward pass, see `reference.forward`; closed experts are skipped."""
    shape = operands.x.shape[0], operands.B.shape[0]
    return prepare(operands, settings, inplace, shape)(operands)


def prepare_backward(operands: ForwardOperands, settings: Settings, shape: tuple[int, ...]) -> BackwardPass:
    """`backward` after what `prepare` prepares, for a contiguous dy.

    Args:
        shape: of x, before it was made flat, and of its gradient.
    """
    ld_dy = (operands.B.shape[0], 1)
    return partial(
        _run_backward, _native_backward(_key(operands, settings), ld_dy, operands.x.stride()), shape
    )


def _run_backward(run: Any, shape: tuple[int, ...], operands: BackwardOperands, needs: Needs) -> Gradients:
    """Gradients by a native backward pass; dx in `shape`, each gradient in its parameter's dtype."""
    dx = operands.x.new_empty(shape) if needs[0] else None
    addresses, grads, _kept = backward_call(operands, needs, dx)
    run(*addresses, torch.get_num_threads())
    return grads


def backward_call(
    operands: BackwardOperands, needs: Needs, dx: Tensor | None
) -> tuple[list[int], Gradients, Sequence[Tensor | None]]:
    """The addresses that a native backward pass takes, the gradients that it will have written, in each parameter's dtype, and
    what must live until then."""
    dy, dgates, x, u, g, A, B, router_weight, seed = operands
    _, need_A, need_B, need_router, need_bias, need_gates = needs
    M, R = u.shape
    empty = u.new_empty  # in the accumulation dtype, as u is
    if dgates is not None:
        dgates = dgates.to(u.dtype).contiguous()
    factors = empty(2 if need_B else 1, M, R)  # du, and v where dB is a sum of its rows
    dh = empty(g.shape)  # gradient of the router's logits, or of the gates where no router is
    dA = A.new_empty(A.shape) if need_A else None
    dB = B.new_empty(B.shape) if need_B else None
    drouter_weight = None
    if need_router and router_weight is not None:
        drouter_weight = router_weight.new_empty(router_weight.shape)
    drouter_bias = empty(g.shape[1]) if need_bias else None
    du = factors.data_ptr()
    addresses = [
        0 if dy is None else dy.data_ptr(),
        x.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        0 if dgates is None else dgates.data_ptr(),
        u.data_ptr(),
        g.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        0 if router_weight is None else router_weight.data_ptr(),
        du + M * R * factors.element_size() if need_B else 0,
        du,
        dh.data_ptr(),
        0 if dA is None else dA.data_ptr(),
        0 if dB is None else dB.data_ptr(),
        0 if drouter_weight is None else drouter_weight.data_ptr(),
        0 if drouter_bias is None else drouter_bias.data_ptr(),
        0 if seed is None else seed.data_ptr(),
    ]
    grads = Gradients._make((dx, dA, dB, drouter_weight, drouter_bias, dh if need_gates else None))
    return addresses, grads, (dgates, factors, dh)


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The backward pass, see `reference.backward`; closed experts are skipped."""
    dy, x = operands.dy, operands.x
    run = _native_backward(_key(operands, settings), None if dy is None else dy.stride(), x.stride())
    return _run_backward(run, x.shape, operands, needs)


# As `kGroupTokens` in csrc/cpu/expand.h: so few tokens share the weights among threads, and their x stays in cache anyway.
_FEW_TOKENS = 128

_kept_forward = lru_cache(maxsize=4096)(_native_forward)


def forward_siblings(
    operands: Sequence[ForwardOperands], settings: Sequence[Settings]
) -> list[Outputs] | None:
    """The forward passes of mixtures that read the same x, in place where there is a base; None where one by one is as good."""
    x = operands[0].x
    if x.shape[0] <= _FEW_TOKENS:
        return None
    passes, calls, outputs = [], [], []
    empty, acc_dtype = x.new_empty, accumulation_dtype(x.dtype)
    for o, s in zip(operands, settings, strict=True):
        y = empty(x.shape[0], o.B.shape[0]) if o.base is None else o.base
        u = empty(x.shape[0], s.mixture.total_rank, dtype=acc_dtype)
        g = empty(x.shape[0], s.mixture.num_experts, dtype=acc_dtype)
        base_stride = None if o.base is None else o.base.stride()
        passes.append(_kept_forward(_key(o, s), x.stride(), base_stride, y.stride()))
        tensors = (x, o.base, y, o.A, o.B, o.router_weight, o.router_bias, u, g, o.seed)
        calls.append([0 if t is None else t.data_ptr() for t in tensors])
        outputs.append((y, u, g))
    _native.forward_siblings(passes, calls, torch.get_num_threads())
    return outputs


def backward_siblings(
    operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
) -> list[Gradients] | None:
    """The backward passes of mixtures that read the same x: the first one has the sum of the gradients of x. None as above."""
    x = operands[0].x
    if x.shape[0] <= _FEW_TOKENS:
        return None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0][0] else None
    passes, calls = [], []
    for o, s, n in zip(operands, settings, needs, strict=True):
        passes.append(_native_backward(_key(o, s), None if o.dy is None else o.dy.stride(), x.stride()))
        calls.append(backward_call(o, n, dx))
    _native.backward_siblings(passes, [addresses for addresses, _, _ in calls], torch.get_num_threads())
    return [grads._replace(x=None if j else dx) for j, (_, grads, _) in enumerate(calls)]

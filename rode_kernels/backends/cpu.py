"""The native CPU backend: hands pointers of torch tensors to the C++ core (`csrc/cpu`)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch  # before the native module: both then share torch's OpenMP runtime
from torch import Tensor

from rode_kernels.backends.reference import accumulation_dtype
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, Settings

try:
    import rode_kernels._native as _native
except ImportError as error:
    _native = None
    _why_not: ImportError | None = error
else:
    _why_not = None

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


@lru_cache(maxsize=1)
def status() -> tuple[bool, str]:
    """Whether native code is here, and a line that says what it runs with or why it is missing."""
    if _native is None:
        if isinstance(_why_not, ModuleNotFoundError):
            return False, (
                "no native code in this install (built with RODE_NATIVE=off or without a C++ compiler); "
                "reinstall with a compiler to get it"
            )
        return False, f"the native module does not load: {_why_not}"
    try:
        _native.set_isa(os.environ.get("RODE_CPU_ISA", ""))
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
        _warn_of_two_openmp_runtimes()
        threads = "OpenMP"
    return True, f"C++ with {_native.isa()} instructions, {threads}"


def _warn_of_two_openmp_runtimes() -> None:
    if not sys.platform.startswith("linux"):
        return
    with open("/proc/self/maps") as maps:
        files = {line.split()[-1] for line in maps if ".so" in line}
    runtimes = sorted(f for f in files if os.path.basename(f).startswith(("libgomp", "libomp", "libiomp")))
    if len(runtimes) > 1:
        warnings.warn(
            f"rode_kernels: {len(runtimes)} OpenMP runtimes in this process ({', '.join(runtimes)}); "
            "import torch first, or threads may be oversubscribed",
            RuntimeWarning,
            stacklevel=2,
        )


def scratch_bytes() -> int:
    """Bytes of scratch that the native kernels have used at a time at most, over all threads; up to 32 MiB of each thread's are
    kept for its next call. torch allocates everything else and counts it."""
    return 0 if _native is None else _native.scratch_bytes()


def _parameter(t: Tensor | None, x_dtype: torch.dtype) -> tuple[int, int, bool]:
    """Strides, and whether it is float32 beside a 16-bit x."""
    return (0, 0, False) if t is None else (*t.stride(), t.dtype != x_dtype)


def _key(operands: AnyOperands, settings: Settings) -> tuple:
    """Key of a native pass: all that it is made for, except the strides of activations."""
    x, A, B, router_weight = operands.x, operands.A, operands.B, operands.router_weight
    return (x.dtype, x.shape, B.shape[0], settings, *(_parameter(t, x.dtype) for t in (A, B, router_weight)))


def _problem(key: tuple) -> dict[str, Any]:
    dtype, (tokens, in_features), out_features, (mixture, dropout_p, dense), A, B, router = key
    return dict(
        dtype=_DTYPES[dtype],
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        ranks=mixture.ranks,
        scaling=mixture.scaling_with_dropout(dropout_p),
        dropout_p=dropout_p,
        dense=dense,
        A=(0, *A),
        B=(0, *B),
        router=(0, *router),
    )


def _native_forward(key: tuple, x: tuple, base: tuple | None, y: tuple) -> Callable:
    """The core's forward pass for one problem and one set of strides, to be called with addresses."""
    return _native.Forward(x=(0, *x), base=(0, *(base or (0, 0))), y=(0, *y), **_problem(key))


@lru_cache(maxsize=4096)
def _native_backward(key: tuple, dy: tuple | None, x: tuple) -> Callable:
    """The core's backward pass, like `_native_forward`."""
    return _native.Backward(dy=(0, *(dy or (0, 0))), x=(0, *x), **_problem(key))


@lru_cache(maxsize=4096)
def _forward_pass(
    key: tuple, x: tuple, base: tuple | None, inplace: bool, shape: tuple[int, ...]
) -> Callable[[tuple], tuple[Tensor, Tensor, Tensor]]:
    """The forward pass for one problem and one set of strides: a function of the operands. `shape`: of y."""
    dtype, (M, _), O, (mixture, _, _) = key[:4]
    R, N = mixture.total_rank, mixture.num_experts
    native = _native_forward(key, x, base, base if inplace else (O, 1))
    empty = torch.empty(0, dtype=dtype).new_empty
    empty_acc = torch.empty(0, dtype=accumulation_dtype(dtype)).new_empty
    threads = torch.get_num_threads

    def run(operands: tuple) -> tuple[Tensor, Tensor, Tensor]:
        x, A, B, router_weight, router_bias, gates, base, seed = operands
        y = base if inplace else empty(shape)
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
) -> Callable[[tuple], tuple[Tensor, Tensor, Tensor]]:
    """`forward`, decided for operands of these sizes, strides and dtypes.

    Args:
        shape: of y.

    Returns:
        A function of the operands, as a plain tuple, which is taken apart faster. Their x and base need not be flat; gates and the
        bias are contiguous and in the accumulation dtype.
    """
    base = None if operands.base is None else operands.base.stride()
    return _forward_pass(_key(operands, settings), operands.x.stride(), base, inplace, shape)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, see `reference.forward`; closed experts are skipped."""
    x, A, B, router_weight, router_bias, gates, base, seed = operands
    if gates is not None:
        gates = gates.contiguous()
    if router_bias is not None:
        router_bias = router_bias.to(accumulation_dtype(x.dtype)).contiguous()
    run = prepare(operands, settings, inplace, (x.shape[0], B.shape[0]))
    return run((x, A, B, router_weight, router_bias, gates, base, seed))


def prepare_backward(
    operands: ForwardOperands, settings: Settings, shape: tuple[int, ...]
) -> Callable[[BackwardOperands, tuple[bool, ...]], Gradients]:
    """`backward` after what `prepare` prepares, for a contiguous dy.

    Args:
        shape: of x, before it was made flat, and of its gradient.
    """
    ld_dy = (operands.B.shape[0], 1)
    return partial(
        _run_backward, _native_backward(_key(operands, settings), ld_dy, operands.x.stride()), shape
    )


def _run_backward(
    run: Callable, shape: tuple[int, ...], operands: BackwardOperands, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients by a native backward pass; dx in `shape`, each gradient in its parameter's dtype."""
    dy, dgates, x, u, g, A, B, router_weight, seed = operands
    need_x, need_A, need_B, need_router, need_bias, need_gates = needs
    M, R = u.shape
    empty = u.new_empty  # in the accumulation dtype, as u is
    if dgates is not None:
        dgates = dgates.to(u.dtype).contiguous()
    factors = empty(2 if need_B else 1, M, R)  # du, and v where dB is a sum of its rows
    dh = empty(g.shape)  # gradient of the router's logits, or of the gates where no router is
    dx = x.new_empty(shape) if need_x else None
    dA = A.new_empty(A.shape) if need_A else None
    dB = B.new_empty(B.shape) if need_B else None
    drouter_weight = router_weight.new_empty(router_weight.shape) if need_router else None
    drouter_bias = empty(g.shape[1]) if need_bias else None
    du = factors.data_ptr()
    run(
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
        torch.get_num_threads(),
    )
    return Gradients._make((dx, dA, dB, drouter_weight, drouter_bias, dh if need_gates else None))


def backward(operands: BackwardOperands, settings: Settings, needs: tuple[bool, ...]) -> Gradients:
    """The backward pass, see `reference.backward`; closed experts are skipped."""
    dy, x = operands.dy, operands.x
    run = _native_backward(_key(operands, settings), None if dy is None else dy.stride(), x.stride())
    return _run_backward(run, x.shape, operands, needs)

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
from rode_kernels.mixture import Mixture

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


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _layout(problem: tuple, A: tuple, B: tuple, router: tuple | None) -> dict[str, Any]:
    dtype, (tokens, in_features), out_features, ranks, scaling, dropout_p, dense = problem
    return dict(
        dtype=_DTYPES[dtype],
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        ranks=ranks,
        scaling=Mixture(ranks, scaling).scaling_with_dropout(dropout_p),
        dropout_p=dropout_p,
        dense=dense,
        A=(0, *A),
        B=(0, *B),
        router=(0, *(router or (0, 0, False))),
    )


@lru_cache(maxsize=4096)
def _prepared(
    problem: tuple, x: tuple, base: tuple | None, y: tuple, A: tuple, B: tuple, router: tuple | None
) -> Callable:
    """The core's forward pass for one problem and one set of strides, to be called with addresses."""
    return _native.Forward(
        x=(0, *x), base=(0, *(base or (0, 0))), y=(0, *y), **_layout(problem, A, B, router)
    )


@lru_cache(maxsize=4096)
def _prepared_backward(
    problem: tuple, dy: tuple | None, x: tuple, A: tuple, B: tuple, router: tuple | None
) -> Callable:
    return _native.Backward(dy=(0, *(dy or (0, 0))), x=(0, *x), **_layout(problem, A, B, router))


def _prepare(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    base: Tensor | None,
    y: Tensor,
    mixture: Mixture,
    dropout_p: float,
    dense: bool,
) -> Callable:
    return _prepared(
        (x.dtype, x.shape, B.shape[0], mixture.ranks, mixture.scaling, dropout_p, dense),
        *(None if t is None else t.stride() for t in (x, base, y)),
        *(None if t is None else (*t.stride(), t.dtype != x.dtype) for t in (A, B, router_weight)),
    )


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    gates: Tensor | None,
    base: Tensor | None,
    seed: Tensor | None,
    mixture: Mixture,
    dropout_p: float,
    dense: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; closed experts are skipped."""
    wide = accumulation_dtype(x.dtype)
    M, O = x.shape[0], B.shape[0]
    y = base if inplace else torch.empty(M, O, dtype=x.dtype, device=x.device)
    u = torch.empty(M, mixture.total_rank, dtype=wide, device=x.device)
    if router_weight is None:
        g, br = gates.contiguous(), None
    else:
        g = torch.empty(M, mixture.num_experts, dtype=wide, device=x.device)
        br = None if router_bias is None else router_bias.to(wide).contiguous()
    run = _prepare(x, A, B, router_weight, base, y, mixture, dropout_p, dense)
    run(
        x.data_ptr(),
        _address(base),
        y.data_ptr(),
        A.data_ptr(),
        B.data_ptr(),
        _address(router_weight),
        _address(br),
        u.data_ptr(),
        g.data_ptr(),
        _address(seed),
        torch.get_num_threads(),
    )
    return y, u, g


def prepare(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    base: Tensor | None,
    mixture: Mixture,
    dropout_p: float,
    inplace: bool,
    shape: tuple[int, ...],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`forward` with a router, decided for tensors of these sizes, strides and dtypes.

    Returns:
        A function of the operator's tensors. Its x and base need not be flat, its bias is contiguous and in the accumulation dtype;
        it gives y in `shape`.
    """
    M, O, R, N = x.shape[0], B.shape[0], mixture.total_rank, mixture.num_experts
    empty = torch.empty(0, dtype=x.dtype).new_empty
    empty_wide = torch.empty(0, dtype=accumulation_dtype(x.dtype)).new_empty
    y = base if inplace else empty(M, O)
    run = _prepare(x, A, B, router_weight, base, y, mixture, dropout_p, False)
    threads = torch.get_num_threads

    def prepared(x, A, B, router_weight, router_bias, _gates, base, seed):
        y = base if inplace else empty(*shape)
        u, g = empty_wide(M, R), empty_wide(M, N)
        run(
            x.data_ptr(),
            0 if base is None else base.data_ptr(),
            y.data_ptr(),
            A.data_ptr(),
            B.data_ptr(),
            router_weight.data_ptr(),
            0 if router_bias is None else router_bias.data_ptr(),
            u.data_ptr(),
            g.data_ptr(),
            0 if seed is None else seed.data_ptr(),
            threads(),
        )
        return y, u, g

    return prepared


def prepare_backward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    mixture: Mixture,
    dropout_p: float,
    shape: tuple[int, ...],
) -> Callable[..., list[Tensor | None]]:
    """`backward` of what `prepare` prepares, of a contiguous dy. `shape`: x's, before it was made flat.

    Returns:
        A function of dy, dgates or None, and of what was saved: x, u, g, A, B, router_weight, seed; and of `needs`. It gives what
        `backward` gives, dx in `shape`.
    """
    O = B.shape[0]
    run = _prepared_backward(
        (x.dtype, x.shape, O, mixture.ranks, mixture.scaling, dropout_p, False),
        (O, 1),
        x.stride(),
        *((*t.stride(), t.dtype != x.dtype) for t in (A, B, router_weight)),
    )
    return partial(_gradients, run, shape)


def _gradients(
    run: Callable,
    shape: tuple[int, ...],
    dy: Tensor | None,
    dgates: Tensor | None,
    x: Tensor,
    u: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    seed: Tensor | None,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """By the core's backward pass for these strides; dx in `shape`, each gradient in its parameter's dtype."""
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
    dWr = router_weight.new_empty(router_weight.shape) if need_router else None
    dbr = empty(g.shape[1]) if need_bias else None
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
        0 if dWr is None else dWr.data_ptr(),
        0 if dbr is None else dbr.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        torch.get_num_threads(),
    )
    return [dx, dA, dB, dWr, dbr, dh if need_gates else None]


def backward(
    dy: Tensor | None,
    dgates: Tensor | None,
    x: Tensor,
    u: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    seed: Tensor | None,
    mixture: Mixture,
    dropout_p: float,
    dense: bool,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """As `reference.backward`, each gradient in its parameter's dtype; closed experts are skipped."""
    run = _prepared_backward(
        (x.dtype, x.shape, B.shape[0], mixture.ranks, mixture.scaling, dropout_p, dense),
        *(None if t is None else t.stride() for t in (dy, x)),
        *(None if t is None else (*t.stride(), t.dtype != x.dtype) for t in (A, B, router_weight)),
    )
    return _gradients(run, x.shape, dy, dgates, x, u, g, A, B, router_weight, seed, needs)

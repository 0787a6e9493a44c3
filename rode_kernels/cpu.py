"""The native CPU backend: hands pointers of torch tensors to the C++ core (`csrc/cpu`)."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch  # before the native module: both then share torch's OpenMP runtime
from torch import Tensor

from rode_kernels.mixture import Mixture
from rode_kernels.reference import accumulation_dtype

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


def _strided(t: Tensor | None) -> tuple[int, int, int]:
    """(address, row stride, column stride) of a 2-D tensor; strides in elements."""
    return (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), t.stride(1))


def _weight(t: Tensor | None, x: Tensor) -> tuple[int, int, int, bool]:
    """As `_strided`, and whether it is wider than x: the core rounds it."""
    return (*_strided(t), t is not None and t.dtype != x.dtype)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@lru_cache(maxsize=4096)
def _prepared(
    problem: tuple, x: tuple, base: tuple | None, y: tuple, A: tuple, B: tuple, router: tuple | None
) -> Callable:
    """The core's forward pass for one problem and one set of strides, to be called with addresses."""
    dtype, (tokens, in_features), out_features, ranks, scaling, dropout_p, dense = problem
    return _native.Forward(
        dtype=_DTYPES[dtype],
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        ranks=ranks,
        scaling=Mixture(ranks, scaling).scaling_with_dropout(dropout_p),
        dropout_p=dropout_p,
        dense=dense,
        x=(0, *x),
        base=(0, *(base or (0, 0))),
        y=(0, *y),
        A=(0, *A),
        B=(0, *B),
        router=(0, *(router or (0, 0, False))),
    )


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


def _problem(
    x: Tensor, out_features: int, mixture: Mixture, seed: Tensor | None, dropout_p: float, dense: bool
):
    return _native.Problem(
        dtype=_DTYPES[x.dtype],
        tokens=x.shape[0],
        in_features=x.shape[1],
        out_features=out_features,
        ranks=mixture.ranks,
        scaling=mixture.scaling_with_dropout(dropout_p),
        dropout_p=dropout_p,
        seed=_address(seed),
        dense=dense,
        threads=torch.get_num_threads(),
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
    inplace: bool,
    shape: tuple[int, ...],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`forward` with a router and without dropout, decided for tensors of these sizes, strides and dtypes.

    Returns:
        A function of the operator's tensors. Its x and base need not be flat, its bias is contiguous and in the accumulation dtype;
        it gives y in `shape`.
    """
    M, O, R, N = x.shape[0], B.shape[0], mixture.total_rank, mixture.num_experts
    empty = torch.empty(0, dtype=x.dtype).new_empty
    empty_wide = torch.empty(0, dtype=accumulation_dtype(x.dtype)).new_empty
    run = _prepare(x, A, B, router_weight, base, base if inplace else empty(M, O), mixture, 0.0, False)
    threads = torch.get_num_threads

    def prepared(x, A, B, router_weight, router_bias, _gates, base, _seed):
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
            0,
            threads(),
        )
        return y, u, g

    return prepared


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
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`; closed experts are skipped."""
    need_x, need_A, need_B, need_router, need_bias, need_gates = needs
    (M, K), O, R, N = x.shape, B.shape[0], mixture.total_rank, mixture.num_experts

    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return u.new_empty(shape) if wanted else None  # in the accumulation dtype, as u is

    dgates = None if dgates is None else dgates.to(u.dtype).contiguous()
    v, du = empty(need_B, M, R), empty(True, M, R)
    dh = empty(True, M, N)  # gradient of the router's logits, or of the gates where no router is
    dx = x.new_empty(M, K) if need_x else None
    dA, dB, dWr, dbr = (
        empty(need_A, R, K),
        empty(need_B, O, R),
        empty(need_router, N, K),
        empty(need_bias, N),
    )
    _native.backward(
        _problem(x, O, mixture, seed, dropout_p, dense),
        _strided(dy),
        _strided(x),
        _strided(dx),
        _address(dgates),
        _address(u),
        _address(g),
        _weight(A, x),
        _weight(B, x),
        _weight(router_weight, x),
        _address(v),
        _address(du),
        _address(dh),
        _address(dA),
        _address(dB),
        _address(dWr),
        _address(dbr),
    )
    return dx, dA, dB, dWr, dbr, dh if need_gates else None

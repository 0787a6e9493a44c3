"""The CUDA backend: hands device pointers of torch tensors to the kernels in `csrc/cuda`, on torch's current stream.

`Kernels` is what the real device and the emulated one (`cuda_emulated`) have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from rode_kernels.cost import Call
from rode_kernels.gpu import beyond_kernels, tf32_allowed, with_neighbouring_columns
from rode_kernels.mixture import Mixture
from rode_kernels.plan import BackwardPlan, Plan, column_tiles, plan_backward, plan_forward

try:
    import rode_kernels._cuda as _native
except ImportError as error:
    _native = None
    _why_not: ImportError | None = error
else:
    _why_not = None

_DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(t: Tensor | None) -> tuple[int, int]:
    """(address, distance of rows in elements) of a 2-D tensor whose columns are neighbours."""
    if t is None:
        return (0, 0)
    only = -(-t.shape[1] // 8) * 8  # one row has no distance to another: one that allows wide copies
    return (t.data_ptr(), t.stride(0) if t.shape[0] > 1 else only)


class Kernels:
    """Both passes on one native module.

    Args:
        native: the compiled module, `_cuda` or `_cuda_emulated`.
    """

    def __init__(self, native: ModuleType | None):
        self.native = native

    def forward(
        self,
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
        *,
        plan: Plan,
        device: int,
        stream: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `reference.forward`, by the kernels that `plan` names. Everything that they write is allocated here."""
        M, O, R, N = x.shape[0], B.shape[0], mixture.total_rank, mixture.num_experts
        plan.check(R, N if router_weight is not None else 0, x.element_size())
        x = with_neighbouring_columns(x)
        into = base if inplace else None
        base = None if base is None else with_neighbouring_columns(base)
        y = base if inplace else self.empty(M, O, like=x)
        u = self.empty(M, R, like=x, dtype=torch.float32)
        routed = router_weight is not None
        g = self.empty(M, N, like=x, dtype=torch.float32) if routed else gates.contiguous()
        partial = None
        if not plan.fused:
            tiles = column_tiles(R, N if routed else 0)
            partial = self.empty(plan.splits, M, 8 * tiles, like=x, dtype=torch.float32)
        problem = self._problem(x, O, mixture, dropout_p, dense)
        if M > 0:
            A, router_weight, B = self._in_dtype(problem, x, A, router_weight, B, device, stream)
            bias = None if router_bias is None else router_bias.float().contiguous()
            self.native.forward(
                problem=problem,
                x=_rows(x),
                base=_rows(base),
                y=_rows(y),
                A=_address(A),
                router=_address(router_weight),
                B=_address(B),
                ld_A=A.shape[1],
                ld_B=B.shape[1],
                bias=_address(bias),
                gates=0 if routed else _address(g),
                u=_address(u),
                g=_address(g) if routed else 0,
                partial=_address(partial),
                seed=_address(seed),
                fast=tf32_allowed(),
                fused=plan.fused,
                rows=plan.rows,
                splits=plan.splits,
                out_tiles=plan.out_tiles,
                device=device,
                stream=stream,
            )
        if into is not None and into is not base:  # its columns were not neighbours
            into.copy_(y)
            y = into
        return y, u, g

    def backward(
        self,
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
        *,
        plan: BackwardPlan,
        device: int,
        stream: int,
    ) -> tuple[Tensor | None, ...]:
        """As `reference.backward`, by the kernels that `plan` names. Everything that they write is allocated here."""
        need_x, need_A, need_B, need_router, need_bias, need_gates = needs
        (M, K), O, R, N = x.shape, B.shape[0], mixture.total_rank, mixture.num_experts
        plan.check(x.element_size())
        if M == 0 or not any(needs):
            return tuple(
                like.new_zeros(shape) if needed else None
                for needed, like, shape in zip(
                    needs,
                    (x, A, B, router_weight, g, g),
                    ((M, K), (R, K), (O, R), (N, K), (N,), (M, N)),
                    strict=True,
                )
            )
        x = with_neighbouring_columns(x)
        dtypes = [None if t is None else t.dtype for t in (A, router_weight, B)]
        problem = self._problem(x, O, mixture, dropout_p, dense)
        A, router_weight, B = self._in_dtype(problem, x, A, router_weight, B, device, stream)
        of_y = dy is not None
        sums_x = need_A or need_router
        routed = router_weight is not None
        tiles, groups = -(-R // 8), -(-R // 16) + (-(-N // 16) if routed else 0)
        ranges_y, ranges_x = -(-M // plan.share_y), -(-M // plan.share_x)

        def floats(needed: bool, *shape: int) -> Tensor | None:
            return self.empty(*shape, like=x, dtype=torch.float32) if needed else None

        def gradient(needed: bool, rows: int, columns: int, dtype: torch.dtype | None) -> Tensor | None:
            return self.empty(rows, columns, like=x, dtype=dtype) if needed else None

        need_v = need_x or sums_x or need_bias or need_gates
        dx = gradient(need_x, M, K, x.dtype)
        dA = gradient(need_A, R, K, dtypes[0])
        dW = gradient(need_router, N, K, dtypes[1])
        dB = gradient(need_B and of_y, O, R, dtypes[2])
        dbias, dh = floats(need_bias, N), floats(need_v, M, N)
        D = self.empty(M, 16 * groups, like=x) if need_v else None
        open_ = self.empty(-(-M // 16), like=x, dtype=torch.int32) if need_v else None
        t = floats(need_v and of_y, plan.slabs, -(-M // 16), tiles, 128)
        of_B = floats(need_B and of_y, ranges_y, O, 8 * tiles)
        of_A = floats(sums_x, ranges_x, 16 * groups, -(-K // 8) * 8)
        of_bias = floats(need_bias, -(-M // 16), N)
        dgates = None if dgates is None else dgates.contiguous()
        if of_y and dy.stride() == (
            0,
            0,
        ):  # one value, of a sum's gradient: a row of it can be copied 16 bytes at a time
            dy = dy[:1].contiguous().expand(M, O)

        def of(gradient: Tensor | None) -> tuple[int, bool]:
            return _address(gradient), gradient is not None and gradient.dtype != x.dtype

        self.native.backward(
            problem=problem,
            dy=(_address(dy), *(dy.stride() if of_y else (0, 0))),
            x=_rows(x),
            A=_address(A),
            router=_address(router_weight),
            B=_address(B),
            ld_A=A.shape[1],
            ld_B=B.shape[1],
            u=_address(u),
            g=_address(g),
            dgates=_address(dgates),
            seed=_address(seed),
            dx=_address(dx),
            dA=of(dA),
            dW=of(dW),
            dB=of(dB),
            dbias=_address(dbias),
            dh=_address(dh),
            D=_address(D),
            open=_address(open_),
            t=_address(t),
            of_B=_address(of_B),
            of_A=_address(of_A),
            of_bias=_address(of_bias),
            fast=tf32_allowed(),
            device=device,
            stream=stream,
            **asdict(plan),
        )
        if need_B and dB is None:
            dB = B.new_zeros(O, R, dtype=dtypes[2])
        return dx, dA, dB, dW, dbias, dh if need_gates else None

    def _problem(self, x: Tensor, out_features: int, mixture: Mixture, dropout_p: float, dense: bool):
        return self.native.Problem(
            dtype=_DTYPES[x.dtype],
            tokens=x.shape[0],
            in_features=x.shape[1],
            out_features=out_features,
            ranks=mixture.ranks,
            scaling=mixture.scaling_with_dropout(dropout_p),
            dropout_p=dropout_p,
            dense=dense,
        )

    def _in_dtype(self, problem, x, A, router_weight, B, device, stream):
        """Parameters in x's dtype, (R, K'), (N, K'), (O, R'): as they are, or float32 ones cast in one launch and padded to 8."""
        given = [t for t in (A, router_weight, B) if t is not None]
        if all(t.dtype == x.dtype for t in given):
            return tuple(None if t is None else t.contiguous() for t in (A, router_weight, B))
        A, router_weight, B = (None if t is None else t.float().contiguous() for t in (A, router_weight, B))
        (R, K), O = A.shape, B.shape[0]
        N = 0 if router_weight is None else router_weight.shape[0]
        pitch_K, pitch_R = -(-K // 8) * 8, -(-R // 8) * 8
        room = self.empty((R + N) * pitch_K + O * pitch_R, like=x)
        to_A, to_router, to_B = room.split([R * pitch_K, N * pitch_K, O * pitch_R])
        self.native.cast_parameters(
            problem,
            _address(A),
            _address(router_weight),
            _address(B),
            _address(to_A),
            _address(to_router),
            _address(to_B),
            device,
            stream,
        )
        router = None if router_weight is None else to_router.view(N, pitch_K)
        return to_A.view(R, pitch_K), router, to_B.view(O, pitch_R)

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or like.dtype, device=like.device)


@lru_cache(maxsize=1)
def status() -> tuple[bool, str]:
    """Whether the kernels can run here, and a line that says what they run with or why they cannot."""
    if _native is None:
        if isinstance(_why_not, ModuleNotFoundError):
            return False, "built without nvcc, or with RODE_CUDA=off; reinstall where nvcc is to get it"
        return False, f"the native module does not load: {_why_not}"
    if torch.version.hip:
        return False, "this torch is for AMD GPUs"
    built, driver = _native.runtime_version(), _native.driver_version()
    needs = f"built with CUDA {built // 1000}.{built % 1000 // 10} for sm_{_native.ARCHITECTURES.replace(',', ', sm_')}"
    if driver == 0:
        return False, f"no NVIDIA driver here ({needs})"
    if driver // 1000 < built // 1000:
        return False, f"the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, too old ({needs})"
    if not torch.cuda.is_available():
        return False, f"this torch sees no CUDA device ({needs})"
    return True, needs


def serves(architectures: Sequence[int], major: int, minor: int) -> bool:
    """Whether code for these compute capabilities (80 for 8.0) runs on a device: that of its generation up to its own, or the
    newest one's PTX, which a driver compiles for what came after."""
    return max(architectures) <= 10 * major + minor or any(
        a // 10 == major and a % 10 <= minor for a in architectures
    )


@lru_cache
def _device_refusal(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if serves([int(a) for a in _native.ARCHITECTURES.split(",")], properties.major, properties.minor):
        return ""
    return (
        f"the CUDA kernels were built for sm_{_native.ARCHITECTURES.replace(',', ', sm_')}, "
        f"cuda:{device} ({properties.name}) is sm_{properties.major}{properties.minor}"
    )


def refuses(x: Tensor, out_features: int, mixture: Mixture) -> str:
    """Why these kernels cannot serve a call on x's device; empty where they can."""
    return _device_refusal(x.device.index) or beyond_kernels(x, out_features, mixture)


@lru_cache
def _multiprocessors(device: int) -> int:
    """Prepares a device, once: asks for its size, and loads the kernels, which a stream capture must not surround."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"rode_kernels: the first call on cuda:{device} loads the kernels and cannot be captured; call once before"
        )
    _native.load_kernels(device)
    return torch.cuda.get_device_properties(device).multi_processor_count


_kernels = Kernels(_native)


def call(x: Tensor, B: Tensor, router_weight: Tensor | None, mixture: Mixture) -> Call:
    """What plans are made from, but for the device. Not whether base is there or y in place: the bits may not depend on it."""
    sizes = (*x.shape, B.shape[0], mixture.total_rank, mixture.num_experts, x.element_size())
    return Call(*sizes, routed=router_weight is not None)


def forward(x, A, B, router_weight, router_bias, gates, base, seed, mixture, dropout_p, dense, inplace):
    """As `reference.forward`; closed experts are skipped by tile."""
    device = x.device.index
    args = (x, A, B, router_weight, router_bias, gates, base, seed, mixture, dropout_p, dense, inplace)
    with torch.cuda.device(device):  # the native runtime makes it current, and this gives it back
        plan = plan_forward(call(x, B, router_weight, mixture), _multiprocessors(device))
        stream = torch.cuda.current_stream(device).cuda_stream
        return _kernels.forward(*args, plan=plan, device=device, stream=stream)


def backward(dy, dgates, x, u, g, A, B, router_weight, seed, mixture, dropout_p, dense, needs):
    """As `reference.backward`; closed experts are skipped by tile."""
    device = x.device.index
    args = (dy, dgates, x, u, g, A, B, router_weight, seed, mixture, dropout_p, dense, needs)
    with torch.cuda.device(device):
        plan = plan_backward(call(x, B, router_weight, mixture), _multiprocessors(device))
        stream = torch.cuda.current_stream(device).cuda_stream
        return _kernels.backward(*args, plan=plan, device=device, stream=stream)

"""Common parts of the GPU backends: their limits, the strides they take, and the layout that a pass is prepared for."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rode_kernels.backends.gpu.plans import MAX_EXPERTS, MAX_FEATURES, MAX_RANK, MAX_TOKENS, ProblemShape
from rode_kernels.mixture import Mixture
from rode_kernels.operands import AnyOperands, BackwardOperands, Gradients, MaybeTensor, Settings
from rode_kernels.passes import Needs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """The shapes, dtypes and settings that a pass is prepared for.

    Attributes:
        dtype: of x.
        shape: leaves out base and in-place writes, on which the bits may not depend.
        params_fp32: whether A, router weight and B are float32 beside a 16-bit x.
    """

    dtype: torch.dtype
    shape: ProblemShape
    settings: Settings
    params_fp32: tuple[bool, bool, bool]

    @classmethod
    def of(cls, operands: AnyOperands, settings: Settings) -> Self:
        x, A, B, router_weight = operands.x, operands.A, operands.B, operands.router_weight
        *leading, in_features = x.shape
        sizes = (prod(leading), in_features, B.shape[0])
        experts = (settings.mixture.total_rank, settings.mixture.num_experts)
        routed, dropout = router_weight is not None, settings.dropout_p > 0.0
        shape = ProblemShape(*sizes, *experts, x.element_size(), routed=routed, dropout=dropout)
        router_fp32 = router_weight is not None and router_weight.dtype != x.dtype
        return cls(x.dtype, shape, settings, (A.dtype != x.dtype, router_fp32, B.dtype != x.dtype))


def beyond_kernels(x: Tensor, out_features: int, mixture: Mixture) -> str:
    """Why the kernels, on whatever device, cannot serve a call; empty where they can."""
    if x.dtype not in DTYPES:
        return f"the GPU kernels take float32, float16 and bfloat16, got {x.dtype}"
    tokens, features = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    for name, value, least, most in (
        ("in_features", features, 1, MAX_FEATURES),
        ("out_features", out_features, 1, MAX_FEATURES),
        ("sum(ranks)", mixture.total_rank, 1, MAX_RANK),
        ("len(ranks)", mixture.num_experts, 1, MAX_EXPERTS),
        ("tokens", tokens, 0, MAX_TOKENS),
    ):
        if not least <= value <= most:
            return f"the GPU kernels take {name} from {least} to {most}, got {value}"
    return ""


def with_neighbouring_columns(t: MaybeTensor) -> MaybeTensor:
    """The matrix with column stride 1 and a row stride below 2^31, as the kernels need it: itself or a copy."""
    if t is None or ((t.shape[1] == 1 or t.stride(1) == 1) and t.stride(0) < 2**31):
        return t
    return t.contiguous()


def no_gradients(operands: BackwardOperands, needs: Needs) -> Gradients:
    """Zeros where something is wanted: the gradients of a call without tokens."""
    _, _, x, _, g, A, B, router_weight, _ = operands
    like = (x, A, B, router_weight, g.new_empty(g.shape[1:]), g)
    return Gradients(
        *(
            t.new_zeros(t.shape) if need and t is not None else None
            for need, t in zip(needs, like, strict=True)
        )
    )


def tf32_allowed() -> bool:
    """Whether torch may round float32 products to tf32: `torch.set_float32_matmul_precision` and newer forms; off by default."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9 on
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")

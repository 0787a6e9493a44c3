"""Common parts of the GPU backends: their limits, the strides they take, and the layout that a pass is prepared for."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from rode_kernels.backends.gpu.plans import MAX_EXPERTS, MAX_FEATURES, MAX_RANK, MAX_TOKENS, ProblemShape
from rode_kernels.mixture import Mixture
from rode_kernels.operands import AnyOperands, BackwardOperands, Gradients, Settings

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """The shapes, dtypes and settings that a pass is prepared for.

    Attributes:
        tokens, in_features, out_features: M, K, O.
        params_fp32: whether A, router weight and B are float32 beside a 16-bit x.
        routed: there is a router; otherwise gates are given.
        dense: u and the gates' gradients are wanted where gates are 0 too.
    """

    dtype: torch.dtype
    tokens: int
    in_features: int
    out_features: int
    mixture: Mixture
    dropout_p: float
    params_fp32: tuple[bool, bool, bool]
    routed: bool
    dense: bool

    @staticmethod
    def of(operands: AnyOperands, settings: Settings) -> Layout:
        x, router_weight, B = operands.x, operands.router_weight, operands.B
        params_fp32 = tuple(t is not None and t.dtype != x.dtype for t in (operands.A, router_weight, B))
        *leading, in_features = x.shape
        sizes = (prod(leading), in_features, B.shape[0])
        return Layout(
            x.dtype,
            *sizes,
            settings.mixture,
            settings.dropout_p,
            params_fp32,
            router_weight is not None,
            settings.dense,
        )

    @property
    def in_one_type(self) -> bool:
        return not any(self.params_fp32)

    @property
    def problem_shape(self) -> ProblemShape:
        """The shapes that plans are made from. They leave out base and in-place writes, on which the bits may not depend."""
        sizes = (self.tokens, self.in_features, self.out_features)
        experts = (self.mixture.total_rank, self.mixture.num_experts)
        return ProblemShape(
            *sizes, *experts, self.dtype.itemsize, routed=self.routed, dropout=self.dropout_p > 0.0
        )


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


def with_neighbouring_columns(t: Tensor) -> Tensor:
    """The matrix with column stride 1 and a row stride below 2^31, as the kernels need it: itself or a copy."""
    return t if (t.shape[1] == 1 or t.stride(1) == 1) and t.stride(0) < 2**31 else t.contiguous()


def no_gradients(operands: BackwardOperands, needs: tuple[bool, ...]) -> Gradients:
    """Zeros where something is wanted: the gradients of a call without tokens."""
    _, _, x, _, g, A, B, router_weight, _ = operands
    likes = (x, A, B, router_weight, g, g)
    shapes = (
        x.shape,
        A.shape,
        B.shape,
        None if router_weight is None else router_weight.shape,
        g.shape[1:],
        g.shape,
    )
    return Gradients(
        *(
            like.new_zeros(shape) if need else None
            for need, like, shape in zip(needs, likes, shapes, strict=True)
        )
    )


def tf32_allowed() -> bool:
    """Whether torch may round float32 products to tf32: `torch.set_float32_matmul_precision` and newer forms; off by default."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"

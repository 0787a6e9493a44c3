"""The tensors and settings of a call: what every layer from the public functions down to the backends hands on.

M tokens (all leading dimensions), K = in_features, O = out_features, N experts, R = sum(ranks). The accumulation dtype is
float32, and float64 for a float64 x.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

from rode_kernels.mixture import Mixture


class ForwardOperands(NamedTuple):
    """Tensors of a forward call, in the operator's order.

    Attributes:
        x: (..., K), in float64, float32, float16 or bfloat16. Backends get (M, K).
        A: (R, K). B: (O, R). router_weight: (N, K), or None where gates are given. Each in x's dtype, or float32 beside a
            16-bit x.
        router_bias: (N,), in a dtype that A may have, or None. Backends get it contiguous and in the accumulation dtype.
        gates: (..., N), or None where a router is given. Backends get (M, N), contiguous and in the accumulation dtype.
        base: (..., O) in x's dtype, or None. Backends get (M, O).
        seed: (1,), int64, or None without dropout.
    """

    x: Tensor
    A: Tensor
    B: Tensor
    router_weight: Tensor | None
    router_bias: Tensor | None
    gates: Tensor | None
    base: Tensor | None
    seed: Tensor | None


class BackwardOperands(NamedTuple):
    """Tensors of a backward call, in the operator's order. From x on they are what autograd saved.

    Attributes:
        dy: (..., O) in x's dtype with any strides, or None where no gradient reaches y. Backends get (M, O).
        dgates: (M, N), the gradient that reaches the returned gates, or None. Backends get it like gates.
        u: (M, R) in the accumulation dtype, 0 for closed experts unless the call is dense.
        g: (M, N) in the accumulation dtype.
        x, A, B, router_weight, seed: as in `ForwardOperands`.
    """

    dy: Tensor | None
    dgates: Tensor | None
    x: Tensor
    u: Tensor
    g: Tensor
    A: Tensor
    B: Tensor
    router_weight: Tensor | None
    seed: Tensor | None


MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
"""For functions of a tensor that give None for None."""

AnyOperands = ForwardOperands | BackwardOperands  # both have x, A, B and router_weight


class Gradients(NamedTuple):
    """Gradients of a call. None: not wanted.

    Attributes:
        x, A, B, router_weight: in the shape and dtype of the tensor itself.
        router_bias: (N,), gates: (M, N), both in the accumulation dtype.
    """

    x: Tensor | None
    A: Tensor | None
    B: Tensor | None
    router_weight: Tensor | None
    router_bias: Tensor | None
    gates: Tensor | None


class Settings(NamedTuple):
    """Everything but tensors that decides a call.

    Attributes:
        dropout_p: probability with which elements of the experts' input are dropped.
        dense: u and the gates' gradients are wanted for closed experts too (`gate_grad="all"`).
    """

    mixture: Mixture
    dropout_p: float
    dense: bool

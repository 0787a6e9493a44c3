"""The least work of a call: operations that its open gates ask for, and bytes moved once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import PASSES
from rode_kernels.backends.gpu.cost import fewest
from rode_kernels.backends.gpu.plans import ProblemShape


@dataclass(frozen=True)
class Work:
    """`operations`: a multiplication and an addition are two."""

    operations: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)


def work(
    is_open: Tensor,
    ranks: Sequence[int],
    in_features: int,
    out_features: int,
    element_size: int,
    parameter_size: int | None = None,
) -> dict[str, Work]:
    """The work of each pass, whoever runs it.

    Operations: the router for all tokens, an expert's products for tokens that open it. Bytes: x, base, dy and what is made of them
    once, but not the rows of x, dy and of a base in place that no open expert wants; the weights of experts that any token opens;
    every gradient; u and g, which backward reads, in float32.

    Args:
        is_open: (M, N) bool, the gates that are not 0. element_size: bytes of x's type.
        parameter_size: bytes of the parameters' type; None if it is x's.
    """
    (M, N), K, O, e = is_open.shape, in_features, out_features, element_size
    of_parameter = parameter_size or e
    rank = torch.tensor(ranks, device=is_open.device)
    pairs = int(is_open.sum())
    open_ranks = int((is_open * rank).sum())  # over all tokens
    idle = M - int(is_open.any(1).sum())  # tokens without an open expert
    used, R = int(rank[is_open.any(0)].sum()), int(rank.sum())
    call = ProblemShape(M, K, O, used, N, e)
    saved = 4 * M * (R + N)  # u and g
    more = (of_parameter - e) * ((used + N) * K + O * used)  # `fewest` takes weights for as small as x
    forward = Work(2.0 * M * N * K + 2.0 * open_ranks * (K + O), fewest(call) + more + saved)
    gradients = of_parameter * ((R + N) * K + O * R)
    unread = e * idle * (K + O)
    backward = Work(
        4.0 * open_ranks * (K + O) + 4.0 * pairs * K,  # twice each product; the router's for open gates
        fewest(call, backward=True) + more + saved + gradients - unread,
    )
    in_place = Work(forward.operations, forward.bytes - 2 * e * idle * O)
    return dict(
        zip(PASSES, (forward, in_place, backward, forward + backward, in_place + backward), strict=True)
    )

"""The operation as users of plain PyTorch write it, which the kernels are measured against.

Shapes are those of `rode_kernels.backends.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def drop(x: Tensor, p: float, keep: Tensor | None = None) -> Tensor:
    """Dropout of x. `keep` is a mask of x's shape that takes the place of a random one, so that results can be compared."""
    if not p:
        return x
    return F.dropout(x, p) if keep is None else torch.where(keep, x, 0.0) / (1 - p)


def peft_loop(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor,
    base: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """A loop over LoRA layers, as PEFT's adapters are written: result = result + lora_B(lora_A(drop(x))) * (scaling * gate).

    Parameters of another dtype than x's are converted, as autocast does. `dropout`, `keep`: see `drop`.
    """
    A, B, router = (t.to(x.dtype) for t in (A, B, router))
    gates = torch.relu(x @ router.t())  # (M, N)
    x = drop(x, dropout, keep)
    y, start = base, 0
    for i, (rank, factor) in enumerate(zip(ranks, scaling, strict=True)):
        rows = slice(start, start + rank)
        y = y + (x @ A[rows].t() @ B[:, rows].t()) * (factor * gates[:, i, None])
        start += rank
    return y


def packed(
    x: Tensor,
    down: Tensor,
    B: Tensor,
    factors: Tensor,
    expert: Tensor,
    base: Tensor,
    inplace: bool = False,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """The best that plain PyTorch has: two products for all experts, B's added to base, or into it.

    Dropout (see `drop`) costs a third product, because the router sees all of x. Parameters of another dtype than x's are
    converted, as autocast does.

    Made once, not at each call: `down` (R + N, K), A and the router's weights side by side; `factors` (R,), each column's scaling;
    `expert` (R,), whose it is.
    """
    R = B.shape[1]
    down, B = down.to(x.dtype), B.to(x.dtype)
    if dropout:
        u, h = drop(x, dropout, keep) @ down[:R].t(), x @ down[R:].t()
    else:
        both = x @ down.t()  # (M, R + N)
        u, h = both[:, :R], both[:, R:]
    gates = torch.relu(h)
    v = u * gates[:, expert] * factors  # (M, R)
    return base.addmm_(v, B.t()) if inplace else torch.addmm(base, v, B.t())


class BytesMoved(TorchDispatchMode):
    """Counts what operators must move: each reads its tensors once and writes its results once; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket is torch.ops.aten.empty:
            return result
        flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.bytes += sum(_distinct_bytes(t) for t in flat if isinstance(t, Tensor))
        self.launches += 1
        return result


def _distinct_bytes(t: Tensor) -> int:
    """The number of its elements, those repeated by stride 0 counted once."""
    count = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * t.element_size()

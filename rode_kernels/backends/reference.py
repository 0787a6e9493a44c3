"""The operation in plain PyTorch: the formula of the paper, on any device, in any floating dtype.

`forward` is built from differentiable operations, so autograd through it checks `backward`, which states the gradients by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rode_kernels.mixture import Mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs


def status() -> tuple[bool, str]:
    """Always available."""
    return True, "plain PyTorch; slow and exact, the oracle of the tests"


def refuses(x: Tensor, out_features: int, mixture: Mixture) -> str:
    return ""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Products accumulate in float32, and in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(weight: Tensor, like: torch.dtype) -> Tensor:
    """A parameter rounded once to the dtype of x, held in the accumulation dtype."""
    return weight.to(like).to(accumulation_dtype(like))


_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _multiply_32x32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, where int64 has no room for the unsigned product."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    total = low + ((high & 0xFFFF) << 16)  # < 2^50
    return (high >> 16) + (total >> 32), total & _MASK32


def philox(counter: Tensor, key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) for counters (lo, hi, 0, 0).

    Args:
        counter: int64 tensor, the low 64 bits of the counter, non-negative.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of counter's shape, each word in [0, 2^32).
    """
    c = [counter & _MASK32, (counter >> 32) & _MASK32, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply_32x32(_MULTIPLIERS[0], c[0])
        hi1, lo1 = _multiply_32x32(_MULTIPLIERS[1], c[2])
        c = [hi1 ^ c[1] ^ k0, lo1, hi0 ^ c[3] ^ k1, lo0]
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c


def dropout_keep(seed: Tensor, dropout_p: float, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """The elements that dropout keeps: bool (rows, columns), the same bits on every backend.

    Element e = m K + k uses word e & 3 of the counter e >> 2 and stays where the word is at least floor(p 2^32).
    """
    value = int(seed.item())
    key = (value & _MASK32, (value >> 32) & _MASK32)
    element = torch.arange(first_row * columns, (first_row + rows) * columns, device=seed.device)
    first = element[:1] >> 2 if rows * columns else element
    count = (int(element[-1]) >> 2) - int(first) + 1 if rows * columns else 0
    words = torch.stack(philox(first + torch.arange(count, device=seed.device), key), dim=-1).reshape(-1)
    keep = words >= int(dropout_p * 2.0**32)
    return keep[element - 4 * first].reshape(rows, columns)


def _drop(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
    """y = base + sum_i scaling_i g_i B_i A_i drop(x), with g = relu(x Wr^T + br) or as given.

    Args:
        inplace: base may be overwritten and returned as y.

    Returns:
        y (M, O) in x.dtype; u (M, R) = drop(x) A^T, 0 where not wanted; g (M, N); u and g in the accumulation dtype.
    """
    x, A, B, router_weight, router_bias, gates, base, seed = operands
    mixture, dropout_p, dense = settings
    acc_dtype = accumulation_dtype(x.dtype)
    x_acc = x.to(acc_dtype)
    if router_weight is not None:
        h = x_acc @ rounded(router_weight, x.dtype).t()  # (M, N)
        if router_bias is not None:
            h = h + router_bias
        g = torch.relu(h)
    elif gates is not None:
        g = gates
    keep = None if seed is None else dropout_keep(seed, dropout_p, *x.shape)
    x_dropped = _drop(x_acc, keep)
    u = x_acc.new_zeros(x.shape[0], mixture.total_rank)
    y = x_acc.new_zeros(x.shape[0], B.shape[0]) if base is None else base.to(acc_dtype)
    offsets, scaling = mixture.offsets, mixture.scaling_with_dropout(dropout_p)
    A_acc, B_acc = rounded(A, x.dtype), rounded(B, x.dtype)
    for i in range(mixture.num_experts):
        rows = slice(offsets[i], offsets[i + 1])
        open_ = (g[:, i] != 0).nonzero().squeeze(1)  # closed tokens are left out, not multiplied by 0
        u_open = x_dropped[open_] @ A_acc[rows].t()  # (open, r_i)
        v = (scaling[i] * g[open_, i, None] * u_open).to(x.dtype).to(acc_dtype)
        y = y.index_add(0, open_, v @ B_acc[:, rows].t())
        u_saved = x_dropped @ A_acc[rows].t() if dense else u_open
        u[:, rows] = u_saved if dense else u[:, rows].index_copy(0, open_, u_saved)
    return y.to(x.dtype), u, g


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The gradients that `needs` asks for. With `dense`, gates get scaling_i <t_i, u_i> where they are closed too."""
    grads = _backward(operands, settings, needs)
    return grads if grads.x is None else grads._replace(x=grads.x.to(operands.x.dtype))


def _backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """`backward`, with dx in the accumulation dtype."""
    dy, dgates, x, u, g, A, B, router_weight, seed = operands
    mixture, dropout_p, dense = settings
    need_x, need_A, need_B, need_router, need_bias, need_gates = needs
    acc_dtype = accumulation_dtype(x.dtype)
    M, K = x.shape
    x_acc = x.to(acc_dtype)
    keep = None if seed is None else dropout_keep(seed, dropout_p, M, K)
    x_dropped = _drop(x_acc, keep)
    A_acc, B_acc = rounded(A, x.dtype), rounded(B, x.dtype)
    dy = x_acc.new_zeros(M, B.shape[0]) if dy is None else dy.to(acc_dtype)
    dx_experts, dA, dB = torch.zeros_like(x_acc), torch.zeros_like(A_acc), torch.zeros_like(B_acc)
    dg = torch.zeros_like(g)
    offsets, scaling = mixture.offsets, mixture.scaling_with_dropout(dropout_p)
    for i in range(mixture.num_experts):
        rows = slice(offsets[i], offsets[i + 1])
        open_ = (g[:, i] != 0).nonzero().squeeze(1)
        asked = torch.arange(M, device=x.device) if dense else open_
        t_asked = dy[asked] @ B_acc[:, rows]  # (asked, r_i)
        dg[asked, i] = scaling[i] * (t_asked * u[asked, rows]).sum(1)
        t = t_asked[open_] if dense else t_asked
        g_open = g[open_, i, None]
        v = (scaling[i] * g_open * u[open_, rows]).to(x.dtype).to(acc_dtype)
        du = (scaling[i] * g_open * t).to(x.dtype).to(acc_dtype)
        dB[:, rows] = dy[open_].t() @ v
        dA[rows] = du.t() @ x_dropped[open_]
        dx_experts.index_add_(0, open_, du @ A_acc[rows])
    dx, drouter_weight, drouter_bias = _drop(dx_experts, keep), None, None
    if router_weight is not None:
        total = dg if dgates is None else dg + dgates
        dh = torch.where(g != 0, total, 0.0)  # select: a closed expert's dg reaches nothing
        dx = dx + dh @ rounded(router_weight, x.dtype)
        drouter_weight = (dh.t() @ x_acc).to(router_weight.dtype)
        drouter_bias = dh.sum(0)
    return Gradients(
        dx if need_x else None,
        dA.to(A.dtype) if need_A else None,
        dB.to(B.dtype) if need_B else None,
        drouter_weight if need_router else None,
        drouter_bias if need_bias else None,
        dg if need_gates else None,
    )


def forward_siblings(operands: Sequence[ForwardOperands], settings: Sequence[Settings]) -> list[Outputs]:
    """`forward` of every mixture; all of them have the same x."""
    return [forward(o, s, False) for o, s in zip(operands, settings, strict=True)]


def backward_siblings(
    operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
) -> list[Gradients]:
    """`backward` of every mixture. The first one's gradient of x is the sum over all of them, the others have none."""
    grads = [_backward(o, s, n) for o, s, n in zip(operands, settings, needs, strict=True)]
    of_x = [g.x for g in grads if g.x is not None]
    total = torch.stack(of_x).sum(0).to(operands[0].x.dtype) if of_x else None
    return [g._replace(x=None if i else total) for i, g in enumerate(grads)]

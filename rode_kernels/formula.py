"""The operation as one expression of differentiable PyTorch operations, for what no kernel has a rule for.

torch.func's transforms, forward-mode differentiation, second derivatives and `torch.jit.trace` take this slower way. It decides
nothing from values, so that `vmap` and tracing can follow it.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rode_kernels.backends.reference import accumulation_dtype, dropout_keep, rounded
from rode_kernels.checks import has_tangents
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, MaybeTensor, Settings
from rode_kernels.passes import Needs


def needs_formula(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func, a tangent or `torch.jit.trace` follows the call."""
    if torch.compiler.is_compiling():
        return False
    # A trace of tensors without gradients records the operator.
    traced = torch._C._get_tracing_state() is not None
    return (
        torch._C._functorch.maybe_current_level() is not None
        or (traced and any(t is not None and t.requires_grad for t in tensors))
        or has_tangents(*tensors)
    )


@lru_cache
def say_once(why: str) -> None:
    """Warns, once for each reason, that calls take the slower way."""
    warnings.warn(
        f"rode_kernels: {why} takes plain PyTorch in place of the kernels, which is slower and multiplies closed experts, too",
        stacklevel=2,
    )


def formula(operands: ForwardOperands, settings: Settings) -> tuple[Tensor, Tensor]:
    """y = base + sum_i scaling_i g_i B_i A_i drop(x), with g = relu(x Wr^T + br) or as given.

    Args:
        operands: leading dimensions of any number. Without a seed `F.dropout` draws the mask, which obeys vmap's `randomness`.

    Returns:
        y (..., O) in x's dtype, and g (..., N) in the accumulation dtype.
    """
    x, A, B, router_weight, router_bias, gates, base, seed = operands
    mixture, dropout_p, dense = settings
    acc_dtype = accumulation_dtype(x.dtype)
    x_acc = x.to(acc_dtype)
    if router_weight is not None:
        g = F.linear(x_acc, rounded(router_weight, x.dtype))
        g = torch.relu(g if router_bias is None else g + router_bias.to(acc_dtype))
    else:
        assert gates is not None, "checked: a call has a router or gates"
        g = gates.to(acc_dtype)
    scaling = mixture.scaling
    if dropout_p > 0 and seed is None:
        dropped = F.dropout(x_acc, dropout_p)
    elif dropout_p > 0:
        assert seed is not None
        scaling = mixture.scaling_with_dropout(dropout_p)
        rows = x.numel() // max(x.shape[-1], 1)
        dropped = torch.where(dropout_keep(seed, dropout_p, rows, x.shape[-1]).view(x.shape), x_acc, 0.0)
    else:
        dropped = x_acc
    ranks = torch.tensor(mixture.ranks, device=x.device)
    factors = (g * g.new_tensor(scaling)).repeat_interleave(ranks, dim=-1, output_size=mixture.total_rank)
    u = F.linear(dropped, rounded(A, x.dtype))
    # A closed expert adds nothing, even where its u is not finite; with dense gates it has a gradient where u is.
    counts = factors != 0
    v = torch.where(counts | u.isfinite() if dense else counts, factors * u, 0.0)
    y = F.linear(v.to(x.dtype).to(acc_dtype), rounded(B, x.dtype))
    return (y if base is None else base.to(acc_dtype) + y).to(x.dtype), g


def alias(t: MaybeTensor) -> MaybeTensor:
    """Another name of the tensor in the graph."""
    return t if t is None else t.view_as(t)


def gradients(
    operands: BackwardOperands,
    router_bias: Tensor | None,
    gates: Tensor | None,
    settings: Settings,
    needs: Needs,
) -> Gradients:
    """The gradients of `formula`, themselves differentiable as often as wanted.

    Args:
        operands: the saved tensors, with the history that autograd gives them back; u and g are not read.
        router_bias, gates: as the forward call got them, with their history.
    """
    dy, dgates, x, _, _, A, B, router_weight, seed = operands
    with torch.enable_grad():
        # a gradient with respect to an alias is none with respect to what else a tensor was made into
        aliases = (alias(x), alias(A), alias(B), alias(router_weight), alias(router_bias), alias(gates))
        y, g = formula(ForwardOperands(*aliases, None, seed), settings)
        outputs = [
            (out, grad) for out, grad in ((y, dy), (g, dgates)) if grad is not None and out.requires_grad
        ]
        wanted = [t for need, t in zip(needs, aliases, strict=True) if need and t is not None]
        if not wanted:
            return Gradients(*(None,) * len(needs))
        found = torch.autograd.grad(
            [out for out, _ in outputs],
            wanted,
            [grad.view_as(out) for out, grad in outputs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    grads = iter(found)
    return Gradients(
        *(next(grads) if need and t is not None else None for need, t in zip(needs, aliases, strict=True))
    )

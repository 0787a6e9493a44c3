"""What a packed mixture of LoRA experts is: ranks, scaling, packing, and the checks that every call makes.

Packing: experts stand one after another, so that expert i owns rows `offsets[i]:offsets[i + 1]` of `A` (R, K) and the same
columns of `B` (O, R), with R = sum(ranks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
GATE_GRADS = ("open", "all")


@dataclass(frozen=True)
class Mixture:
    """Static description of a packed mixture.

    Attributes:
        ranks: rank of each expert.
        scaling: factor of each expert (alpha / r_i in the paper), before dropout's 1 / (1 - p).
    """

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        return sum(self.ranks)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each expert in A, and R as the last entry."""
        return tuple(accumulate(self.ranks, initial=0))

    def scaling_with_dropout(self, dropout_p: float) -> tuple[float, ...]:
        """The scaling with 1 / (1 - p) folded in; at p = 1 everything is dropped and the factor is 0."""
        keep = 1.0 - dropout_p
        return tuple(s / keep if keep > 0.0 else 0.0 for s in self.scaling)


def _checked(ranks: tuple[object, ...], scaling: tuple[object, ...]) -> Mixture:
    if not ranks:
        raise ValueError("ranks: expected at least one expert, got an empty sequence")
    for i, rank in enumerate(ranks):
        if isinstance(rank, bool) or not isinstance(rank, Integral):
            raise TypeError(f"ranks[{i}]: expected an int, got {rank!r} ({type(rank).__name__})")
        if rank < 1:
            raise ValueError(f"ranks[{i}]: expected a rank of at least 1, got {rank}")
    if len(scaling) != len(ranks):
        raise ValueError(f"scaling: expected one float per expert ({len(ranks)}), got {len(scaling)}")
    for i, factor in enumerate(scaling):
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"scaling[{i}]: expected a float, got {factor!r} ({type(factor).__name__})")
        if not -math.inf < factor < math.inf:  # comparisons: Dynamo can trace them, math.isfinite it cannot
            raise ValueError(f"scaling[{i}]: expected a finite float, got {factor}")
    return Mixture(tuple(int(r) for r in ranks), tuple(float(s) for s in scaling))


@lru_cache(maxsize=1024, typed=True)  # 2.0 equals 2, and only one of them is a rank
def _cached(experts: int, *ranks_and_scaling: object) -> Mixture:
    return _checked(ranks_and_scaling[:experts], ranks_and_scaling[experts:])


def make_mixture(ranks: Sequence[int], scaling: Sequence[float]) -> Mixture:
    """Checks ranks and scaling; the result is cached, so that a layer pays for the check once."""
    if type(ranks) is not tuple or type(scaling) is not tuple:
        for name, value in (("ranks", ranks), ("scaling", scaling)):
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
                raise TypeError(
                    f"{name}: expected a tuple with one number per expert, got {type(value).__name__}"
                )
        ranks, scaling = tuple(ranks), tuple(scaling)
    if torch.compiler.is_compiling():  # Dynamo traces through caches, with a warning
        return _checked(ranks, scaling)
    return _cached(len(ranks), *ranks, *scaling)


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {t.layout}; call .to_dense() first")


def _parameter(name: str, t: Tensor, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    check_tensor(name, t)
    if t.dim() != len(shape) or any(have != want for have, want in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {meaning} = {tuple(shape)}, got {_shape(t)}")
    if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        raise TypeError(
            f"{name}: expected dtype {x.dtype} (as x) or, with 16-bit x, torch.float32; got {t.dtype}"
        )
    if t.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} (as x), got {t.device}")


def check_inputs(
    mixture: Mixture,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    gates: Tensor | None,
    base: Tensor | None,
    dropout_p: float,
) -> None:
    """Raises TypeError or ValueError naming the argument, what it got and what was wanted."""
    if x.dim() < 1:
        raise ValueError("x: expected shape (..., in_features), got a 0-dimensional tensor")
    features, experts, total = x.shape[-1], mixture.num_experts, mixture.total_rank
    _parameter("A", A, (total, features), "(sum(ranks), in_features)", x)
    if isinstance(B, Tensor) and B.dim() != 2:
        raise ValueError(f"B: expected shape (out_features, sum(ranks)), got {_shape(B)}")
    out_features = B.shape[0] if isinstance(B, Tensor) else 0
    _parameter("B", B, (out_features, total), "(out_features, sum(ranks))", x)
    if router_weight is not None:
        _parameter("router_weight", router_weight, (experts, features), "(len(ranks), in_features)", x)
    if router_bias is not None:
        _parameter("router_bias", router_bias, (experts,), "(len(ranks),)", x)
    if gates is not None:
        _check_gates(gates, x, experts)
    if base is not None:
        check_tensor("base", base)
        want = (*x.shape[:-1], out_features)
        if base.dim() != len(want) or any(h != w for h, w in zip(base.shape, want, strict=True)):
            raise ValueError(f"base: expected shape (..., out_features) = {want}, got {_shape(base)}")
        if base.dtype != x.dtype:
            raise TypeError(f"base: expected dtype {x.dtype} (as x), got {base.dtype}")
        if base.device != x.device:
            raise ValueError(f"base: expected on {x.device} (as x), got {base.device}")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p: expected a float, got {dropout_p!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def check_x(x: object) -> None:
    """The first check: the others take x's dtype and shape as the measure."""
    check_tensor("x", x)
    if x.dtype not in FLOATING:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"x: expected one of {names}, got {x.dtype}")


def _check_gates(gates: Tensor, x: Tensor, experts: int) -> None:
    check_tensor("gates", gates)
    if gates.dtype not in FLOATING:
        raise TypeError(f"gates: expected a floating dtype, got {gates.dtype}")
    if gates.device != x.device:
        raise ValueError(f"gates: expected on {x.device} (as x), got {gates.device}")
    lead = x.shape[:-1]
    fits = 1 <= gates.dim() <= x.dim() and gates.shape[-1] == experts
    if fits:
        have = gates.shape[:-1]
        tail = lead[len(lead) - len(have) :]
        fits = all(h == 1 or h == want for h, want in zip(have, tail, strict=True))
    if not fits:
        raise ValueError(
            f"gates: expected a shape that broadcasts to {(*lead, experts)} with last dimension "
            f"len(ranks) = {experts}, got {_shape(gates)}"
        )


def check_inplace(base: Tensor | None, x: Tensor) -> None:
    """`inplace=True` may only write where autograd and memory allow it."""
    if base is None:
        raise ValueError("inplace=True: base is None; pass the tensor to accumulate into")
    if torch.is_grad_enabled() and base.requires_grad and base.is_leaf:
        raise ValueError("inplace=True: base is a leaf tensor that needs grad; pass inplace=False or a clone")
    if (
        torch.compiler.is_compiling()
    ):  # becomes functional: nothing is overwritten, and aliasing cannot be asked while tracing
        return
    if torch._debug_has_internal_overlap(base) == 1:
        raise ValueError(
            "inplace=True: base overlaps itself (an expanded tensor); pass inplace=False or a clone"
        )
    if torch._C._overlaps(base, x):
        raise ValueError("inplace=True: base shares memory with x; pass inplace=False or a clone")


def normalize_seed(seed: int | Tensor | None, dropout_p: float, x: Tensor) -> Tensor | None:
    """The seed as a one-element int64 tensor on x's device; None where nothing is dropped.

    A missing seed is drawn with `torch.randint` on x's device and only if dropout_p > 0, so that `torch.manual_seed`,
    checkpointing and CUDA-graph replay treat it as they treat `F.dropout`.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected a one-element int64 tensor, got {seed.dtype} of shape {_shape(seed)}"
            )
        if seed.device != x.device:
            raise ValueError(f"seed: expected on {x.device} (as x), got {seed.device}")
    elif seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(
                f"seed: expected an int, a one-element int64 tensor or None, got {type(seed).__name__}"
            )
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected an int that fits in 64 signed bits, got {seed}")
    if not dropout_p > 0.0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    return torch.full(
        (1,), seed, dtype=torch.int64, device=x.device
    )  # a fill: no copy that the host would wait for


def check_no_tangents(*tensors: Tensor | None) -> None:
    """Refuses forward-mode differentiation, which the operation has no rule for: its tangents would be lost without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # no `dual_level`, no `torch.func.jvp`
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "rode_kernels: forward-mode differentiation (torch.func.jvp, jacfwd, linearize, torch.autograd.forward_ad) is not "
            "supported; use backward, or write the formula in PyTorch"
        )

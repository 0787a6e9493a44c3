"""Requirements that a call's inputs must meet. Each error names the argument, what it got and what was wanted."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rode_kernels.operands import ForwardOperands, Settings

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
GATE_GRADS = ("open", "all")
Seed = int | Tensor | None


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {t.layout}; call .to_dense() first")


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} (as x), got {t.device}")


def _check_shape(name: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    check_tensor(name, t)
    if t.dim() != len(shape) or any(have != want for have, want in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {meaning} = {tuple(shape)}, got {_shape(t)}")


def _check_parameter(name: str, t: Tensor, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    _check_shape(name, t, shape, meaning)
    if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        raise TypeError(
            f"{name}: expected dtype {x.dtype} (as x) or, with 16-bit x, torch.float32; got {t.dtype}"
        )
    _check_device(name, t, x)


def check_inputs(operands: ForwardOperands, settings: Settings) -> None:
    """Refuses operands that do not fit x and the settings; `check_x` comes first, `normalize_seed` checks the seed."""
    x, A, B, router_weight, router_bias, gates, base, _seed = operands
    mixture, dropout_p, _dense = settings
    if x.dim() < 1:
        raise ValueError("x: expected shape (..., in_features), got a 0-dimensional tensor")
    features, experts, total = x.shape[-1], mixture.num_experts, mixture.total_rank
    _check_parameter("A", A, (total, features), "(sum(ranks), in_features)", x)
    if isinstance(B, Tensor) and B.dim() != 2:
        raise ValueError(f"B: expected shape (out_features, sum(ranks)), got {_shape(B)}")
    out_features = B.shape[0] if isinstance(B, Tensor) else 0
    _check_parameter("B", B, (out_features, total), "(out_features, sum(ranks))", x)
    if router_weight is not None:
        _check_parameter("router_weight", router_weight, (experts, features), "(len(ranks), in_features)", x)
    if router_bias is not None:
        _check_parameter("router_bias", router_bias, (experts,), "(len(ranks),)", x)
    if gates is not None:
        _check_gates(gates, x, experts)
    if base is not None:
        _check_shape("base", base, (*x.shape[:-1], out_features), "(..., out_features)")
        if base.dtype != x.dtype:
            raise TypeError(f"base: expected dtype {x.dtype} (as x), got {base.dtype}")
        _check_device("base", base, x)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p: expected a float, got {dropout_p!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def check_linear(weight: Tensor, bias: Tensor | None, x: Tensor, out_features: int) -> None:
    """Refuses a weight and bias of a linear layer that do not fit x and B, after `check_inputs`."""
    shape = out_features, x.shape[-1]
    _check_shape("weight", weight, shape, "(B's out_features, x's in_features)")
    if bias is not None:
        _check_shape("bias", bias, shape[:1], "(out_features,)")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name}: expected dtype {x.dtype} (as x), got {t.dtype}")
        if t is not None:
            _check_device(name, t, x)


def check_x(x: Tensor) -> None:
    """The first check: the others take x's dtype and shape as the measure."""
    check_tensor("x", x)
    if x.dtype not in FLOATING:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"x: expected one of {names}, got {x.dtype}")


def _check_gates(gates: Tensor, x: Tensor, experts: int) -> None:
    check_tensor("gates", gates)
    if gates.dtype not in FLOATING:
        raise TypeError(f"gates: expected a floating dtype, got {gates.dtype}")
    _check_device("gates", gates, x)
    want = (*x.shape[:-1], experts)
    fits = 1 <= gates.dim() <= x.dim() and gates.shape[-1] == experts
    sizes = zip(reversed(gates.shape), reversed(want), strict=False)  # from the last dimension on
    if not fits or any(have not in (1, size) for have, size in sizes):
        raise ValueError(
            f"gates: expected a shape that broadcasts to {want} with last dimension "
            f"len(ranks) = {experts}, got {_shape(gates)}"
        )


def check_inplace(base: Tensor | None, x: Tensor) -> None:
    """`inplace=True` may only write where autograd and memory allow it."""
    if base is None:
        raise ValueError("inplace=True: base is None; pass the tensor to accumulate into")
    if torch.is_grad_enabled() and base.requires_grad and base.is_leaf:
        raise ValueError("inplace=True: base is a leaf tensor that needs grad; pass inplace=False or a clone")
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        # Compiled code is functional: nothing is overwritten. Neither it nor a transform's wrappers can be asked for aliasing.
        return
    if torch._debug_has_internal_overlap(base) == 1:
        raise ValueError(
            "inplace=True: base overlaps itself (an expanded tensor); pass inplace=False or a clone"
        )
    if torch._C._overlaps(base, x):
        raise ValueError("inplace=True: base shares memory with x; pass inplace=False or a clone")


def normalize_seed(seed: Seed, dropout_p: float, x: Tensor) -> Tensor | None:
    """The seed as a one-element int64 tensor on x's device; None where nothing is dropped.

    A missing seed is drawn with `torch.randint` on x's device and only if dropout_p > 0, so that `torch.manual_seed`,
    checkpointing and CUDA-graph replay treat it as they treat `F.dropout`.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: expected a one-element int64 tensor, got {seed.dtype} of shape {_shape(seed)}"
            )
        _check_device("seed", seed, x)
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
    # a fill: no copy that the host would wait for
    return torch.full((1,), seed, dtype=torch.int64, device=x.device)


def has_tangents(*tensors: Tensor | None) -> bool:
    """Whether any of them is a dual tensor of `torch.autograd.forward_ad`, `torch.func.jvp` or jacfwd."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def check_no_tangents(*tensors: Tensor | None) -> None:
    """Refuses tensors with a tangent at the operator, which has no rule for them: they would be lost without a word."""
    if has_tangents(*tensors):
        raise NotImplementedError(
            "rode_kernels: the operator rode::mixture has no rule for forward-mode differentiation; call the public functions, "
            "which have"
        )

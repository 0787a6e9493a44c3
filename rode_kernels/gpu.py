"""What the GPU backends have in common: their limits, and how they take tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from rode_kernels.mixture import Mixture
from rode_kernels.plan import MAX_EXPERTS, MAX_FEATURES, MAX_RANK, MAX_TOKENS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    """As the kernels take a matrix: columns 1 apart, rows at most 2^31 - 1."""
    return t if (t.shape[1] == 1 or t.stride(1) == 1) and t.stride(0) < 2**31 else t.contiguous()


def tf32_allowed() -> bool:
    """Whether torch may round float32 products to tf32: `torch.set_float32_matmul_precision` and newer forms; off by default."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"

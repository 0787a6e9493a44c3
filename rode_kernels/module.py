"""`RectifiedMixture`: the operation with its parameters, for use without PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rode_kernels.functional import rectified_mixture
from rode_kernels.mixture import make_mixture


class RectifiedMixture(nn.Module):
    """LoRA experts of different ranks under a ReLU-gated router, as a layer: what is added to a frozen layer's output.

    Args:
        in_features, out_features: widths K and O.
        ranks: rank of each of the N experts.
        alpha: experts are scaled by alpha / r_i.
        router_bias: give the router a bias (starts at 0).
        dropout: probability with which elements of the experts' input are dropped in training.
        device, dtype: of the parameters (float32 parameters serve 16-bit inputs).

    Each A_i starts as LoRA's does (Kaiming uniform over in_features), B at 0, so the output starts at 0. The router starts as
    nn.Linear does: logits of zero mean, about half of the gates open.
    """

    router_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        alpha: float = 16.0,
        *,
        router_bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
        make_mixture(tuple(ranks), (1.0,) * len(ranks))  # ranks are checked before they divide
        self.mixture = make_mixture(tuple(ranks), tuple(float(alpha) / r for r in ranks))
        self.in_features, self.out_features = in_features, out_features
        self.alpha, self.dropout = float(alpha), float(dropout)
        total, experts = self.mixture.total_rank, self.mixture.num_experts
        self.A = nn.Parameter(torch.empty(total, in_features, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(out_features, total, device=device, dtype=dtype))
        self.router_weight = nn.Parameter(torch.empty(experts, in_features, device=device, dtype=dtype))
        bias = nn.Parameter(torch.empty(experts, device=device, dtype=dtype)) if router_bias else None
        self.register_parameter("router_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # the fan is in_features whatever the rank
        nn.init.zeros_(self.B)
        nn.init.kaiming_uniform_(self.router_weight, a=math.sqrt(5))
        if self.router_bias is not None:
            nn.init.zeros_(self.router_bias)

    def forward(self, x: Tensor, base: Tensor | None = None, *, inplace: bool = False) -> Tensor:
        """(..., in_features) -> (..., out_features), added to `base` where one is given."""
        return rectified_mixture(
            x,
            self.A,
            self.B,
            self.router_weight,
            self.router_bias,
            ranks=self.mixture.ranks,
            scaling=self.mixture.scaling,
            base=base,
            inplace=inplace,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, ranks={self.mixture.ranks}, "
            f"alpha={self.alpha}, router_bias={self.router_bias is not None}, dropout={self.dropout}"
        )

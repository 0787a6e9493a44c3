"""`Adapter`: one adapter's mixture of experts in one layer, its parameters and its forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from rode.tuner.config import RodeConfig
from rode.tuner.gating import Gated, LayerInfo
from rode.tuner.ownership import has_hooks
from rode.tuner.recorder import GateRecorder
from rode.tuner.rounding import RoundedParameters
from rode.tuner.routers import compute_gates, init_router_, init_table_, with_universal
from rode.tuner.variants import Options, RectifiedRouter, mixed_factors, pick_variant
from rode_kernels import rectified_linear


class Adapter(Gated, nn.Module):
    """One adapter of one layer. Parameters are packed as the operation wants them.

    For N experts with R = sum of ranks, of which N' have a logit (N, or N - 1 beside a universal expert):

    - `A` (R, in_features), with shared_A (rank, in_features); `B` (out_features, R);
    - where it has a router, `router_weight` (N', in_features), for embedded ids (N', embedding_dim), and `router_bias` (N',) where
      asked for; `table` (ids, embedding_dim or N'), with router_input "constant" (1, N');
    - `threshold_weight` (1, in_features) and `threshold_bias` (1,) for gate "threshold";
    - `norm_weight` and `norm_bias` (R,) with norm_experts.

    A parameter that an adapter does not need is None. With router_per="block" only the block's first layer has a router. All are
    float32 (float64 on a float64 base), whatever the base layer's dtype, so that a reload gives the same bits.

    It is a module of its own, and all its parameters are read in its own forward pass: offloading and sharding bring a module's
    parameters where they are needed, and take them away again, by hooks on its call.

    Args:
        name: of the adapter. info: see `LayerInfo`.
        shares_gates: another layer of the block computes the gates.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        ranks: tuple[int, ...],
        alpha: float,
        config: RodeConfig,
        info: LayerInfo,
        *,
        shares_gates: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.name, self.ranks, self.config, self.info = name, ranks, config, info
        self.scaling = config.expert_scaling(ranks, alpha)
        self.shares_gates = shares_gates

        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        experts, total = len(ranks), sum(ranks)
        routed = config.routed_experts(experts)
        needs_router = config.needs_router(experts)
        own_router = needs_router and not shares_gates
        by_table = config.id_input is not None or config.router_input == "constant"
        # The width of what the router reads. None: the table holds logits.
        width = config.embedding_dim if by_table else in_features
        router = own_router and width is not None and config.router_input != "constant"
        threshold = own_router and config.gate == "threshold"
        norm = needs_router and config.norm_experts
        self.A = nn.Parameter(
            torch.empty(ranks[0] if config.shared_A else total, in_features, device=device, dtype=dtype)
        )
        self.B = nn.Parameter(torch.empty(out_features, total, device=device, dtype=dtype))
        self.router_weight = parameter(routed, width or routed, wanted=router)
        self.router_bias = parameter(routed, wanted=router and config.router_bias)
        self.table = parameter(config.num_ids or 1, width or routed, wanted=own_router and by_table)
        self.threshold_weight = parameter(1, in_features, wanted=threshold)
        self.threshold_bias = parameter(1, wanted=threshold)
        self.norm_weight, self.norm_bias = parameter(total, wanted=norm), parameter(total, wanted=norm)
        self.variant = pick_variant(config, experts, router)
        self.rounded: RoundedParameters | None = None
        self.reset_parameters()

    @property
    def weight(self) -> Tensor:
        """`A`, under the name by which PEFT's `fsdp_auto_wrap_policy` knows modules to be sharded on their own."""
        return self.A

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A as LoRA's, B at zero (at random without init_weights), the router as configured; under torch's generator."""
        # The bound depends on in_features alone, so one draw over the packed A is LoRA's draw for each expert.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if self.config.init_weights:
            self.B.zero_()
        else:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        if self.router_weight is not None:
            init_router_(self.router_weight, self.router_bias, self.config.router_init)
        if self.table is not None:
            init_table_(self.table, not self.config.table_of_logits, self.config.router_init)
        if self.threshold_weight is not None:
            init_router_(self.threshold_weight, self.threshold_bias, "kaiming")
        if self.norm_weight is not None and self.norm_bias is not None:
            self.norm_weight.fill_(1)
            self.norm_bias.zero_()

    def forward(
        self, x: Tensor, base: Tensor | None, owned: bool = False, linear: nn.Linear | None = None
    ) -> Tensor:
        """The frozen layer's output + mixture of x, in that output's dtype.

        Args:
            x: the layer's input (..., in_features). base: the frozen layer's output (..., out_features).
            owned: nobody else holds `base`: it may be overwritten.
            linear: the frozen layer, where its output is still to be made (see `makes_product`); base is None then.
        """
        if base is None:
            assert linear is not None, "one of the two is given"
            inputs, dropout_p, operands = self.product_operands(x)
            result = rectified_linear(
                *(inputs, linear.weight, linear.bias, *operands),
                ranks=self.ranks,
                scaling=self.scaling,
                dropout_p=dropout_p,
                return_gates=self.reads_gates(),
            )
            return self.finish_product(result, x)
        inputs = _autocast(x)
        A, B = self._packed(inputs)
        same = base.dtype == inputs.dtype
        options: Options = {
            "ranks": self.ranks,
            "scaling": self.scaling,
            "dropout_p": self._dropout_p,
            "base": base if same else None,
            "inplace": same and owned,
        }
        y = self._finish(*self.variant.add(self, x, inputs, A, B, options))
        return y if same else base + y.to(base.dtype)

    def _finish(self, y: Tensor, gates: Tensor | None) -> Tensor:
        """Tells of a mixture, and of gates that somebody reads."""
        if self.config.needs_forward_hooks:
            passes = self.info.context.passes
            passes.note(y, passes.current())
        if gates is not None and self.info.gate_recorder is not None:
            self._tell(self.info.gate_recorder, gates)
        return y

    def product_operands(
        self, x: Tensor
    ) -> tuple[Tensor, float, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """The layer's input as the operation takes it, dropout's probability, and A, B, the router's weight and bias.

        Only where `makes_product` is true.
        """
        inputs = _autocast(x)
        assert isinstance(self.variant, RectifiedRouter), "see makes_product"
        operands = *self._packed(inputs), *self.variant.router(self, inputs)
        return inputs, self._dropout_p, operands

    def _packed(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, in_features), a shared one repeated for each expert, and B, as the operation takes them."""
        A = self.operand("A", inputs)
        return A.repeat(len(self.ranks), 1) if self.config.shared_A else A, self.operand("B", inputs)

    @property
    def _dropout_p(self) -> float:
        return self.config.dropout if self.training else 0.0

    def finish_product(self, result: Tensor | tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """The layer's output, of y, or y and gates, that were computed outside with `product_operands`."""
        assert isinstance(self.variant, RectifiedRouter), "see makes_product"
        return self._finish(*self.variant.kept(self, result, x))

    def makes_product(self) -> bool:
        """Whether `forward` can make the frozen layer's output itself, and may be called past `__call__`: nobody is told of it."""
        return (
            isinstance(self.variant, RectifiedRouter)
            and self._compiled_call_impl is None
            and not has_hooks(self)
        )

    def _tell(self, recorder: GateRecorder, gates: Tensor) -> None:
        if self.info.block_pass is None or self.info.block_pass.slot == 0:
            block = self.block_of_experts()
            if block is not None:
                assert block.whole is not None, "set when the first gates of the block were computed"
                gates = block.whole
            recorder.record(self.name, self.ranks, gates.detach())

    def packed_A(self) -> Tensor:
        """A as (R, in_features), a shared one repeated for each expert."""
        return self.A.repeat(len(self.ranks), 1) if self.config.shared_A else self.A

    @torch.no_grad()
    def concatenate(self, adapters: Sequence[Adapter]) -> None:
        """Fills this adapter with the experts of `adapters`, side by side."""
        self.A.copy_(torch.cat([adapter.A for adapter in adapters]))
        self.B.copy_(torch.cat([adapter.B for adapter in adapters], dim=1))
        if self.router_weight is not None:
            self.router_weight.copy_(torch.cat(list(_present(a.router_weight for a in adapters))))
        if self.router_bias is not None:
            rows = [a.A.new_zeros(len(a.ranks)) if a.router_bias is None else a.router_bias for a in adapters]
            self.router_bias.copy_(torch.cat(rows))

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The one matrix (out_features, in_features) that an adapter with constant gates adds, in the parameters' dtype."""
        A, B, gates = self.packed_A(), self.B, self._constant_gates()
        if self.config.combine == "factors":
            down, up = mixed_factors(A, B, gates[None], self.ranks[0])
            return self.scaling[0] * (up @ down)
        factors = gates * B.new_tensor(self.scaling)
        return (B * factors.repeat_interleave(torch.tensor(self.ranks, device=B.device))) @ A

    def _constant_gates(self) -> Tensor:
        """(N,) gates that do not depend on the input."""
        if self.table is None:
            return self.B.new_ones(len(self.ranks))
        gates = compute_gates(self.config, self.table[0].to(self.B), training=False).gates
        return with_universal(gates) if self.config.universal_expert else gates

    def extra_repr(self) -> str:
        return f"{self.config.gate}{list(self.ranks)}"


def _present(tensors: Iterator[Tensor | None]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors if tensor is not None)


def _autocast(x: Tensor) -> Tensor:
    """x as F.linear would see it."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))

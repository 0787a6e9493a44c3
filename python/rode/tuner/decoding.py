"""A short way for single tokens while a model generates: what a layer does with a token is decided once, and guarded.

Between other layers Python is out of the processor's caches and takes several times what it takes in a loop: for one token of a
small model longer than the frozen layer's product. So a call that is like an earlier one of the same `generate` goes with few steps
to the prepared native call (`rode_kernels.fast_path`). What fails the guard takes the ordinary way, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rode.tuner.ownership import has_hooks, is_plain
from rode_kernels.autograd import fast_path
from rode_kernels.linear import product
from rode_kernels.mixture import make_mixture

Linear = Any  # `rode.tuner.layer.Linear` and `rode.tuner.adapter.Adapter`, which import this file
Adapter = Any


_MOST_TOKENS, _MOST_PLANS = 16, 8  # of a call that is remembered, and of a layer


class _Plan(NamedTuple):
    """A call that may be repeated.

    Attributes:
        guard: of x and `tensors`: dtypes, devices, strides, and what would see operations.
        run: the mixture's forward pass.
        weight, bias: of the frozen layer.
        operands: the mixture's, without x and base.
        held: the adapter's parameters that they were made of, by name, with their versions.
    """

    guard: Callable[..., bool]
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    weight: Tensor
    bias: Tensor | None
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None]
    tensors: tuple[Tensor, ...]
    held: tuple[tuple[str, Tensor | None, int], ...]


class Decoding:
    """The calls of one layer within one `generate`, by the shape of their input."""

    def __init__(self, layer: Linear, adapter: Adapter) -> None:
        self.layer, self.adapter = layer, adapter
        self.active = layer._active_adapter
        self.plans: dict[torch.Size, _Plan] = {}

    def __deepcopy__(self, memo: Any) -> None:  # a copy of the model generates by itself
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def run(self, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the ordinary way has to be taken."""
        plan = self.plans.get(x.shape)
        if plan is None or not self._is_as_it_was(plan) or not plan.guard(x, *plan.tensors):
            return None
        base = product(x, plan.weight, plan.bias)
        A, B, router_weight, router_bias = plan.operands
        return plan.run((x, A, B, router_weight, router_bias, None, base, None))[0]

    def _is_as_it_was(self, plan: _Plan) -> bool:
        layer, adapter = self.layer, self.adapter
        if layer._disable_adapters or layer.merged_adapters or layer._active_adapter is not self.active:
            return False
        if adapter.training or adapter.reads_gates() or layer.info.block_pass is not None:
            return False
        base = cast(nn.Module, layer._modules["base_layer"])
        parameters, frozen = adapter._parameters, base._parameters
        if frozen.get("weight") is not plan.weight or frozen.get("bias") is not plan.bias:
            return False
        for name, held, version in plan.held:
            if parameters.get(name) is not held or (held is not None and held._version != version):
                return False
        if torch.is_grad_enabled() or has_hooks(adapter) or not is_plain(base):
            return False
        return fast_path.nobody_watches()

    def learn(self, x: Tensor) -> None:
        """Prepares calls like this one, which has just taken the ordinary way, if they are eligible."""
        layer, adapter = self.layer, self.adapter
        if x.numel() > _MOST_TOKENS * x.shape[-1] or x.shape in self.plans or len(self.plans) >= _MOST_PLANS:
            return
        if torch.is_grad_enabled() or layer.only_adapter(x) is not adapter:
            return
        inputs, dropout_p, operands = adapter.product_operands(x)
        if inputs is not x or dropout_p or adapter.reads_gates() or adapter.config.shared_A:
            return
        base = cast(nn.Linear, layer.base_layer)
        weight, bias = base.weight, base.bias
        linear = (weight,) if bias is None else (weight, bias)
        call = (x, *operands, None, None, None)
        known = fast_path.find(call, make_mixture(adapter.ranks, adapter.scaling), 0.0, True, None, linear)
        if known is None or known.autocast:
            return
        names = ("A", "B", "router_weight", "router_bias")
        held = [(name, adapter._parameters.get(name)) for name in names]
        if any(t is not None and t.is_inference() for _, t in held):  # they have no version
            return
        self.plans[x.shape] = _Plan(
            known.guard,
            known.run,
            weight,
            bias,
            operands,
            (*(t for t in operands if t is not None), *linear),
            tuple((name, t, 0 if t is None else t._version) for name, t in held),
        )


@contextmanager
def decoding(layers: Iterable[Linear]) -> Iterator[None]:
    """Within this context layers with one active adapter remember their calls."""
    remembering = []
    for layer in layers if fast_path is not None else ():
        active = [name for name in layer.active_adapters if name in layer.rode_adapters]
        if len(active) == 1 and layer.adapter(active[0]).makes_product() and layer.decoding is None:
            layer.decoding = Decoding(layer, layer.adapter(active[0]))
            remembering.append(layer)
    try:
        yield
    finally:
        for layer in remembering:
            layer.decoding = None

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

from rode.tuner.ownership import Readings, hooks_read, plain_read
from rode_kernels.autograd import fast_path
from rode_kernels.linear import product
from rode_kernels.mixture import make_mixture

Linear = Any  # `rode.tuner.layer.Linear` and `rode.tuner.adapter.Adapter`, which import this file
Adapter = Any


_HELD = ("A", "B", "router_weight", "router_bias")  # the parameters that operands are made of
_MOST_TOKENS, _MOST_PLANS = 16, 8  # of a call that is remembered, and of a layer


class _Plan(NamedTuple):
    """A call that may be repeated.

    Attributes:
        unchanged: whether the layer, its adapter and what would see operations are as they were.
        guard: of x and `tensors`: dtypes, devices, strides, and what would see operations.
        run: the mixture's forward pass.
        weight, bias: of the frozen layer.
        operands: the mixture's, without x and base.
    """

    unchanged: Callable[[], bool]
    guard: Callable[..., bool]
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    weight: Tensor
    bias: Tensor | None
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None]
    tensors: tuple[Tensor, ...]


class Decoding:
    """The calls of one layer within one `generate`, by the shape of their input."""

    def __init__(self, layer: Linear, adapter: Adapter) -> None:
        self.layer, self.adapter = layer, adapter
        self.plans: dict[torch.Size, _Plan] = {}

    def __deepcopy__(self, memo: Any) -> None:  # a copy of the model generates by itself
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def run(self, x: Tensor) -> Tensor | None:
        """The layer's output, or None where the ordinary way has to be taken."""
        if torch.compiler.is_compiling():
            return None
        plan = self.plans.get(x.shape)
        if plan is None or not plan.unchanged() or not plan.guard(x, *plan.tensors):
            return None
        base = product(x, plan.weight, plan.bias)
        A, B, router_weight, router_bias = plan.operands
        return plan.run((x, A, B, router_weight, router_bias, None, base, None))[0]

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
        held = [t for name in _HELD if (t := adapter._parameters.get(name)) is not None]
        if any(t.is_inference() for t in held):  # they have no version
            return
        self.plans[x.shape] = _Plan(
            fast_path.unchanged(*_read(layer, adapter, base)),
            known.guard,
            known.run,
            weight,
            bias,
            operands,
            (*(t for t in operands if t is not None), *linear),
        )


def _read(layer: Linear, adapter: Adapter, base: nn.Linear) -> Readings:
    """The places where `Decoding.learn` looks, which sees to it that nobody watches and nothing is in between."""
    parameters, adapters = adapter._parameters, layer._modules["rode_adapters"]
    plain = plain_read(base)
    return Readings(
        [
            *((layer.__dict__, name) for name in ("_disable_adapters", "merged_adapters", "_active_adapter")),
            *((layer._modules, name) for name in ("base_layer", "rode_adapters")),
            (adapters._modules, adapter.name),
            *((adapter.__dict__, name) for name in ("training", "_compiled_call_impl")),
            *((vars(adapter.config), name) for name in ("aux_loss", "router_per")),  # see `reads_gates`
            *((vars(layer.info), name) for name in ("block_pass", "gate_recorder")),
            *((parameters, name) for name in _HELD),
            *hooks_read(adapter),
            *plain.items,
        ],
        [
            *((parameters[name], "_version") for name in _HELD if parameters.get(name) is not None),
            *plain.attributes,
        ],
        list(dict.fromkeys((torch.is_grad_enabled, *plain.functions, *fast_path.WATCHERS))),
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

"""Where in a model the first value that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rode.tuner import GateStatistics
from rode.tuner.layer import RodeLayer


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list | tuple) else True


def first_not_finite(
    model: nn.Module, loss: Callable[[], Tensor], statistics: GateStatistics | None = None
) -> str | None:
    """Run a batch again and watch each module, then each gradient.

    Args:
        model: not spread over processes.
        loss: computes the loss of the batch.
        statistics: attached to the model; its counts are replaced. None where the model has no gates or none are counted.

    Returns:
        The first module whose output is not finite, with its gates; else the parameter whose gradient is the first that is not;
        None where everything is finite this time.
    """
    found: list[tuple[str, nn.Module, bool]] = []
    names = {module: name for name, module in model.named_modules()}

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not found and not _finite(output):
            found.append((names[module], module, _finite(args) and _finite(kwargs)))

    if statistics is not None:
        statistics.reset()
    handles = [module.register_forward_hook(watch, with_kwargs=True) for module in names]
    try:
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        name, module, inputs = found[0]
        text = f"the first layer with a value that is not finite is {name}"
        if not inputs:
            text += ", whose inputs are not"
        gates = _gates(name, statistics) if isinstance(module, RodeLayer) and statistics is not None else None
        return text if gates is None else f"{text} ({gates})"
    if not bool(value.isfinite()):
        return "all layers are finite, and the loss of their outputs is not"
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(value, [p for _, p in trained], allow_unused=True)
    bad = [
        name
        for (name, _), gradient in zip(trained, gradients, strict=True)
        if gradient is not None and not _finite(gradient)
    ]
    return (
        f"the first gradient that is not finite, from the loss backwards, is that of {bad[-1]}"
        if bad
        else None
    )


def _gates(name: str, statistics: GateStatistics) -> str | None:
    """The gates of a layer in words; None where it saw no token."""
    for layer in statistics.report().layers:
        if name.endswith(layer.name):
            opened, mean = layer.open_rate["all"] or (), layer.mean_gate["all"] or ()
            parts = (
                f"rank {r}: open for {o:.0%} of tokens, mean {m:.3g}"
                for r, o, m in zip(layer.ranks, opened, mean, strict=False)
            )
            return f"its gates: {'; '.join(parts)}"
    return None

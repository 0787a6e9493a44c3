"""How an auxiliary loss of layers deep in a model reaches the loss that a trainer sees, and how those layers learn of padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rode.tuner.context import add_to_output


class AuxLoss:
    """Collects what layers record in a forward pass in training, and adds a loss made of it to the model's output.

    It hangs on the model by two hooks. While `forward` runs, `record` keeps what it gets; before and after, as when gradient
    checkpointing computes a layer again, it does not, so that nothing counts twice. The mask stays until the next forward, for a
    layer that is computed again needs it: under checkpointing, backward of one pass comes before the next pass.

    The output gets `aux_loss`; an output with `loss` gets that sum too. Under a trainer that says how many tokens the whole
    accumulated batch learns (`num_items_in_batch`) the summand is weighted by this micro-batch's share of them, else by 1: in
    both cases an accumulated step has the mean of its micro-batches' auxiliary losses, by tokens or plain.

    Args:
        loss: what was recorded, in the order of the layers, to a scalar.
    """

    def __init__(self, loss: Callable[[list[Any]], Tensor]) -> None:
        self.loss = loss
        self.collecting = False
        self._differentiable = False
        self._records: list[Any] = []
        self._mask: Tensor | None = None
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module) -> AuxLoss:
        """Hangs on `model`, the outermost transformers model (LlavaForConditionalGeneration, LlamaForCausalLM)."""
        if self._hooks:
            raise ValueError("AuxLoss: attached already; call detach() first")
        self._parameters = inspect.signature(model.forward)
        # Methods, not closures: a deep copy of the model then has hooks that refer to the copy's layers.
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        return self

    def detach(self) -> None:
        """Leaves the model's output as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._mask, self.collecting = [], None, False
        self._records.clear()

    def record(self, item: Any) -> None:
        """Called by a layer in training, with tensors that are part of the graph.

        Raises:
            ValueError: there is no graph, because reentrant gradient checkpointing builds it later.
        """
        if not self.collecting:
            return
        if self._differentiable and not torch.is_grad_enabled():
            raise ValueError(
                "AuxLoss: reentrant gradient checkpointing would drop the auxiliary loss's gradient; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        self._records.append(item)

    def valid(self, x: Tensor) -> Tensor | None:
        """Which tokens of x (batch, T, ...) are no padding: bool (batch, T), or None where there is no mask.

        Raises:
            ValueError: the mask of the forward pass is not one of x's tokens.
        """
        if self._mask is None:
            return None
        mask = self._mask[:, -x.shape[1] :]  # with a key-value cache it covers the past too
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"AuxLoss: a layer saw tokens of shape {tuple(x.shape[:2])}, but attention_mask has shape "
                f"{tuple(self._mask.shape)}; under gradient checkpointing call backward before the next forward"
            )
        return mask.to(x.device)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = self._parameters.bind_partial(*args, **kwargs).arguments
        return {**given, **given.get("kwargs", {})}

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = self._given(args, kwargs).get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._mask = mask.bool()
        elif mask is None or not model.training:  # such as a static cache's own masks
            self._mask = None
        else:
            raise ValueError(
                "AuxLoss: expected attention_mask of shape (batch, tokens), got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}; padding cannot be told apart otherwise"
            )
        self._records.clear()
        self.collecting, self._differentiable = model.training, torch.is_grad_enabled()

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        records, self._records, self.collecting = self._records, [], False
        if output is None or not records:  # forward has failed, or nothing is there to add
            return output
        return add_to_output(output, self.loss(records), self._given(args, kwargs))

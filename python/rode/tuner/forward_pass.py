"""`ForwardPass`: what one pass of a model was called with, and which pass a layer belongs to that checkpointing computes again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node

_TAG = "rode_forward_pass"


@dataclass(eq=False)
class ForwardPass:
    """The inputs of one call of the model that adapted layers read beside their own.

    It holds no tensor with a gradient: nodes of the pass's graph refer to it, and neither would ever be freed.

    Attributes:
        side: side inputs by name. mask: (batch, T) bool, what is not padding, or None.
        prompt: (batch, T) bool, the prompt's tokens, or None. told_prompt: they can be told from the call.
        decoding: a key-value cache holds earlier tokens.
        unreadable_mask: the shape or type of a mask that is not (batch, T), or None.
        in_backward: the pass's backward is running.
    """

    side: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    prompt: Tensor | None = None
    told_prompt: bool = True
    decoding: bool = False
    unreadable_mask: tuple[int, ...] | str | None = None
    in_backward: bool = False

    def read_prompt(self) -> Tensor | None:
        """The prompt's tokens, (batch, T) bool, for a router that reads them; None for all.

        Raises:
            ValueError: they cannot be told from what the model was called with.
        """
        if not self.told_prompt:
            raise ValueError(
                "router_input='sequence' reads the prompt: in training pass labels or rode_prompt_mask to the model, and in "
                "generation do not fill the cache in pieces (prefill_chunk_size)"
            )
        return self.read_mask() if self.prompt is None else self.prompt

    def read_mask(self) -> Tensor | None:
        """The tokens that are no padding, (batch, T) bool; None for all.

        Raises:
            ValueError: a mask was given in which padding cannot be told.
        """
        if self.unreadable_mask is not None:
            raise ValueError(
                f"attention_mask: expected shape (batch, tokens), so that padding can be left out; got {self.unreadable_mask} (as "
                "with a static cache or a mask of your own)"
            )
        return self.mask


class Passes:
    """The passes of one model: the running one, and earlier ones whose graph may still ask for a layer again."""

    def __init__(self) -> None:
        self.last = ForwardPass()
        self.running = False
        self._with_graph: WeakSet[ForwardPass] = WeakSet()

    def begin(self) -> ForwardPass:
        """A new pass; it runs once `running` is set."""
        self.last, self.running = ForwardPass(), False
        return self.last

    def end(self, output: object) -> None:
        """The running pass is over. Hooks on the model's output will note when its backward runs."""
        self.running = False
        if not torch.is_grad_enabled():  # no backward will compute a layer again
            self.last = ForwardPass()
        elif not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    self._with_graph.add(self.last)
                    tensor.register_hook(_Began(self.last))

    def note(self, output: Tensor, of: ForwardPass) -> None:
        """Notes on the graph that a layer's output was computed in this pass."""
        if output.grad_fn is not None and not torch.compiler.is_compiling():
            _metadata(output.grad_fn)[_TAG] = (self, of)
            self._with_graph.add(of)

    def current(self) -> ForwardPass:
        """The pass that the calling layer is part of.

        Outside of a pass a layer runs because checkpointing computes it again, in backward. It belongs then to the pass whose
        graph is being evaluated.

        Raises:
            RuntimeError: several passes wait for their backward, and reentrant checkpointing does not show which it is.
        """
        if self.running or torch.compiler.is_compiling():
            return self.last
        waiting = list(self._with_graph)
        node = torch._C._current_autograd_node() if waiting else None
        if node is None:  # the layer is called by itself
            return self.last
        if (found := self._pass_of(node)) is not None:
            return found
        possible = [one for one in waiting if one.in_backward] or waiting
        if len(possible) > 1:
            raise RuntimeError(
                f"{len(possible)} forward passes wait for a backward under reentrant checkpointing, which does not show whose "
                "layer it computes again, and the adapter's router reads what a pass was called with; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return possible[0]

    def _pass_of(self, node: Node) -> ForwardPass | None:
        """The pass of the nearest node below, the graph being walked towards its inputs."""
        seen, queue = {node}, deque([node])
        while queue:
            node = queue.popleft()
            owner, found = _metadata(node).get(_TAG, (None, None))
            if owner is self:
                return found
            for below, _ in node.next_functions:
                if below is not None and below not in seen:
                    seen.add(below)
                    queue.append(below)
        return None


class _Began:
    """A hook on a model's output: the pass's backward runs until the whole backward is over."""

    def __init__(self, of: ForwardPass) -> None:
        self.of = of

    def __call__(self, grad: Tensor) -> None:
        self.of.in_backward = True
        Variable._execution_engine.queue_callback(self.over)

    def over(self) -> None:
        self.of.in_backward = False


def _metadata(node: Node) -> dict[str, Any]:
    return cast("dict[str, Any]", node.metadata)  # an attribute, which torch's types call a method


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


def fit_rows(prompt: Tensor, tokens: tuple[int, int]) -> Tensor:
    """A prompt mask (rows, P) for a pass of `tokens` (batch, T): rows repeated for beams, and nothing of it in an answer so far."""
    rows, length = prompt.shape
    if tokens[0] % rows or tokens[1] < length:
        raise ValueError(f"rode_prompt_mask: expected shape {tokens}, got {tuple(prompt.shape)}")
    prompt = prompt.repeat_interleave(tokens[0] // rows, dim=0)
    return nn.functional.pad(prompt, (0, tokens[1] - length))

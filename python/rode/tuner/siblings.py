"""Layers of one module that get the same tensor (q, k and v; gate and up): they learn to be a group, which reads it once.

`rode_kernels.rectified_linears` computes a group. Its first layer, the leader, runs it; the others collect what is theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rode_kernels import AdaptedLinear, rectified_linears

Linear = Any  # `rode.tuner.layer.Linear` and `rode.tuner.adapter.Adapter`, which import this file
Adapter = Any

_FEWEST_TOKENS = 32
"""Below it a layer is faster by itself: the operation prepares calls of one layer (`rode_kernels.fast_path`), not of a group."""


class _Seen:
    """A tensor that a layer was given, as it was then."""

    def __init__(self, x: Tensor) -> None:
        self._tensor, self._version = weakref.ref(x), _version(x)

    def is_still(self, x: Tensor) -> bool:
        return self._tensor() is x and self._version == _version(x)


class _Ready(NamedTuple):
    """The result of a member of the group that has not been called yet."""

    seen: _Seen
    adapter: Adapter
    state: tuple[Any, ...]
    result: Tensor | tuple[Tensor, Tensor]


class Siblings:
    """The adapted layers of one module, and what they have learned of each other.

    In the first pass every layer runs by itself, and those that are called with the same tensor, one after another, become a group.
    From then on its leader runs all of them. Whatever breaks the habit dissolves the group for good: a layer that gets another
    tensor, is not called, or cannot take part (hooks, a wrapped adapter, compiled code). Then each layer runs by itself again, with
    the same results up to rounding.

    A recomputation of checkpointing has to do what its pass did. With `use_reentrant=False` it must save the same tensors: so a
    group begins only when no pass of single layers waits for its backward, and a recomputation runs as a group where a waiting pass
    did. Without, nothing tells the two apart but that gradients are off and on: so layers with dropout run by themselves in both.

    Attributes:
        layers: the module's adapted layers. members: of the group, in the order of their calls; () while there is none.
        dissolved: there was a group, and there will be none.
    """

    def __init__(self) -> None:
        self.layers: list[Linear] = []
        self.members: tuple[Linear, ...] = ()
        self.dissolved = False
        self._forget()

    def _forget(self) -> None:
        self._round: list[Linear] = []
        self._round_of: _Seen | None = None
        self._ready: dict[int, _Ready] = {}
        self._ready_in_backward = False
        self._alone: _Seen | None = None  # what the leader has run on by itself
        # passes under hooks of saved tensors
        self._apart: weakref.WeakSet[_Token] = weakref.WeakSet()
        self._joint: weakref.WeakSet[_Token] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "members": self.members, "dissolved": self.dissolved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def learned(self) -> list[Any]:
        """The group's layers, also of one that begins with its leader's next call."""
        return list(self.members) if self.members or len(self._round) < 2 else list(self._round)

    def dissolve(self) -> None:
        """Ends the group, for good."""
        self.dissolved = True
        self._ready.clear()

    def run(self, layer: Linear, adapter: Adapter, x: Tensor) -> Tensor | None:
        """The layer's output as a member of the group; None where it runs by itself."""
        ready = self._ready.pop(id(layer), None)
        if ready is not None:
            if ready.adapter is adapter and ready.seen.is_still(x) and ready.state == _state(x):
                return adapter.finish_product(ready.result, x)
            self.dissolve()
            return None
        if x.numel() < _FEWEST_TOKENS * x.shape[-1] or not any(layer is one for one in self.layers):
            return None  # a replica of `nn.DataParallel` is none of them
        in_backward = torch._C._current_graph_task_id() != -1
        if not self.members and not in_backward:
            self._observe(layer, x)
        if self.members and layer is self.members[0]:
            y = self._lead(adapter, x, in_backward)
            self._alone = _Seen(x) if y is None else None
            return y
        with_leader = self._alone is not None and self._alone.is_still(x)
        if not (in_backward or with_leader):
            self.left(layer)  # the leader did not get this tensor
        return None

    def ran_apart(self, layer: Linear, y: Tensor) -> None:
        """Notes that a layer has run by itself, for recomputations of this pass."""
        first = self.members[0] if self.members else self._round[0] if self._round else None
        if layer is first:
            _wait(y, self._apart)

    def left(self, layer: Linear) -> None:
        """Notes that a layer could not take part in a call."""
        if not self.dissolved and any(layer is one for one in self.members):
            self.dissolve()

    def _observe(self, layer: Linear, x: Tensor) -> None:
        same = self._round_of is not None and self._round_of.is_still(x)
        if same and not any(layer is one for one in self._round):
            self._round.append(layer)
            return
        if len(self._round) > 1 and not self.dissolved:
            self.members = tuple(self._round)
        self._round, self._round_of = [layer], _Seen(x)

    def _lead(self, adapter: Adapter, x: Tensor, in_backward: bool) -> Tensor | None:
        if self._ready:
            self._ready.clear()
            if not self._ready_in_backward:  # a recomputation stops where it has what it needs
                self.dissolve()
        if in_backward:
            joint = _saves_through_hooks() and self._recomputes_joint()
        else:
            waits = _saves_through_hooks() and any(not one.ran for one in self._apart)
            joint = not self.dissolved and not waits
        results = self._together(x) if joint else None
        if results is None:
            return None
        seen, state = _Seen(x), _state(x)
        for member, one, result in results[1:]:
            self._ready[id(member)] = _Ready(seen, one, state, result)
        self._ready_in_backward = in_backward
        result = results[0][2]
        if in_backward:
            torch.autograd.Variable._execution_engine.queue_callback(self._ready.clear)  # as DDP does
        else:
            _wait(result if isinstance(result, Tensor) else result[0], self._joint)
        return adapter.finish_product(result, x)

    def _recomputes_joint(self) -> bool:
        """Whether the pass that checkpointing computes again ran as a group."""
        for passes, joint in ((self._joint, True), (self._apart, False)):
            if any(not one.ran for one in passes):
                return joint
        return len(self._joint) > 0  # a backward pass once more, of a graph that was retained

    def _together(self, x: Tensor) -> list[tuple[Linear, Adapter, Tensor | tuple[Tensor, Tensor]]] | None:
        """Every member, its adapter and its result; None where they cannot run together now."""
        adapters = [member.only_adapter(x) for member in self.members]
        linears, dropouts = [], set()
        reads = False
        inputs = None
        for adapter, member in zip(adapters, self.members, strict=True):
            if adapter is None:
                return None
            inputs, dropout_p, operands = adapter.product_operands(x)
            base = member._modules["base_layer"]
            assert isinstance(base, nn.Linear), "checked by only_adapter"
            A, B, router_weight, router_bias = operands
            parameters = A, B, router_weight, router_bias, adapter.ranks, adapter.scaling
            linears.append(AdaptedLinear(base.weight, base.bias, *parameters))
            dropouts.add(dropout_p)
            reads = reads or adapter.reads_gates()
        if len(dropouts) > 1 or inputs is None:
            return None
        (dropout_p,) = dropouts
        if dropout_p and not torch.is_grad_enabled():
            return None
        results = rectified_linears(inputs, linears, dropout_p=dropout_p, return_gates=reads)
        return list(zip(self.members, adapters, results, strict=True))


class _Token:
    """A pass whose graph is there.

    Attributes:
        ran: its backward pass has come by.
    """

    ran = False


def _wait(y: Tensor, passes: weakref.WeakSet[_Token]) -> None:
    """Keeps a token among `passes` as long as y's node is there, if it may have to be computed again."""
    if y.grad_fn is None or not _saves_through_hooks() or torch._C._current_graph_task_id() != -1:
        return
    token = _Token()
    passes.add(token)
    y.grad_fn.register_hook(lambda *_: setattr(token, "ran", True))


def _saves_through_hooks() -> bool:
    """Whether tensors saved for backward go through hooks: those of checkpointing, or of offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _state(x: Tensor) -> tuple[Any, ...]:
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # a region of checkpointing has its own
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, hooks


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def note_siblings(layers: Sequence[Linear]) -> None:
    """Tells the adapted layers of one module of each other, where there are several."""
    if len(layers) < 2:
        return
    shared = next((one.info.siblings for one in layers if one.info.siblings is not None), None) or Siblings()
    for layer in layers:
        layer.info.siblings = shared
        if not any(layer is one for one in shared.layers):
            shared.layers.append(layer)


def siblings_of(model: nn.Module) -> dict[str, Siblings]:
    """The siblings of every module that has some, by the module's name."""
    found: dict[str, Siblings] = {}
    for module in model.modules():
        info: Any = getattr(module, "info", None)
        if hasattr(module, "rode_adapters") and info.siblings is not None:
            found[info.block] = info.siblings
    return found


def learned_groups(model: nn.Module) -> dict[str, list[str] | None]:
    """The groups of a model's layers: for each module their names in the order of their calls, or None where its group has been
    dissolved. Modules that have learned nothing are left out."""
    return {
        block: None if one.dissolved else [layer.info.module_name for layer in one.learned]
        for block, one in siblings_of(model).items()
        if one.dissolved or one.learned
    }


def restore_groups(model: nn.Module, groups: dict[str, list[str] | None]) -> None:
    """Gives a model what `learned_groups` found: a resumed run then begins as the stopped one would have gone on."""
    for block, one in siblings_of(model).items():
        if block not in groups:
            continue
        names = groups[block]
        by_name = {layer.info.module_name: layer for layer in one.layers}
        if names is None:
            one.dissolve()
        elif all(name in by_name for name in names):
            one.members = tuple(by_name[name] for name in names)

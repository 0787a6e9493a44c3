"""Bytes that a training step holds, counted on the *meta* device: tensors have shapes and dtypes there, and no memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from rode_kernels.torch_ops import OP, OP_BACKWARD, OP_INPLACE

_aten = torch.ops.aten
ELSEWHERE = "elsewhere"


class ByteCounter(TorchDispatchMode):
    """Counts storages from the operation that makes them until nothing holds them.

    A storage counts once, however many tensors share it. Each has a label: `label` as it was when the storage was made, or what
    `relabel` gave it. What depends on values has none on the meta device: a condition is false (so a mask is always used), a
    mask is true in `learned` places (everywhere if that is None), and selects `selected` elements.

    Attributes:
        live: bytes held now, by label. peak: the largest sum so far. at_peak: `live` as it was then.
        floating_point: operations of all products so far.
    """

    def __init__(self, learned: int | None = 0, selected: int = 0) -> None:
        super().__init__()
        self.learned, self.selected = learned, selected
        self.label = ELSEWHERE
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.floating_point = 0
        self._labels: dict[int, str] = {}

    def add(self, tensor: Tensor, label: str | None = None) -> None:
        """Count a tensor's storage, unless it is counted."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._labels:
            return
        self._labels[key] = label = self.label if label is None else label
        self.live[label] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.live.copy()
        weakref.finalize(storage, self._subtract, key, size).atexit = False

    def _subtract(self, key: int, size: int) -> None:
        self.live[self._labels.pop(key)] -= size
        self.total -= size

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Give a counted tensor another label."""
        storage = tensor.untyped_storage()
        old = self._labels[storage._cdata]
        self.live[old] -= storage.nbytes()
        self.live[label] += storage.nbytes()
        self._labels[storage._cdata] = label

    def restart(self) -> None:
        """Forget peak and operations so far."""
        self.peak, self.at_peak, self.floating_point = self.total, self.live.copy(), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _on_one_device(args, kwargs or {})
        stand_in = _STAND_INS.get(func)
        out = stand_in(self, *args, **kwargs) if stand_in is not None else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        formula = _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.floating_point += formula(*args, **kwargs, out_val=out)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self.add(value)
        return out


def _scalar(counter: ByteCounter, tensor: Tensor) -> Any:
    if not tensor.is_meta:
        return NotImplemented
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


def _on_one_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments without values, if any has none: a tower computes places from the sizes of pictures, which have values."""
    given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    if not any(t.is_meta for t in given) or all(t.is_meta or t.dim() == 0 for t in given):
        return args, kwargs

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_meta or value.dim() == 0:
            return value
        return value.to("meta")

    return tree_map(moved, (args, kwargs))


def _nonzero(counter: ByteCounter, tensor: Tensor) -> Any:
    if not tensor.is_meta:
        return NotImplemented
    rows = tensor.numel() if counter.learned is None else counter.learned
    return torch.empty(rows, tensor.dim(), dtype=torch.int64, device="meta")


def _index(counter: ByteCounter, tensor: Tensor, indices: list[Tensor | None]) -> Any:
    """`tensor[mask]`."""
    mask = indices[0]
    if len(indices) != 1 or mask is None or mask.dtype != torch.bool or not tensor.is_meta:
        return NotImplemented
    rows = mask.numel() if counter.learned is None else counter.learned
    return tensor.new_empty(rows, *tensor.shape[mask.dim() :])


def _masked_select(counter: ByteCounter, tensor: Tensor, mask: Tensor) -> Any:
    return tensor.new_empty(counter.selected) if tensor.is_meta else NotImplemented


_STAND_INS: dict[Any, Callable[..., Any]] = {
    _aten._local_scalar_dense.default: _scalar,
    _aten.nonzero.default: _nonzero,
    _aten.index.Tensor: _index,
    _aten.masked_select.default: _masked_select,
}


def _mixture_flops(x: Tensor, A: Tensor, B: Tensor, router: Tensor | None, *_: Any, **__: Any) -> int:
    """All experts open: gates cannot be known before training."""
    tokens, columns = x.numel() // x.shape[-1], A.shape[0] + (0 if router is None else router.shape[0])
    return 2 * tokens * (columns * x.shape[-1] + A.shape[0] * B.shape[0])


def _mixture_backward_flops(
    _dy: Any, _dg: Any, x: Tensor, _u: Any, _g: Any, *parameters: Any, **__: Any
) -> int:
    return 2 * _mixture_flops(x, *parameters)


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    OP: _mixture_flops,
    OP_INPLACE: _mixture_flops,
    OP_BACKWARD: _mixture_backward_flops,
}


@contextmanager
def fused_attention(on_gpu: bool) -> Iterator[None]:
    """Within this context `F.scaled_dot_product_attention` on the meta device runs what a CPU or a GPU would, where it would
    compute all scores by itself.

    Args:
        on_gpu: flash attention without a mask in 16 bit, memory-efficient attention otherwise; else the CPU's flash attention.
    """
    plain = nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not query.is_meta:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # as PyTorch does, in every layer
            attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
        if enable_gqa and key.shape[1] != query.shape[1]:
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        out: Tensor
        if not on_gpu:
            out = _aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        elif attn_mask is None and query.element_size() == 2:
            out = _aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        else:
            if attn_mask is not None:
                attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
            needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            out = _aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, needs, dropout_p, is_causal, scale=scale
            )[0]
        return out

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain

"""Whether the base layer's output is the tuner's own, to make and to write into: only where nobody else can hold that tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

# The functions that a plain linear layer runs. A library that replaces either may keep or cache the result.
_LINEAR_FORWARD, _LINEAR_FUNCTION = nn.Linear.forward, nn.functional.linear
_WEIGHTS = (Tensor, nn.Parameter)


def has_hooks(module: nn.Module) -> bool:
    """Whether anybody else is told of this module's calls: hooks on it, or accelerate's `_hf_hook`."""
    held = module.__dict__
    return (
        "_hf_hook" in held
        or bool(held["_forward_hooks"] or held["_forward_pre_hooks"])
        or bool(held["_backward_hooks"] or held["_backward_pre_hooks"])
    )


def is_plain(base: nn.Module) -> bool:
    """Whether calling `base` here and now is one product of PyTorch's that nobody else is told of, so that its caller may make the
    product itself, and owns it.

    A plain `nn.Linear` makes a new tensor at each call and keeps none. Another class may return a cached one, and so may a
    `forward` patched on the instance. Forward hooks (the module's, global ones, accelerate's `_hf_hook`, which offloading uses) may
    keep what they saw, or bring the weight. Dispatch and function modes may keep what was computed under them: selective activation
    checkpointing keeps the outputs of chosen products for its recomputation.
    """
    if type(base) is not nn.Linear or "forward" in base.__dict__:
        return False
    if has_hooks(base) or torch_module._has_any_global_hook():
        return False
    if nn.Linear.forward is not _LINEAR_FORWARD or nn.functional.linear is not _LINEAR_FUNCTION:
        return False
    if type(base._parameters.get("weight")) not in _WEIGHTS:
        return False  # a tensor subclass (quantised, sharded) decides by itself what it returns; flat parameters come and go
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False  # compiled code is functional anyway
    # A transform of torch.func may hold a result that is shared by all samples; a tangent may lie on either tensor alone.
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


class Readings(NamedTuple):
    """The places where a decision was read, for `rode_kernels.unchanged`: items of dictionaries, attributes, functions."""

    items: list[tuple[dict[str, Any], str]]
    attributes: list[tuple[Any, str]]
    functions: list[Any]


def hooks_read(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """The places where `has_hooks` looks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(module.__dict__, name) for name in ("_hf_hook", *hooks)]


def plain_read(base: nn.Module) -> Readings:
    """The places where `is_plain` looks, `torch.compiler.is_compiling` excepted, which compilers answer while they trace."""
    of_all = vars(torch_module)
    return Readings(
        [
            (base.__dict__, "forward"),
            *hooks_read(base),
            *((of_all, name) for name in of_all if name.startswith("_global_") and "hook" in name),
            (vars(nn.functional), "linear"),
            (base._parameters, "weight"),
            (base._parameters, "bias"),
            (vars(forward_ad), "_current_level"),
        ],
        [(base, "__class__"), (nn.Linear, "forward")],
        [
            torch._C._get_tracing_state,
            torch._C._functorch.maybe_current_level,
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
        ],
    )


def may_write_into(result: Tensor, base: nn.Module) -> bool:
    """Whether `result`, which `base` has just returned, belongs to its caller alone."""
    # With a bias and three dimensions F.linear returns a view, which autograd lets no function with several outputs write to.
    return is_plain(base) and type(result) is Tensor and not result._is_view()

"""The choice among a few configurations of a kernel: the fastest measured, or the default.

What is varied changes no bit: warps, stages, columns of y at once, and tokens of a tile among those that the same matrix
instruction takes. A winner is kept for a shape class (the kernel's constants, dtype, features, and the power of two that the number
of tokens rounds up to), never for an exact number of tokens. The first call of a class therefore waits for the device, and takes
256 MB to clear its cache between trials. RODE_TRITON_AUTOTUNE=off, the interpreter and a stream capture go by rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from rode_kernels.backends.triton import device
from rode_kernels.backends.triton.device import interpreted

Config = dict[str, int]  # of a kernel: sizes of its blocks that are tuned, and the compiler's options

# BLOCK_M, BLOCK_O, num_warps, num_stages
CONFIGS = (
    (64, 64, 4, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 3),
    (64, 128, 8, 3),
    (128, 64, 8, 3),
    (32, 64, 8, 3),
    (32, 64, 4, 4),
    (16, 64, 4, 4),
    (16, 128, 4, 3),
)
# The same for `expand` where it holds more than 64 columns of v: they and as many of B fill registers and shared memory.
WIDE_CONFIGS = (
    (32, 64, 8, 2),
    (32, 32, 8, 2),
    (16, 64, 8, 2),
    (16, 64, 4, 2),
)
ALWAYS = {"enable_fp_fusion": True}  # said, because what Triton does otherwise changes with its version
_winners: dict[Hashable, Config] = {}
forced: Config | None = None  # by tests: a configuration for every kernel


def _options(config: tuple[int, int, int, int], without: str) -> Config:
    names = ("BLOCK_M", "BLOCK_O", "num_warps", "num_stages")
    return {name: value for name, value in zip(names, config, strict=True) if name != without}


def _of_device(options: list[Config]) -> list[Config]:
    """Each once; AMD's have shared memory for two stages."""
    if device.amd():
        options = [{**o, "num_stages": min(2, o["num_stages"])} for o in options]
    options = [{**o, **ALWAYS} for o in options]
    return [o for i, o in enumerate(options) if o not in options[:i]]


def of_forward(
    tokens: int, element_size: int, columns: int, passes: int = 1, without: str = ""
) -> list[Config]:
    """Candidate configurations, the default first.

    Excluded are tiles of more tokens than there are, except the smallest, and tiles that take another matrix instruction than the
    default, whose sums may be rounded differently: 64 tokens and more take one, 32 and 16 others. Also excluded is what does not
    fit the registers: float32 in tiles of more than 32 tokens (16 with several passes), 16 bits with several passes in tiles of
    more than 32 by 4 warps; on AMD 64 columns in tiles of more than 32, and 128 columns of y or 32 tokens in float32 by 4 warps.

    Args:
        tokens: the most of the shape class. columns: packed columns that a program holds. passes: how often, for all of them.
        without: a name that the kernel lacks.
    """
    most = tokens if element_size == 2 else 32 if passes == 1 else 16
    if device.amd() and columns == 64:
        most = min(most, 32)
    fits = [
        o
        for o in (WIDE_CONFIGS if columns > 64 else CONFIGS)
        if o[0] <= max(16, min(tokens, most))
        and not (passes > 1 and o[0] > 8 * o[2])
        and not (device.amd() and o[2] < 8 and (o[1] > 64 or (element_size == 4 and o[0] > 16)))
    ]
    return _of_device([_options(o, without) for o in fits if min(o[0], 64) == min(fits[0][0], 64)])


def of_backward(*num_warps: int) -> list[Config]:
    """Backward's blocks decide its bits; warps and stages do not. The first number of warps is the rule's. On AMD, whose
    warps have fewer registers, it is the only one."""
    if device.amd():
        num_warps = num_warps[:1]
    return _of_device([dict(num_warps=w, num_stages=n) for n in (2, 3) for w in num_warps])


def tuned(
    kernel: str,
    constants: dict[str, Any],
    shape_class: Hashable,
    options: list[Config],
    run: Callable[..., None],
    y: Tensor,
    *,
    scratch: bool = False,
) -> None:
    """Runs `run(y, **configuration)` once, after trying configurations where none is known yet.

    Args:
        constants: the kernel's, for a winner of other constants is another kernel's. shape_class: what else decides.
        options: configurations, the one by rule first.
        y: what the kernel writes, or any tensor on its device.
        scratch: y is accumulated into, so that trials need a copy.
    """
    if forced is not None:
        return run(y, **{name: forced.get(name, value) for name, value in options[0].items()})
    autotune = os.environ.get("RODE_TRITON_AUTOTUNE", "on")
    if autotune not in ("on", "off"):
        raise ValueError(f"RODE_TRITON_AUTOTUNE: expected on or off, got {autotune!r}")
    key = (kernel, tuple(constants.items()), shape_class, y.device)
    best = _winners.get(key) if autotune == "on" else None
    if device.capturing(y):
        return _captured(kernel, run, y, best or options[0])
    if best is None and autotune == "on" and len(options) > 1 and not interpreted():
        best = _fastest(options, run, y, scratch)
        if best is not None:
            _winners[key] = best
    return run(y, **(best or options[0]))


def launch(
    module: ModuleType,
    kernel: str,
    grid: tuple[int, ...] | Callable[[dict[str, int]], tuple[int, ...]],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    shape_class: Hashable,
    options: list[Config],
    like: Tensor,
) -> None:
    """Launches a kernel of `module` whose arguments no configuration changes, tuned on the device of `like`.

    Args:
        grid: as Triton takes it: also a function of the kernel's arguments by name, configuration included.
    """

    def run(_: Tensor, **chosen: int) -> None:
        getattr(module, kernel)[grid](*arguments, **constants, **chosen)

    tuned(kernel, constants, shape_class, options, run, like)


def _fastest(options: list[Config], run: Callable[..., None], y: Tensor, scratch: bool) -> Config | None:
    """The configuration with the lowest median of some runs. None where none ran, since the default then raises the reason, or
    where memory does not suffice for trials."""
    times = []
    try:
        trial = y
        if scratch:
            trial = torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device).copy_(y)
        for option in options:
            try:
                bench = triton.testing.do_bench(
                    lambda o=option: run(trial, **o), warmup=5, rep=20, return_mode="median"
                )
            except torch.OutOfMemoryError:
                raise
            except Exception:
                # one that does not compile, or asks for more than the device has, is only not chosen
                bench = float("inf")
            times.append(bench)
    except torch.OutOfMemoryError:
        return None
    return options[times.index(min(times))] if min(times) < float("inf") else None


def _captured(kernel: str, run: Callable[..., None], y: Tensor, option: Config) -> None:
    try:
        run(y, **option)
    except Exception as error:
        raise RuntimeError(
            f"rode_kernels: the Triton kernel {kernel!r} could not be captured in a graph: one that has not run yet is compiled "
            "and loaded, which a capture does not allow; run the call once before"
        ) from error

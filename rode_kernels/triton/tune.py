"""Which of a few configurations runs a kernel: the fastest measured, or by rule.

What is varied changes no bit: warps, stages, tokens of a tile, columns of y at once. A winner is kept for a shape class (dtype,
features, ranks, and the power of two that the number of tokens rounds up to), never for an exact number of tokens.
RODE_TRITON_AUTOTUNE=off, the interpreter and a stream capture go by rule.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable

import torch
import triton
from torch import Tensor

from rode_kernels.triton import interpreted

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
_winners: dict[Hashable, dict] = {}
forced: dict | None = None  # by tests: a configuration for every kernel


def _options(config: tuple[int, int, int, int]) -> dict:
    return dict(zip(("BLOCK_M", "BLOCK_O", "num_warps", "num_stages"), config, strict=True))


def of_forward(tokens: int, element_size: int, total_rank: int) -> list[dict]:
    """By rule first. Pruned: tiles of more tokens than there are, but for the smallest; tiles of 16 where there are thousands (a
    grid has 65535 rows at most); and what does not fit the registers: float32 in tiles of more than 32 tokens, and several passes
    over v (R > 64) in tiles of more than 32 by 4 warps."""
    return [
        o
        for o in map(_options, CONFIGS)
        if o["BLOCK_M"] <= max(16, triton.next_power_of_2(tokens))
        and not (o["BLOCK_M"] == 16 and tokens > 4096)
        and not (element_size == 4 and o["BLOCK_M"] > 32)
        and not (total_rank > 64 and o["BLOCK_M"] > 8 * o["num_warps"])
    ]


def of_backward(**rule: int) -> list[dict]:
    """Backward's blocks decide its bits; warps and stages do not. By rule first."""
    others = [dict(num_warps=w, num_stages=n) for w, n in ((8, 2), (4, 2), (8, 3), (4, 3))]
    return [rule, *(o for o in others if o != rule)]


def tuned(
    kernel: str,
    shape_class: Hashable,
    tokens: int,
    options: list[dict],
    run: Callable[..., None],
    y: Tensor,
    *,
    scratch: bool = False,
) -> None:
    """Runs `run(y, **configuration)` once, after trying configurations where none is known yet.

    Args:
        options: configurations, the one by rule first.
        y: what the kernel writes, or any tensor on its device.
        scratch: y is accumulated into, so that trials need a copy.
    """
    if forced is not None:
        return run(y, **{name: forced[name] for name in options[0]})
    autotune = os.environ.get("RODE_TRITON_AUTOTUNE", "on")
    if autotune not in ("on", "off"):
        raise ValueError(f"RODE_TRITON_AUTOTUNE: expected on or off, got {autotune!r}")
    key = (kernel, shape_class, triton.next_power_of_2(max(tokens, 1)), y.device)
    if key in _winners and autotune == "on":
        return run(y, **_winners[key])
    if autotune == "off" or interpreted() or torch.cuda.is_current_stream_capturing():
        return run(y, **options[0])
    trial = y.clone() if scratch else y
    times = []
    for option in options:
        try:
            times.append(
                triton.testing.do_bench(
                    lambda o=option: run(trial, **o), warmup=5, rep=20, return_mode="median"
                )
            )
        except (
            Exception
        ):  # one that does not compile, or asks for more than the device has, is only not chosen
            times.append(float("inf"))
    _winners[key] = options[times.index(min(times))]  # the one by rule if none ran: it then says why
    return run(y, **_winners[key])

"""Rows of the benchmarks, by name. Nothing that takes time is imported, so that they can be listed quickly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

PAPER = (2, 4, 8, 16)
DROPOUT = 0.05
"""The default of the tuner, in training."""
RUN = 256
PASSES = ("forward", "in place", "backward", "both", "both in place")
"""What is timed: y in a new tensor, y added into base, all gradients alone, a forward pass and all gradients, and that with y added
into a base that is no parameter."""


class Shape(NamedTuple):
    """Rows of `python -m benchmarks mixture`.

    Attributes:
        open: shares of (token, expert) pairs whose gate is not 0, a row for each.
        run: so many tokens in a row open the same experts, as the tokens of one task do; 1 where each token's are drawn for itself.
        dropout: probability. params_fp32: parameters are float32 beside x in 16 bits.
    """

    tokens: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...] = PAPER
    open: tuple[float, ...] = (0.5,)
    run: int = 1
    dropout: float = 0.0
    params_fp32: bool = False


def as_configs_run(tokens: int, width: int) -> Shape:
    """A layer in training by a config: dropout, and parameters in float32."""
    return Shape(tokens, width, width, dropout=DROPOUT, params_fp32=True)


SHARES = (0.1, 0.25, 0.5, 1.0)
ON_CPU = {
    "tokens-1024": Shape(1024, 4096, 4096),
    "tokens-64": Shape(64, 4096, 4096),
    "tokens-1": Shape(1, 4096, 4096),
    "width-576": Shape(512, 576, 576),
    "runs": Shape(1024, 4096, 4096, run=RUN),
    "experts-16": Shape(1024, 4096, 4096, (16,) * 16, SHARES),
    "experts-16-runs": Shape(1024, 4096, 4096, (16,) * 16, (0.1,), RUN),
    "config-4096": as_configs_run(1024, 4096),
    "config-576": as_configs_run(1024, 576),
}
ON_GPU = {f"tokens-{M}": Shape(M, 4096, 4096) for M in (1, 16, 64, 512, 2048, 8192, 65536)} | {
    "width-11008": Shape(8192, 4096, 11008),
    "runs": Shape(8192, 4096, 4096, run=RUN),
    "experts-8": Shape(8192, 4096, 4096, (8,) * 8),
    "experts-16": Shape(8192, 4096, 4096, (16,) * 16, SHARES),
    "experts-16-runs": Shape(8192, 4096, 4096, (16,) * 16, (0.1,), RUN),
    "config-4096": as_configs_run(8192, 4096),
}


class BlockCase(NamedTuple):
    """Rows of `python -m benchmarks block`.

    Attributes:
        targets: the adapted layers.
        checkpointing: the block's activations are computed again in backward.
        others: also the loop over LoRA layers and X-LoRA, which take longest.
    """

    targets: tuple[str, ...]
    checkpointing: bool = False
    others: bool = False


QV = ("q_proj", "v_proj")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ON_BLOCK = {
    "qv": BlockCase(QV, others=True),
    "qv-checkpointed": BlockCase(QV, checkpointing=True),
    "all": BlockCase(SEVEN),
    "all-checkpointed": BlockCase(SEVEN, checkpointing=True),
}
"""The first is the main row."""

T = TypeVar("T")


def chosen(everything: Mapping[str, T], names: Sequence[str] | None, option: str = "--cases") -> dict[str, T]:
    """The named ones, in their own order; all without names.

    Raises:
        SystemExit: a name is not known.
    """
    unknown = [name for name in names or () if name not in everything]
    if unknown:
        raise SystemExit(f"{option}: expected some of {', '.join(everything)}; got {', '.join(unknown)}")
    return {name: value for name, value in everything.items() if not names or name in names}

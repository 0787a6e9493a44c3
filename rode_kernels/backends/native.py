"""The compiled modules as backends use them: how one is loaded, and how a problem is described to it."""

from __future__ import annotations

import importlib
from typing import Any

import torch  # before a native module: both then share torch's OpenMP runtime

from rode_kernels.operands import Settings

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # as in csrc/problem.h


def load(name: str, missing: str) -> tuple[Any, str]:
    """A compiled module of this package, which has no types; or None, and why: `missing`, if this build has none."""
    try:
        return importlib.import_module(f"rode_kernels.{name}"), ""
    except ModuleNotFoundError:
        return None, missing
    except ImportError as error:
        return None, f"the native module does not load: {error}"


def problem_arguments(
    dtype: torch.dtype, tokens: int, in_features: int, out_features: int, settings: Settings
) -> dict[str, object]:
    """The arguments that every pass of every native module takes."""
    mixture, dropout_p, dense = settings
    return dict(
        dtype=_DTYPES[dtype],
        tokens=tokens,
        in_features=in_features,
        out_features=out_features,
        ranks=mixture.ranks,
        scaling=mixture.scaling_with_dropout(dropout_p),
        dropout_p=dropout_p,
        dense=dense,
    )

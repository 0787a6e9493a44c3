"""Validation of a `RodeConfig`: types field by field, and which choices go together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

from rode.tuner.fields import (
    AUX_LOSSES,
    COMBINES,
    GATES,
    ROUTER_INITS,
    ROUTER_INPUTS,
    SCALINGS,
    SCOPES,
    RodeFields,
)

_SOFT = ("softmax", "topk", "threshold", "expert-choice")  # gates made of a softmax
_AUX_WEIGHTS = {"load-balance": 0.01, "importance": 0.01, "l1": 1e-8}


def check(config: RodeFields) -> None:
    """Puts a configuration's values into their types and fills in what follows from them.

    Raises:
        TypeError, ValueError: naming the field, what it got and what was wanted.
    """
    _check_experts(config)
    _check_router_values(config)
    _check_router(config)
    _check_gate(config)
    _check_combination(config)
    _check_aux(config)
    _check_scaling(config)
    _check_modules(config)


def _check_experts(config: RodeFields) -> None:
    config.ranks = _ranks("ranks", config.ranks)
    config.alpha = _positive("alpha", config.alpha)
    if not _is_real(config.dropout) or not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout: expected a number in [0, 1), got {config.dropout!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(name, getattr(config, name))
    config.rank_pattern = {k: _ranks(f"rank_pattern[{k!r}]", v) for k, v in config.rank_pattern.items()}
    config.alpha_pattern = {k: _positive(f"alpha_pattern[{k!r}]", v) for k, v in config.alpha_pattern.items()}


def _check_router_values(config: RodeFields) -> None:
    for name, allowed in (
        ("gate", GATES),
        ("router_input", ROUTER_INPUTS),
        ("router_init", ROUTER_INITS),
        ("router_per", SCOPES),
        ("expert_per", SCOPES),
        ("combine", COMBINES),
        ("aux_loss", AUX_LOSSES),
    ):
        _choice(name, getattr(config, name), allowed)
    for name in (
        "router_bias",
        "normalize",
        "scale_by_gate",
        "shared_A",
        "norm_experts",
        "universal_expert",
        "init_weights",
    ):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name}: expected True or False, got {getattr(config, name)!r}")
    for name in ("num_ids", "embedding_dim", "top_k"):
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
        setattr(config, name, int(value))
    for name in ("temperature", "capacity", "max_threshold"):
        if getattr(config, name) is not None:
            setattr(config, name, _positive(name, getattr(config, name)))


def _check_router(config: RodeFields) -> None:
    """Where logits come from."""
    if not config.routed:
        _need_defaults(
            config,
            "gate='none' has no router",
            "router_input",
            "num_ids",
            "embedding_dim",
            "router_per",
            "expert_per",
            "router_bias",
            "router_init",
            "universal_expert",
            "norm_experts",
            "combine",
            "aux_loss",
        )
        return
    by_id = config.router_input in ("task", "cluster")
    if by_id and config.num_ids is None:
        raise ValueError(
            f"router_input={config.router_input!r} reads a table: say how many {config.router_input}s there are in num_ids"
        )
    if not by_id:
        _need_defaults(
            config,
            f"router_input={config.router_input!r} reads no ids",
            "num_ids",
            "embedding_dim",
        )
    if config.router_input == "constant" and config.router_per == "block":
        raise ValueError(
            "router_per='block' shares what is computed from an input; router_input='constant' has none"
        )
    if config.table_of_logits and config.router_bias:
        raise ValueError(
            f"router_bias: router_input={config.router_input!r} has a table of logits, which is all bias; leave it out"
        )
    if config.router_init == "open" and not (
        config.gate == "relu" and (config.router_bias or config.table_of_logits)
    ):
        raise ValueError(
            "router_init='open' starts relu gates at 1 through the router's bias: it needs gate='relu' and router_bias=True, "
            f"got gate={config.gate!r} and router_bias={config.router_bias}"
        )


def _check_gate(config: RodeFields) -> None:
    """Checks of the gate and its options."""
    gate = config.gate
    if gate == "topk":
        if config.top_k is None:
            raise ValueError("gate='topk': say how many experts each token gets in top_k")
        routed = config.routed_experts(len(config.ranks))
        if config.top_k > routed:
            raise ValueError(f"top_k: expected at most the {routed} routed experts, got {config.top_k}")
        if config.normalize and not config.scale_by_gate:
            raise ValueError(
                "normalize: gates of 1 (scale_by_gate=False) are not to be normalised; set one of them"
            )
    else:
        _need_defaults(config, f"gate={gate!r} chooses no k experts", "top_k", "scale_by_gate")
    if gate not in ("softmax", "topk", "threshold", "sigmoid", "gumbel-sigmoid", "expert-choice"):
        _need_defaults(config, f"gate={gate!r} divides by no temperature", "temperature")
    if gate not in ("topk", "sigmoid", "gumbel-sigmoid", "threshold"):
        _need_defaults(config, f"gate={gate!r} is not normalised afterwards", "normalize")
    if gate != "threshold":
        _need_defaults(config, f"gate={gate!r} has no threshold", "max_threshold")
    elif config.router_input != "token":
        raise ValueError(
            f"gate='threshold' learns a threshold for each token, got router_input={config.router_input!r}; use 'token'"
        )
    if gate == "expert-choice":
        if config.router_input != "token":
            raise ValueError(
                f"gate='expert-choice': experts choose among tokens, got router_input={config.router_input!r}"
            )
        config.capacity = 2.0 if config.capacity is None else config.capacity
    else:
        _need_defaults(config, f"gate={gate!r} has no capacity", "capacity")
    if config.universal_expert:
        if gate not in ("softmax", "topk", "threshold"):
            raise ValueError(
                f"universal_expert: its gate is 1 minus the largest, which wants gates of at most 1 that sum to 1 or less; "
                f"got gate={gate!r}"
            )
        if not config.scale_by_gate:
            raise ValueError("universal_expert: with scale_by_gate=False its gate would always be 0")
        if config.normalize and config.top_k == 1:
            raise ValueError("universal_expert: a normalised top-1 gate is always 1, which leaves it 0")
        for name, ranks in _all_ranks(config):
            if len(ranks) < 3:
                raise ValueError(
                    f"universal_expert: {name} needs two routed experts beside it (one alone has all), got {ranks}"
                )


def _check_combination(config: RodeFields) -> None:
    """How experts make one output."""
    alike = [(name, ranks) for name, ranks in _all_ranks(config) if len(set(ranks)) > 1]
    if config.shared_A and alike:
        raise ValueError(
            f"shared_A: experts that share A have its rank, got {alike[0][0]}={alike[0][1]}; give equal ranks"
        )
    if config.norm_experts and config.constant_gates:
        raise ValueError(
            "norm_experts: normalised activations are no matrix; with constant gates set it to False"
        )
    if config.combine == "factors":
        if config.router_input == "token":
            raise ValueError(
                "combine='factors' averages A and B once for a sequence, but router_input='token' has gates for each token; use "
                "'task', 'cluster', 'sequence' or 'constant'"
            )
        if alike:
            raise ValueError(
                f"combine='factors' averages matrices of one shape, got {alike[0][0]}={alike[0][1]}; give equal ranks"
            )
        if config.shared_A or config.universal_expert or config.norm_experts:
            raise ValueError(
                "combine='factors' goes with none of shared_A, universal_expert and norm_experts"
            )
        if not isinstance(config.scaling, str) and len(set(config.scaling)) > 1:
            raise ValueError(
                f"combine='factors' has one scaling for the averaged pair, got scaling={config.scaling}"
            )
    if config.expert_per == "block" and not (
        config.gate == "topk"
        and config.normalize
        and config.router_input == "token"
        and config.router_per == "block"
        and not config.universal_expert
    ):
        raise ValueError(
            "expert_per='block' runs the block once for each of top_k experts, under gates that sum to 1: it needs gate='topk', "
            "normalize=True, router_input='token' and router_per='block', without universal_expert"
        )


def _check_aux(config: RodeFields) -> None:
    kind = config.aux_loss
    if kind == "none":
        _need_defaults(config, "aux_loss='none'", "aux_weight")
    elif config.aux_weight is None:
        config.aux_weight = _AUX_WEIGHTS[kind]
    elif not _is_real(config.aux_weight) or config.aux_weight < 0:
        raise ValueError(f"aux_weight: expected a number >= 0, got {config.aux_weight!r}")
    if not config.scale_by_gate and kind != "load-balance":
        raise ValueError(
            f"scale_by_gate=False leaves the router to aux_loss='load-balance' alone, got aux_loss={kind!r}: it would never learn"
        )
    if kind == "load-balance" and config.gate not in _SOFT[:3]:
        raise ValueError(
            f"aux_loss='load-balance' balances a softmax, got gate={config.gate!r}; use one of {', '.join(_SOFT[:3])}"
        )
    if kind == "l1" and config.gate not in ("relu", "sigmoid"):
        raise ValueError(
            f"aux_loss='l1' closes gates that nothing else bounds, got gate={config.gate!r}; use 'relu' or 'sigmoid'"
        )
    if config.target_sparsity is not None:
        if kind != "l1" or config.gate != "relu":
            raise ValueError("target_sparsity steers aux_loss='l1' on relu gates: set both, or leave it out")
        if not _is_real(config.target_sparsity) or not 0 < config.target_sparsity < 1:
            raise ValueError(
                f"target_sparsity: expected a share between 0 and 1, got {config.target_sparsity!r}"
            )
        if config.aux_weight == 0:
            raise ValueError("aux_weight: target_sparsity multiplies it, and 0 stays 0; start above 0")
    if kind != "importance":
        _need_defaults(config, f"aux_loss={kind!r} has no groups", "aux_groups", "aux_delta")
    elif config.aux_groups is None:
        _need_defaults(config, "aux_loss='importance' without aux_groups", "aux_delta")
    else:
        groups = config.aux_groups
        if (
            isinstance(groups, str)
            or not isinstance(groups, Sequence)
            or not groups
            or set(groups) - {0, 1}
            or any(isinstance(g, bool) for g in groups)
        ):
            raise ValueError(f"aux_groups: expected 0 or 1 for each task, got {groups!r}")
        config.aux_groups = tuple(groups)
        config.aux_delta = 0.1 if config.aux_delta is None else config.aux_delta
        if not _is_real(config.aux_delta) or not 0 <= config.aux_delta <= 1:
            raise ValueError(f"aux_delta: expected a number in [0, 1], got {config.aux_delta!r}")
        if config.router_input == "task" and config.num_ids != len(groups):
            raise ValueError(
                f"aux_groups: expected one for each of {config.num_ids} tasks, got {len(groups)}"
            )


def _check_scaling(config: RodeFields) -> None:
    config.scaling = _scaling(config.scaling)
    if isinstance(config.scaling, str):
        return
    for name, ranks in _all_ranks(config):
        if len(ranks) != len(config.scaling):
            raise ValueError(
                f"scaling: expected one number per expert, got {len(config.scaling)} for the {len(ranks)} experts of {name}"
            )


def _check_modules(config: RodeFields) -> None:
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str):
            _check_regex(name, value)
        elif value is not None:
            if not all(isinstance(entry, str) and entry for entry in value):
                raise TypeError(f"{name}: expected module names or one regex, got {value!r}")
            setattr(config, name, set(value))
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None and isinstance(config.target_modules, str):
            raise ValueError(
                f"{name} selects among names: give target_modules as a list, or put the layers into its regex"
            )
    if config.layers_pattern is not None and config.layers_to_transform is None:
        raise ValueError("layers_pattern says where layers_to_transform counts: set both or neither")


def _all_ranks(config: RodeFields) -> list[tuple[str, tuple[int, ...]]]:
    return [("ranks", config.ranks), *((f"rank_pattern[{k!r}]", v) for k, v in config.rank_pattern.items())]


def _need_defaults(config: RodeFields, why: str, *names: str) -> None:
    fields = type(config).__dataclass_fields__
    for name in names:
        default, value = fields[name].default, getattr(config, name)
        if value != default:
            raise ValueError(f"{name}: {why}, so it must stay {default!r}; got {value!r}")


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _ranks(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise TypeError(f"{name}: expected one rank per expert, such as (2, 4, 8, 16), got {value!r}")
    for rank in value:
        if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
            raise ValueError(f"{name}: expected positive whole numbers, got {rank!r} in {value!r}")
    return tuple(int(rank) for rank in value)


def _positive(name: str, value: object) -> float:
    if not _is_real(value) or value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _scaling(value: object) -> str | tuple[float, ...]:
    if isinstance(value, str):
        _choice("scaling", value, SCALINGS)
        return value
    if not isinstance(value, Sequence) or not all(_is_real(factor) for factor in value):
        raise TypeError(
            f"scaling: expected one of {', '.join(map(repr, SCALINGS))}, or one finite number per expert, got {value!r}"
        )
    return tuple(float(factor) for factor in value)


def _check_pattern(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping from regex to value, got {value!r}")
    for pattern in value:
        _check_regex(name, pattern)


def _check_regex(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({error})") from None

"""LoRAHub (arXiv 2307.13269): plain-LoRA adapters become one, by coefficients that are found without gradients on a few examples.

A = sum_i w_i A_i and B = sum_i w_i B_i, each w_i in [-1.5, 1.5]: the matrices are averaged, not their products. The search is
nevergrad's NGOpt from w = 0, over the loss plus 0.05 mean |w_i|, as in LoRAHub's code. What differs here:
- The loss is the mean over the answers' tokens. There it is divided by the number of examples once more, so that its
  penalty weighs as many times more.
- The result is the best vector that was tried. There it is the optimizer's recommendation, which may be one that was not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from rode.tuner import RodeConfig, RodeLayer
from rode.vlm import PixelSource, PromptEncoder, TrainingCollator, answer_loss
from rode.vlm.collator import PictureSource
from rode.vlm.families import family_of
from rode.vlm.load import base_model
from rode_food import Example

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from rode.vlm.load import Model

BOUND, PENALTY, BUDGET, EXAMPLES = 1.5, 0.05, 40, 5  # LoRAHub's


@dataclass(frozen=True)
class Evaluation:
    """One vector that was tried: its coefficients, its loss, and the loss plus the penalty."""

    weights: tuple[float, ...]
    loss: float
    objective: float


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        best: the evaluation with the smallest objective, the first of equals.
        evaluations: all of them, in their order.
        optimizer: what NGOpt stands for with this number of coefficients and this budget.
    """

    best: Evaluation
    evaluations: list[Evaluation]
    optimizer: str


def find_coefficients(
    loss: Callable[[tuple[float, ...]], float],
    n: int,
    budget: int = BUDGET,
    seed: int = 0,
    bound: float = BOUND,
    penalty: float = PENALTY,
) -> Search:
    """Minimise `loss(w) + penalty * mean |w_i|` over w in [-bound, bound]^n, starting from 0.

    Args:
        loss: a function of n numbers. A value that is not finite counts as worse than any other.
        n: how many coefficients. budget: how often the loss may be computed. seed: of the search.

    Raises:
        ImportError: nevergrad is not installed. ValueError: no loss was finite.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError(
            "coefficients are searched for with nevergrad: pip install 'rode[compose]'"
        ) from error
    if n < 1 or budget < 1:
        raise ValueError(f"n and budget: expected at least 1, got {n} and {budget}")
    evaluations: list[Evaluation] = []

    def objective(values: Iterable[float]) -> float:
        weights = tuple(float(value) for value in values)
        got = float(loss(weights))
        total = got + penalty * sum(map(abs, weights)) / n
        evaluations.append(Evaluation(weights, got, total))
        return total if math.isfinite(total) else 1e20  # nevergrad clips infinity, and takes NaN badly

    space = nevergrad.p.Array(init=[0.0] * n, lower=[-bound] * n, upper=[bound] * n)
    space.random_state.seed(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget)
    name = optimizer.optim.name  # Cobyla for LoRAHub's budget, whatever n
    if "MetaModel" in name:
        # Excluded, though large budgets get it: it fits a model between the steps of another optimizer, for as long as a clock
        # allows, and fails under numpy 2.4 (nevergrad 1.0.12). The other optimizer alone repeats itself.
        name = "CMA" if n > 1 else "OnePlusOne"
        optimizer = nevergrad.optimizers.registry[name](parametrization=space, budget=budget)
    with warnings.catch_warnings():
        # How nevergrad calls scipy and cma is no concern of the caller's.
        warnings.filterwarnings("ignore", message="COBYLA: Invalid RHOEND|orphanated injected solution")
        optimizer.minimize(objective)
    finite = [evaluation for evaluation in evaluations if math.isfinite(evaluation.objective)]
    if not finite:
        raise ValueError(f"loss: not finite for any of {len(evaluations)} vectors of coefficients")
    return Search(min(finite, key=lambda e: e.objective), evaluations, name)


def check_composable(configs: Mapping[str, PeftConfig]) -> None:
    """Checks that need the configurations alone.

    Args:
        configs: PEFT configurations by the name that an error gives them.

    Raises:
        ValueError: an adapter is no plain LoRA, or they differ in rank or in the modules that they save.
    """
    known: dict[str, RodeConfig] = {}
    for name, config in configs.items():
        if not isinstance(config, RodeConfig):
            raise ValueError(
                f"{name}: expected a RoDE adapter with gate 'none', got a {config.peft_type} adapter"
            )
        if config.gate != "none" or len(config.ranks) != 1:
            raise ValueError(
                f"{name}: expected plain LoRA (gate 'none', one rank), got gate {config.gate!r} and ranks {list(config.ranks)}; "
                "LoRAHub composes no mixtures"
            )
        known[name] = config
        first, like = next(iter(known.items()))
        if config.ranks != like.ranks:
            raise ValueError(
                f"{name} has rank {config.ranks[0]}, but {first} has {like.ranks[0]}; LoRAHub adds up the matrices "
                "themselves, which takes equal ranks"
            )
        if set(config.modules_to_save or ()) != set(like.modules_to_save or ()):
            raise ValueError(
                f"{name} saves the modules {config.modules_to_save or []}, but {first} {like.modules_to_save or []}; "
                "train all with the same ones, frozen"
            )


@torch.no_grad()
def compose_adapters(model: PeftModel, names: Sequence[str], weights: Sequence[float], into: str) -> None:
    """Fills the adapter `into` with `sum_i w_i A_i` and `sum_i w_i B_i`, in place; the first call adds it, and activates nothing.

    Its output is `scaling * (sum_i w_i B_i) (sum_i w_i A_i) x`, for the scaling that the adapters have in common.

    Args:
        model: with adapters. names: of its adapters. weights: a finite number for each. into: another name.

    Raises:
        ValueError: naming what is unknown, or what the adapters do not agree in.
    """
    if not names or len(names) != len(weights):
        raise ValueError(f"weights: expected one per adapter, got {len(weights)} for {len(names)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights: expected finite numbers, got {list(weights)}")
    if unknown := [name for name in names if name not in model.peft_config]:
        raise ValueError(f"adapters: {unknown} not in the model, which has {sorted(model.peft_config)}")
    if into in names:
        raise ValueError(f"into: {into!r} is one of the adapters to compose; give another name")
    check_composable({f"adapter {name!r}": model.peft_config[name] for name in names})
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RodeLayer)}
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    _check_layers(layers, names)
    _check_modules(wrappers, names)
    if into not in model.peft_config:
        model.add_adapter(into, replace(model.peft_config[names[0]]))
        for wrapper in wrappers.values():
            if names[0] in wrapper.modules_to_save:
                state = wrapper.modules_to_save[names[0]].state_dict()
                wrapper.modules_to_save[into].load_state_dict(state)
    _check_layers(layers, [names[0], into])
    _check_modules(wrappers, [names[0], into])
    for layer in layers.values():
        if into not in layer.rode_adapters:
            continue
        sums = layer.adapter(into)
        sums.A.zero_()
        sums.B.zero_()
        for name, weight in zip(names, weights, strict=True):
            sums.A.add_(layer.adapter(name).A, alpha=weight)
            sums.B.add_(layer.adapter(name).B, alpha=weight)


def _check_layers(layers: Mapping[str, RodeLayer], names: Sequence[str]) -> None:
    for where, layer in layers.items():
        have = [name for name in names if name in layer.rode_adapters]
        if have and len(have) < len(names):
            lacking = next(name for name in names if name not in layer.rode_adapters)
            raise ValueError(
                f"adapter {have[0]!r} adapts {where}, adapter {lacking!r} does not: they cannot become one"
            )
        adapters = {name: layer.adapter(name) for name in have}
        ranks = {name: adapter.ranks for name, adapter in adapters.items()}
        scaling = {name: adapter.scaling for name, adapter in adapters.items()}
        for field, of in (("rank", ranks), ("scaling", scaling)):
            for name in have:
                if of[name] != of[have[0]]:
                    raise ValueError(
                        f"{where}: adapter {have[0]!r} has {field} {of[have[0]][0]:g}, adapter {name!r} {of[name][0]:g}; "
                        "A and B are added up apart, so all must have the same"
                    )


def _check_modules(wrappers: Mapping[str, ModulesToSaveWrapper], names: Sequence[str]) -> None:
    for where, wrapper in wrappers.items():
        copies = [wrapper.modules_to_save[name] for name in names if name in wrapper.modules_to_save]
        if any(not _same(module, copies[0]) for module in copies):
            raise ValueError(
                f"{where}: adapters {list(names)} were saved with different weights of it; train all with the same one, frozen"
            )


def _same(module: nn.Module, other: nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(tensor, others[key]) for key, tensor in module.state_dict().items())


def few_shot_loss(
    model: Model,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    *,
    prompt: str = "auto",
    batch_size: int = 8,
    source: PictureSource | None = None,
) -> Callable[[], float]:
    """A function that computes the mean cross-entropy over the answers' tokens, for the model as it is when called.

    Args:
        model: a vision-language model, with or without adapters. processor: its processor.
        examples: see `rode_food.Example`; their batches are made once, and kept on the model's device.
        prompt: as the adapters were trained. source: pictures; None reads them (`PixelSource`).
    """
    if not examples:
        raise ValueError("examples: expected at least one to compute a loss on, got none")
    encoder = PromptEncoder(processor, prompt, family=family_of(base_model(model)))
    collate = TrainingCollator(encoder, source or PixelSource(processor))
    batches = [collate(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]
    labels = [batch.pop("labels") for batch in batches]
    total = sum((rows[:, 1:] != -100).sum() for rows in labels)
    for batch in batches:
        del batch["truncated"]

    @torch.no_grad()
    def loss() -> float:
        model.eval()
        head = model.get_output_embeddings()
        parts = zip(batches, labels, strict=True)
        return float(sum(answer_loss(model, head, batch, rows, total) for batch, rows in parts))

    return loss


def compose(
    model: PeftModel,
    names: Sequence[str],
    loss: Callable[[], float],
    into: str = "composed",
    *,
    budget: int = BUDGET,
    seed: int = 0,
    bound: float = BOUND,
    penalty: float = PENALTY,
) -> Search:
    """Adds the adapter `into`, with the coefficients that the search finds best, and activates it.

    No vector costs more than the adapter's own tensors and what `loss` does.

    Args:
        model: with adapters. names: of its adapters. loss: of the model as it is when called, such as `few_shot_loss` makes.
        budget, seed, bound, penalty: see `find_coefficients`.
    """

    def of(weights: Sequence[float]) -> float:
        compose_adapters(model, names, weights, into)
        return loss()

    compose_adapters(model, names, [0.0] * len(names), into)
    model.set_adapter(into)
    search = find_coefficients(of, len(names), budget, seed, bound, penalty)
    compose_adapters(model, names, search.best.weights, into)
    return search

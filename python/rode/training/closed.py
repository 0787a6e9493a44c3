"""Gates that have closed for good, and gradients that are zero: said once, while there is time to stop."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rode.processes import is_main
from rode.tuner.statistics import GateReport

logger = logging.getLogger(__name__)
_MEND = (
    "a closed gate gets no gradient and may never open again; look at the router's bias and initialisation, or lower "
    "training.learning_rate"
)


class ClosedGates:
    """Counts for how many steps in a row all gates of a layer, or of an expert in every layer, were closed.

    Args:
        steps: so many give a warning, once for each.
    """

    def __init__(self, steps: int = 100) -> None:
        self.steps = steps
        self._last: int | None = None
        self._closed: dict[str, int] = {}  # what -> steps in a row
        self._told: set[str] = set()

    def update(self, report: GateReport, step: int) -> dict[str, float]:
        """Take in the gates of all steps since the last call; the numbers of closed ones, for the log.

        Args:
            report: of those steps. step: the last of them.
        """
        span = 1 if self._last is None else step - self._last  # after a resume it is not known
        self._last = step
        layers = [(layer, rates) for layer in report.layers if (rates := layer.open_rate["all"]) is not None]
        closed = {f"all gates of {layer.name}" for layer, rates in layers if not any(rates)}
        whole = len(closed)
        experts: dict[tuple[str, int, int], bool] = {}
        for layer, rates in layers:
            for i, rate in enumerate(rates):
                key = (layer.adapter, i, layer.ranks[i])
                experts[key] = experts.get(key, True) and rate == 0
        everywhere = [key for key, shut in experts.items() if shut]
        closed |= {
            f"the gates of expert {i} (rank {rank}, adapter {adapter!r}) in all layers"
            for adapter, i, rank in everywhere
        }
        self._closed = {what: self._closed.get(what, 0) + span for what in closed}
        new = [
            what
            for what, steps in sorted(self._closed.items())
            if steps >= self.steps and what not in self._told
        ]
        self._told.update(new)
        if new and is_main():  # all processes know the same
            more = f" (and {len(new) - 1} more)" if len(new) > 1 else ""
            logger.warning(
                "step %d: %s%s have been closed for %d steps: %s",
                step,
                new[0],
                more,
                self._closed[new[0]],
                _MEND,
            )
        dead = sum(rate == 0 for _, rates in layers for rate in rates)
        return {
            "gates/closed_layers": whole,
            "gates/dead_experts": len(everywhere),
            "gates/dead_experts_of_layers": dead,
        }


class ZeroGradients:
    """Counts steps in a row whose gradient norm is 0, on the device.

    Args:
        steps: so many give one warning.
    """

    def __init__(self, steps: int = 20) -> None:
        self.steps = steps
        self._zero: Tensor | None = None
        self._most: Tensor | None = None
        self._told = False

    def add(self, norm: Tensor | float) -> None:
        """Take in the norm of a step; waits for nothing."""
        norm = torch.as_tensor(norm)
        before = torch.zeros_like(norm) if self._zero is None else self._zero.to(norm.device)
        self._zero = torch.where(norm == 0, before + 1, 0.0)
        self._most = self._zero if self._most is None else torch.maximum(self._most, self._zero)

    def tell(self, step: int) -> None:
        """Warn where it is due; waits for the device."""
        if not self._told and self._most is not None and float(self._most) >= self.steps:
            self._told = True
            if not is_main():
                return
            logger.warning(
                "step %d: the gradient of all that is trained has been 0 for %d steps, so nothing is learned: %s",
                step,
                self.steps,
                _MEND,
            )

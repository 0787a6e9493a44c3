"""The factor by which a loss is multiplied before its backward pass, so that gradients in float16 do not vanish."""

from __future__ import annotations

from torch.amp.grad_scaler import GradScaler


class LossScale(GradScaler):
    """torch's scaler with a least factor of 1.

    A step whose gradient overflows is left out, and the factor is halved. At 1 nothing is scaled any more: what is not finite then
    is so by itself, and `training.on_nonfinite` decides.
    """

    LEAST = 1.0

    @property
    def may_overflow(self) -> bool:
        """Whether a gradient that is not finite may come from the factor."""
        return self.get_scale() > self.LEAST

    def update(self, new_scale: object = None) -> None:
        super().update(new_scale)  # type: ignore[arg-type]  # float or Tensor, as torch says
        if self.get_scale() < self.LEAST:
            super().update(self.LEAST)

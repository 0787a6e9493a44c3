"""LLaVA-1.5: older checkpoints' processors lack what counts a picture's tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rode.vlm.families import Family

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor

logger = logging.getLogger(__name__)
# Tokens that a tower puts before its patches (CLS, registers), by model type.
_EXTRA_TOKENS = {"clip_vision_model": 1, "dinov2": 1, "siglip_vision_model": 0}


def fit_processor(processor: LlavaProcessor, config: LlavaConfig) -> None:
    """Make the processor count a picture's tokens as the model does: older checkpoints lack the fields for it."""
    vision: Any = config.vision_config  # of the tower's own class, which transformers does not say
    wanted = {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": _EXTRA_TOKENS.get(
            vision.model_type, processor.num_additional_image_tokens
        ),
    }
    for name, value in wanted.items():
        if (got := getattr(processor, name)) != value:
            logger.warning(
                "the processor's %s is %r; the model's configuration says %r, which is used", name, got, value
            )
            setattr(processor, name, value)


def _prepare(config: Any, processor: Any) -> None:
    fit_processor(processor, config)


FAMILY = Family(prepare=_prepare)

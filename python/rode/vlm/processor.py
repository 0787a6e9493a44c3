"""A checkpoint's processor, without its video half where torchvision is missing.

transformers reads videos with torchvision alone, and its processors of Qwen-VL, LLaVA-OneVision, SmolVLM and InternVL
have a video half, so `AutoProcessor` refuses their checkpoints where torchvision is missing. Their picture half is
PIL's and complete: it is loaded here under the processor's own name.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from rode.vlm.pretrained import from_pretrained

logger = logging.getLogger(__name__)


def pictures_only(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class with no video half: the same name, the same call for text and pictures."""

    class PicturesOnly(cls):  # type: ignore[misc, valid-type]
        # SmolVLM's apply_chat_template reads both, whether there is a video or not.
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(self) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(self, *args: Any, **kwargs: Any) -> list[Any]:
            # None: the third argument of every such class, which SmolVLM's does not make optional
            return [*super()._get_arguments_from_pretrained(*args, **kwargs), None]

        @classmethod
        def from_args_and_dict(self, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            module = sys.modules[cls.__module__]
            if getattr(module, "num2words", True) is not None:
                return super().from_args_and_dict(args, processor_dict, **kwargs)
            with patch.object(module, "num2words", str):  # SmolVLM asks for it, for the captions of videos
                return super().from_args_and_dict(args, processor_dict, **kwargs)

        def __reduce__(self) -> tuple[Any, ...]:  # by name pickle would find the class with a video half
            return _restored, (cls, self.__dict__)

    PicturesOnly.__name__ = PicturesOnly.__qualname__ = cls.__name__
    return PicturesOnly


def _restored(cls: type[ProcessorMixin], values: dict[str, Any]) -> ProcessorMixin:
    kind = pictures_only(cls)
    processor = kind.__new__(kind)
    processor.__dict__.update(values)
    return processor


def load_processor(path: str | Path, config: PretrainedConfig) -> Any:
    """Load what `AutoProcessor` loads, and without torchvision the picture half of what it refuses.

    Args:
        path: of the checkpoint. config: its configuration.

    Raises:
        ValueError: see `rode.vlm.pretrained.from_pretrained`.
    """
    cls: Any = PROCESSOR_MAPPING.get(type(config), None)
    if cls is None or is_torchvision_available() or "video_processor" not in cls.get_attributes():
        return from_pretrained(AutoProcessor, path)
    logger.info(
        "%s: torchvision is missing, so that it reads pictures (with PIL) and no videos", cls.__name__
    )
    return from_pretrained(pictures_only(cls), path)

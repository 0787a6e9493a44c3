"""LLaVA-RoDE: food-domain fine-tuning with rectified mixtures of LoRA experts (arXiv 2407.12730).

Importing `rode` makes PEFT know the method "RODE", which `PeftModel.from_pretrained` needs in a fresh process. It loads neither
torch nor PEFT: the method is registered when PEFT is imported, before or after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rode.registration import register_with_peft

if TYPE_CHECKING:
    from rode.tuner import RodeConfig, RodeModel

__version__ = "0.1.0"

__all__ = ["RodeConfig", "RodeModel"]

register_with_peft()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rode import tuner

        return getattr(tuner, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

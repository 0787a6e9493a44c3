"""LLaVA-RoDE: food-domain fine-tuning with rectified mixtures of LoRA experts (arXiv 2407.12730).

Importing `rode` registers the method with PEFT, which `PeftModel.from_pretrained` needs in a fresh process.
"""

from __future__ import annotations

from rode.tuner import RodeConfig, RodeModel

__version__ = "0.1.0"

__all__ = ["RodeConfig", "RodeModel"]

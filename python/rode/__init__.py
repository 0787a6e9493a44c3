"""LLaVA-RoDE: food-domain fine-tuning with rectified mixtures of LoRA experts (arXiv 2407.12730)."""

from __future__ import annotations

__version__ = "0.1.0"

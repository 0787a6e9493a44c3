"""Vision-language models: loading, prompts, batches, precomputed vision features, the loss on answers."""

from rode.vlm.collator import IGNORE, GenerationCollator, TrainingCollator
from rode.vlm.features import FeatureSource, PixelSource, accept_features
from rode.vlm.images import image_problems, open_image
from rode.vlm.load import load_adapter, load_projector, load_vlm, save_projector
from rode.vlm.loss import answer_loss
from rode.vlm.prompts import Features, Prompt, PromptEncoder, render_prompt

__all__ = [
    "IGNORE",
    "FeatureSource",
    "Features",
    "GenerationCollator",
    "PixelSource",
    "Prompt",
    "PromptEncoder",
    "TrainingCollator",
    "accept_features",
    "answer_loss",
    "image_problems",
    "load_adapter",
    "load_projector",
    "load_vlm",
    "open_image",
    "render_prompt",
    "save_projector",
]

"""A start for the projector that costs seconds: patches learn the words of what they show, without a language model.

LLaVA's stage 1 teaches a projector through the whole language model, which at 16 questions a step takes a CPU more
than a second each; from a random start most of them go into finding out which patch has to do with which word. That
part needs no language model: the word embeddings are known, and which foods a picture holds stands in its record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from rode.vlm.features import FeatureSource
from rode.vlm.load import get_projector
from rode_food import Example
from rode_food.progress import Progress

if TYPE_CHECKING:
    from transformers import ProcessorMixin

BATCH = 64
LEARNING_RATE = 1e-3
PULL = 10.0  # weight of the distance from words to their nearest patches
SHARPNESS = 12.0  # logit of a cosine of 1; the offset is learned


@dataclass(frozen=True)
class Alignment:
    """`losses`: binary cross-entropy of each step; `words`: what was aligned to, in order."""

    losses: list[float]
    words: list[str]


def ingredient_words(examples: Sequence[Example], at_least: int = 5, most: int = 500) -> list[str]:
    """Ingredient names that at least so many ingredient examples hold, the most frequent ones, sorted."""
    counts = Counter(name for e in examples if e.task == "ingredients" for name in e.reference)
    return sorted(name for name, count in counts.most_common(most) if count >= at_least)


def word_vectors(model: Any, tokenizer: Any, words: Sequence[str]) -> torch.Tensor:
    """(words, hidden) float32: the mean of the token embeddings of each word as it stands within a text."""
    table = model.get_input_embeddings().weight.detach()
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    return torch.stack([table[i].float().mean(0) for i in ids])


def align_words(
    model: Any,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    source: FeatureSource,
    *,
    steps: int,
    seed: int,
    progress: bool = True,
) -> Alignment:
    """Train the projector, in place and in float32, so that each ingredient of a picture has a patch near its word.

    The logit of an ingredient is the largest cosine, over a picture's projected patches, with the word's embedding,
    both taken from the mean embedding. The loss is binary cross-entropy over all `ingredient_words`, plus the distance
    (1 - cosine) of the words that are there, plus the squared relative deviation of the patches' norms from the words'.

    Args:
        model, processor: a LLaVA with a random projector.
        examples: for training; those of task "ingredients" are used.
        source: a `rode.vlm.FeatureSource` of this model.
        steps: of 64 pictures each.
        seed: of the batches.

    Raises:
        ValueError: no ingredient occurs often enough to be learned.
    """
    examples = [e for e in examples if e.task == "ingredients"]
    words = ingredient_words(examples)
    if not words:
        raise ValueError("no ingredient occurs in five records or more: too few records to train on")
    projector = get_projector(model).float().requires_grad_(True)
    skip_cls = int(source.crop_cls)
    features = torch.stack(
        [source(e.image).states[skip_cls:].float() for e in examples]
    )  # (pictures, patches, hidden)
    present = torch.tensor([[float(word in e.reference) for word in words] for e in examples])
    centre = model.get_input_embeddings().weight.detach().float().mean(0)
    vectors = word_vectors(model, processor.tokenizer, words)
    norm, directions = vectors.norm(dim=1).mean(), F.normalize(vectors - centre, dim=1)
    offset = torch.nn.Parameter(torch.tensor(-3.0))
    groups = [{"params": [*projector.parameters()], "lr": LEARNING_RATE}, {"params": [offset], "lr": 1e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in Progress(range(steps), desc="word alignment", unit="step", show=progress):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = torch.randint(len(features), (BATCH,), generator=generator)
        patches = projector(features[rows]) - centre
        lengths = patches.norm(dim=-1, keepdim=True)
        cosines = ((patches / lengths) @ directions.T).amax(1)  # (batch, words)
        loss = F.binary_cross_entropy_with_logits(SHARPNESS * cosines + offset, present[rows])
        distance = ((1 - cosines) * present[rows]).sum() / present[rows].sum().clamp(min=1)
        # Weighted so that telling words apart comes first, then coming close to them, then the norms.
        total = 10 * loss + PULL * distance + ((lengths / norm - 1) ** 2).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(loss.item())
    projector.requires_grad_(False)
    return Alignment(losses, words)

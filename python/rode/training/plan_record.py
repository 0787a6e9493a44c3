"""The records that a plan counts with: sizes from the model's processor, or from its configuration where that is all there is."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from rode.training.meta_step import Record, read_config
from rode.vlm import PixelSource, PromptEncoder
from rode.vlm.families import family_of
from rode.vlm.load import read_processor
from rode_food.data_mixture import load_examples

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rode.training.config import Experiment

logger = logging.getLogger(__name__)
_ANSWER = 512  # tokens of question and answer where the config sets no limit
_QUESTION = 64  # tokens of a prompt beside its picture, where no processor can tell

# LLaVA-1.5's text models: what differs from transformers' LlavaConfig()
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {},
    "llava-1.5-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def architecture(name: str) -> PretrainedConfig:
    """The configuration of a published model, without any file."""
    from transformers import LlamaConfig, LlavaConfig

    return LlavaConfig(text_config=LlamaConfig(vocab_size=32064, **_ARCHITECTURES[name]))


def model_config(experiment: Experiment, name: str | None) -> PretrainedConfig:
    """The configuration of the architecture `name`, or of the config's model."""
    return read_config(experiment.model.path) if name is None else architecture(name)


def record_to_plan(
    experiment: Experiment,
    config: PretrainedConfig,
    *,
    from_files: bool,
    tokens: int | None = None,
    answer_tokens: int | None = None,
    picture: tuple[int, int] = (1024, 768),
) -> Record:
    """The longest record of a run.

    Args:
        config: the model's. from_files: the model's folder may hold a processor.
        tokens: in all; None for training.max_length, or else 512 beside prompt and picture.
        answer_tokens: of the answer; None for all but picture and question.
        picture: width and height, which decide how many tokens some processors make.

    Raises:
        ValueError: the picture's tokens leave no room for an answer, or the picture's tokens are not known.
    """
    encoded = _encoded(experiment, picture) if from_files else None
    prompt, picture_tokens, vision, by_token = encoded or _from_config(config)
    total = tokens or experiment.training.max_length or prompt + _ANSWER
    if total < prompt + 2:
        raise ValueError(
            f"--tokens: expected more than {prompt + 1}, which a picture ({picture_tokens} tokens) and a short question take, got "
            f"{total}; give more, or raise training.max_length"
        )
    learned = min(answer_tokens or total - prompt, total - picture_tokens - 1)
    return Record(total, learned, picture_tokens, vision, by_token)


_Sizes = tuple[int, int, dict[str, torch.Tensor], tuple[str, ...]]


def _encoded(experiment: Experiment, size: tuple[int, int]) -> _Sizes | None:
    """Tokens of a short prompt, those of its picture, tensors of the picture, and inputs with a number for each token; None without
    a processor."""
    folder = Path(os.path.expanduser(experiment.model.path))
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    processor, config = read_processor(folder)
    encoder = PromptEncoder(processor, experiment.model.prompt, family=family_of(config))
    blank = Image.new("RGB", size)
    source = PixelSource(processor, experiment.model.picture_shape)
    if source.shape == "pad":
        blank = Image.new("RGB", (max(size), max(size)))
    row = encoder.encode_prompt("What is it?", [blank])
    image_token = getattr(config, "image_token_id", encoder.image_token_id)
    picture_tokens = sum(token == image_token for token in row.input_ids)
    return row.prompt_length, picture_tokens, dict(row.vision), tuple(row.by_token)


def _from_config(config: Any) -> _Sizes:
    if config.model_type != "llava":
        raise ValueError(
            f"model.path: expected the processor's files beside config.json for {config.model_type!r}, found none; they say how "
            "many tokens a picture takes"
        )
    side = config.vision_config.image_size
    tokens = (side // config.vision_config.patch_size) ** 2
    tokens += config.vision_feature_select_strategy == "full"
    pixels = torch.empty(1, 3, side, side, device="meta")
    return tokens + _QUESTION, tokens, {"pixel_values": pixels}, ()


def count_examples(experiment: Experiment) -> int | None:
    """Training examples of an epoch (packs, where questions share a picture, are not made); None where a source is not there."""
    from rode.training.train import data_sources

    seed = experiment.training.seed
    try:
        return len(
            load_examples(data_sources(experiment), "train", wording=experiment.data.wording, seed=seed)
        )
    except OSError as error:
        logger.info("data.sources: not counted (%s); --examples N gives the number", error)
        return None

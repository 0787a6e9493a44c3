"""Options that several commands share, and the model that they name."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rode_food.commands.options import positive

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from rode.training.config import Experiment
    from rode.training.side_inputs import Routes
    from rode.vlm.collator import PictureSource


def model_options(adapter: bool = True, answers: bool = True) -> argparse.ArgumentParser:
    """A parent parser: which model, with `adapter` which adapter, with `answers` how long they may be."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", metavar="DIR", help="checkpoint directory of a vision-language model")
    if adapter:
        model.add_argument(
            "--adapter", metavar="DIR", help="adapter: an output_dir or a checkpoint-N of `rode train`"
        )
        model.add_argument(
            "--strict",
            action="store_true",
            help="refuse an adapter that was trained on another model, or edited since (else a warning)",
        )
    model.add_argument("--projector", metavar="PATH", help="projector.safetensors of stage 1, or its folder")
    model.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of frozen weights")
    model.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")
    model.add_argument(
        "--prompt", choices=("vicuna", "chat_template", "auto"), help="as the adapter was trained"
    )
    if answers:
        model.add_argument(
            "--max-new-tokens", type=positive, metavar="N", help="longest answer (default 256)"
        )
    model.add_argument("--batch-size", type=positive, metavar="N", help="questions at a time (default 8)")
    return model


def saved_experiment(adapter: str | None) -> Experiment | None:
    """The config beside an adapter that `rode train` wrote (one folder up for a checkpoint), or None."""
    from rode.training.config import load_experiment, saved_config

    if adapter is None:
        return None
    file = saved_config(Path(adapter)) or saved_config(Path(adapter).parent)
    return None if file is None else load_experiment(file)


class Loaded(NamedTuple):
    """Model, processor, prompt style and source of pictures that the options and the config name."""

    model: Any
    processor: Any
    prompt: str
    source: PictureSource


def load(args: argparse.Namespace, experiment: Experiment | None = None, *, stored: bool = False) -> Loaded:
    """The model, with its adapter if one is named.

    Args:
        args: see `model_options`.
        experiment: the config; None for the one beside the adapter.
        stored: take pictures' features from the folder in which the config keeps them, if it keeps them.

    Raises:
        ValueError: nothing names a model, or with --strict the adapter was saved otherwise than it would be used here.
    """
    from rode.training.config import ModelConfig
    from rode.vlm import PixelSource, load_adapter, load_vlm
    from rode.vlm.image_features import feature_source

    experiment = experiment or saved_experiment(args.adapter)
    if experiment is None and args.model is None:
        raise ValueError("no model: give --model DIR, or an --adapter that `rode train` wrote")
    config = experiment.model if experiment else ModelConfig(path=args.model)
    base, processor = load_vlm(
        args.model or config.path,
        dtype=args.dtype or config.dtype,
        device=args.device or config.device,
        attention=config.attention,
        projector=args.projector or config.projector,
    )
    with all_of_it_must_fit(getattr(args, "strict", False)):
        model = load_adapter(base, args.adapter) if args.adapter else base
    stored = stored and config.vision_features == "disk"
    source: PictureSource
    if stored or config.picture_pool != 1:
        directory = config.features_dir if stored else None
        source = feature_source(model, processor, directory, config.picture_shape, pool=config.picture_pool)
    else:
        source = PixelSource(processor, config.picture_shape)
    return Loaded(model, processor, args.prompt or config.prompt, source)


@contextmanager
def all_of_it_must_fit(strict: bool) -> Iterator[None]:
    """With `strict`, an adapter that is loaded here and does not belong to its model is a ValueError, not a warning."""
    from rode.tuner.fingerprint import AdapterMismatch

    with warnings.catch_warnings():
        if strict:
            warnings.simplefilter("error", AdapterMismatch)
        try:
            yield
        except AdapterMismatch as error:
            raise ValueError(f"{error} (--strict)") from None


def routes(args: argparse.Namespace, model: Any, processor: ProcessorMixin) -> Routes:
    """The side inputs of the adapter's router."""
    from rode.training.clusters import clusters_beside
    from rode.training.side_inputs import make_routes

    clusters = None if args.adapter is None else clusters_beside(args.adapter)
    return make_routes(getattr(model, "active_peft_config", None), model, processor, clusters)

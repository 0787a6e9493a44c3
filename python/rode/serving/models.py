"""What a server serves: one base model, and adapters on it, each under a name."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rode.baselines.moe_llava import MOE_CONFIG
from rode.evaluation.generate import greedy_settings
from rode.serving.choice import Grammars
from rode.serving.errors import ApiError, wrong
from rode.training.clusters import clusters_beside
from rode.training.experiment import ModelConfig
from rode.training.side_inputs import Routes, make_routes
from rode.vlm import GenerationCollator, PixelSource, PromptEncoder
from rode.vlm.families import family_of
from rode.vlm.features import FeatureSource
from rode.vlm.image_features import feature_source
from rode.vlm.load import base_model, language_model, load_adapter, load_vlm
from rode.vlm.prompts import Encoded, Picture
from rode_food import TASKS

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import GenerationConfig


@dataclass(frozen=True)
class Found:
    """An adapter to be served: its folder, and what its config says of the model (None where no config is beside it)."""

    folder: Path
    config: ModelConfig | None


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() or (folder / MOE_CONFIG).is_file()


def adapters_in(path: Path) -> list[Path]:
    """The adapters that a path names: itself, or those in the folder; none for a checkpoint of a model.

    Raises:
        FileNotFoundError: it is a folder with neither.
    """
    if is_adapter(path):
        return [path]
    if not path.is_dir() or (path / "config.json").is_file():
        return []  # a checkpoint or a name of the hub, which `load_vlm` judges
    found = sorted(folder for folder in path.iterdir() if is_adapter(folder))
    if not found:
        raise FileNotFoundError(
            f"{path}: no adapter here (adapter_config.json), none in its folders, and no model (config.json)"
        )
    return found


@dataclass(frozen=True)
class Prepared:
    """A question that a model can be asked.

    Attributes:
        question, task: its text and its task, for routers that read them.
        row: the prompt; None as long as the tower has not run.
        pixels: of each picture as the tower takes them, where the row waits for the tower.
        prompt_tokens: of the row; 0 while it waits.
    """

    question: str
    task: str | None
    row: Encoded | None
    pixels: tuple[torch.Tensor, ...] = ()


class Tokenizers:
    """A model's tokenizer for several threads, of which each copy serves one at a time.

    Args:
        processor: of the model. vocabulary: entries of its logits.

    Attributes:
        lock: held while the processor's own tokenizer works.
        text: a copy for the thread that decodes.
    """

    def __init__(self, processor: Any, vocabulary: int) -> None:
        self.lock = threading.Lock()
        self.text = copy.deepcopy(processor.tokenizer)
        self._vocabulary = vocabulary
        self._grammars: dict[frozenset[int], Grammars] = {}

    def grammars(self, ends: frozenset[int]) -> Grammars:
        """Schemas for answers that these tokens end."""
        return self._grammars.setdefault(ends, Grammars(self.text, sorted(ends), self._vocabulary))


def tokenizers(model: Any, processor: Any) -> Tokenizers:
    return Tokenizers(processor, base_model(model).get_output_embeddings().weight.shape[0])


class ServedModel:
    """One name that can be asked.

    Args:
        name: what clients call it.
        model: the vision-language model, under PEFT or not. processor: its processor.
        adapter: PEFT's name of the adapter; None for the base alone.
        prompt: see `rode.vlm.prompts.render_prompt`.
        source: `PixelSource`, or `FeatureSource` for features that are pooled.
        routes: what the adapter's router reads.
        shared: the tokenizer, which all adapters on a model share; None makes it.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        adapter: str | None = None,
        prompt: str = "auto",
        source: PixelSource | FeatureSource | None = None,
        routes: Routes | None = None,
        shared: Tokenizers | None = None,
    ) -> None:
        self.name, self.model, self.adapter = name, model, adapter
        self.source = source or PixelSource(processor)
        self.encoder = PromptEncoder(processor, prompt, family=family_of(base_model(model)))
        self.routes = routes or Routes(None)
        shared = shared or tokenizers(model, processor)
        self.lock, self.text_tokenizer = shared.lock, shared.text
        self.collate = GenerationCollator(self.encoder, self.source, self.routes)
        self.ends = frozenset(self.settings(1).eos_token_id or ())
        self.grammars = shared.grammars(self.ends)
        positions = getattr(language_model(model).config, "max_position_embeddings", None)
        self.context = int(positions) if positions else None
        self.created = int(time.time())

    def settings(self, max_new_tokens: int) -> GenerationConfig:
        return greedy_settings(self.model, self.encoder, max_new_tokens)

    def prepare(self, question: str, task: str | None, images: Sequence[Image]) -> Prepared:
        """What can be done without the model. Raises ApiError for a question that this model cannot be asked."""
        if self.routes.reads_tasks and task not in TASKS:
            raise wrong(
                "task",
                f"expected one of {', '.join(TASKS)}, which the router of {self.name!r} reads, got {task!r}",
            )
        try:
            with self.lock:
                if isinstance(self.source, FeatureSource):
                    shaped = [self.source.pictures.shaped(image) for image in images]
                    pixels = tuple(self.source.pictures.pixels_of(image) for image in shaped)
                    return Prepared(question, task, None, pixels)
                pictures = [self.source.shaped(image) for image in images]
                return Prepared(question, task, self.encoder.encode_prompt(question, pictures))
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def row(self, prepared: Prepared) -> Encoded:
        """The prompt; on the thread that owns the model, whose tower may have to run."""
        if prepared.row is not None:
            return prepared.row
        assert isinstance(self.source, FeatureSource), "others' rows are made before"
        pictures: list[Picture] = [self.source.features(self.source.states(p)) for p in prepared.pixels]
        try:
            with self.lock:
                return self.encoder.encode_prompt(prepared.question, pictures)
        except ValueError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def check_length(self, row: Encoded, max_tokens: int) -> None:
        """Raises ApiError for a prompt that leaves no room for so many tokens in the model's context."""
        total = len(row.input_ids) + max_tokens
        if self.context is not None and total > self.context:
            raise ApiError(
                400,
                f"messages: the prompt has {len(row.input_ids)} tokens, pictures included, and with max_tokens={max_tokens} "
                f"that is more than the {self.context} of the model's context",
                param="messages",
                code="context_length_exceeded",
            )

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model with this adapter, or with none."""
        disabled = getattr(self.model, "disable_adapter", None)
        if self.adapter is not None:
            if self.model.active_adapter != self.adapter:
                self.model.set_adapter(self.adapter)
            yield self.model
        else:
            with disabled() if disabled is not None else nullcontext():
                yield self.model

    def batch(self, prepared: Sequence[Prepared], rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The inputs of `generate`, on the model's device."""
        made = self.collate.join(rows, [p.question for p in prepared], [p.task for p in prepared])
        return {name: tensor.to(self.model.device) for name, tensor in made.items()}


def _source(model: Any, processor: Any, config: ModelConfig | None) -> PixelSource | FeatureSource:
    if config is None or config.picture_pool == 1:
        return PixelSource(processor, "processor" if config is None else config.picture_shape)
    made = feature_source(model, processor, None, config.picture_shape, pool=config.picture_pool)
    assert isinstance(made, FeatureSource), "others are refused with a pool"
    return made


def _names(base: str, adapters: Sequence[Found]) -> tuple[str, list[str]]:
    """The base's name and the adapters': those of their folders."""
    names = [found.folder.resolve().name for found in adapters]
    name = Path(base).name or base
    return (f"{name}-base" if name in names else name), names


def _same_model(adapters: Sequence[Found], given: Mapping[str, object]) -> None:
    """Raises ValueError for adapters that were trained on different models, where no option says which is meant."""
    for key in ("path", "projector"):
        values = {str(f.folder): getattr(f.config, key) for f in adapters if f.config is not None}
        if given[key] is None and len(set(values.values())) > 1:
            text = ", ".join(f"{value} ({folder})" for folder, value in values.items())
            option = "model" if key == "path" else key
            raise ValueError(
                f"one server has one base model, and these adapters were trained with different model.{key}: {text}; serve them "
                f"apart, or give --{option}"
            )


def load_models(
    base: str | None,
    adapters: Sequence[Found],
    *,
    dtype: str | None = None,
    device: str | None = None,
    projector: str | None = None,
    prompt: str | None = None,
) -> dict[str, ServedModel]:
    """Load a model and its adapters; by name, the adapters first.

    Args:
        base: the checkpoint; None for the one that the first adapter's config names.
        adapters: on it.
        dtype, device, projector, prompt: instead of what the config says.

    Raises:
        ValueError: nothing names a model, or the adapters belong to different ones. Else see `load_vlm` and `load_adapter`.
    """
    configs = [found.config for found in adapters if found.config is not None]
    if base is None and not configs:
        raise ValueError("no model: give --model DIR, or an adapter that `rode train` wrote")
    _same_model(adapters, {"path": base, "projector": projector})
    config = configs[0] if configs else ModelConfig(path=str(base))
    path = base or config.path
    mixtures = [found.folder for found in adapters if (found.folder / MOE_CONFIG).is_file()]
    if mixtures and len(adapters) > 1:
        raise ValueError(f"{mixtures[0]}: a MoE-LLaVA changes the model itself, so it is served alone")
    model: Any
    model, processor = load_vlm(
        path,
        dtype=dtype or config.dtype,
        device=device or config.device,
        attention=config.attention,
        projector=projector or config.projector,
    )
    for index, found in enumerate(adapters):
        model = load_adapter(model, found.folder, f"adapter{index}")
    model.requires_grad_(False).eval()
    base_name, names = _names(path, adapters)
    shared, served = tokenizers(model, processor), {}
    for index, (name, found) in enumerate(zip(names, adapters, strict=True)):
        of = found.config or config
        adapter = None if mixtures else f"adapter{index}"
        peft_config = None if adapter is None else model.peft_config[adapter]
        routes = make_routes(peft_config, model, processor, clusters_beside(found.folder))
        source = _source(model, processor, of)
        served[name] = ServedModel(
            name, model, processor, adapter, prompt or of.prompt, source, routes, shared
        )
    if not mixtures:
        source = _source(model, processor, config)
        served[base_name] = ServedModel(
            base_name, model, processor, None, prompt or config.prompt, source, None, shared
        )
    return served

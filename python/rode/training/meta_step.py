"""One training step on the *meta* device: the model, adapter, loss and optimizer of a config, with shapes and without values."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PolyConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from rode.training.arguments import checkpointing_options
from rode.training.base_weights import part_of, rates_of
from rode.training.memory import ELSEWHERE, ByteCounter, fused_attention
from rode.training.train import make_trainable
from rode.training.trainer import parameter_groups
from rode.vlm.load import (
    base_model,
    get_projector,
    input_embeddings,
    language_model,
    pick_dtype,
)
from rode.vlm.loss import answer_loss
from rode.vlm.pretrained import from_pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rode.training.config import Experiment
    from rode.vlm.load import Model

WEIGHTS, ADAPTER, PROJECTOR = "frozen weights", "adapter", "projector"
BASE = "trained weights of the base model"
GRADIENTS, OPTIMIZER = "gradients", "optimizer"
INPUTS, FEATURES, LOGITS, WORK = "inputs", "picture features", "logits and loss", "backward pass"
LAYER = "layer "


@dataclass(frozen=True)
class Record:
    """The sizes of one record of a batch.

    Attributes:
        tokens: of picture, question and answer. learned: of the answer, whose logits are computed.
        picture_tokens: those of `tokens` that stand for pictures.
        vision: what the processor makes of a record's pictures, by name; none if pictures are not counted.
        by_token: names of inputs that have a number for each token.
    """

    tokens: int
    learned: int
    picture_tokens: int = 0
    vision: dict[str, Tensor] = field(default_factory=dict)
    by_token: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepCount:
    """What one step of one device takes.

    Attributes:
        peak: most bytes held at once. at_peak: by label, as they were then.
        saved: bytes held between forward and backward pass, by label.
        floating_point: operations of all products, of one micro-batch.
        uncounted: why the vision tower's pass is not in the numbers; "" if it is.
    """

    peak: int
    at_peak: dict[str, int]
    saved: dict[str, int]
    floating_point: int
    uncounted: str = ""


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a vision-language model's folder; no other file of it is read.

    Raises:
        FileNotFoundError: no such folder. ValueError: no vision-language model.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    folder = os.path.expanduser(path)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise FileNotFoundError(
            f"model.path: {path}: expected a folder with the model's config.json, found none; get that file (weights are not "
            "read), or give --architecture llava-1.5-7b"
        )
    config: PretrainedConfig = from_pretrained(AutoConfig, folder)
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{path}: expected a vision-language model, got the type {config.model_type!r}")
    return config


def meta_model(config: PretrainedConfig, experiment: Experiment) -> Model:
    """The model that `experiment` trains, on the meta device, in training mode.

    Raises:
        ValueError: the experts of MoE-LLaVA in 16 bit, which run under autocast, and the meta device has none.
    """
    if experiment.adapter.get("method") == "moe-llava" and experiment.model.dtype != "float32":
        raise ValueError(
            f"adapter.method: a plan of moe-llava needs model.dtype float32, got {experiment.model.dtype}; its experts run "
            "under autocast, which shapes alone cannot show"
        )
    # one of flash attention needs a package that may not be here; `fused_attention` counts what it holds
    attention = experiment.model.attention
    options = {} if attention is None or "flash" in attention else {"attn_implementation": attention}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=pick_dtype(experiment.model.dtype), **options
        )
    if experiment.model.projector is not None:  # stage 1 saves float32
        get_projector(model).float()
    model = make_trainable(model, experiment)
    base_model(model).config.use_cache = False  # as Trainer does
    return model.train()


def set_checkpointing(model: Model, wanted: bool) -> None:
    """Turn gradient checkpointing on or off, as Trainer does."""
    base: Any = base_model(model)
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()) == wanted:
        return  # to turn it on twice would leave hooks behind
    if wanted:
        options = checkpointing_options(True, [f"{name}_checkpointing"])[f"{name}_checkpointing_kwargs"]
        getattr(base, f"{name}_checkpointing_enable")(**{f"{name}_checkpointing_kwargs": options})
        return
    getattr(base, f"{name}_checkpointing_disable")()
    if getattr(base, "_require_grads_hooks", None):  # stay behind, and would have autograd record the tower
        base.disable_input_require_grads()


def count_step(
    model: Model,
    experiment: Experiment,
    record: Record,
    micro_batch: int,
    *,
    on_gpu: bool = True,
    checkpointing: bool | None = None,
) -> StepCount:
    """Bytes and operations of a step that is not the first one.

    Args:
        model: see `meta_model`.
        record: each of the batch.
        micro_batch: records of one forward and backward pass.
        on_gpu: count what a GPU runs: its attention, its optimizer's joint steps.
        checkpointing: None for what the config says.
    """
    training = experiment.training
    set_checkpointing(model, training.gradient_checkpointing if checkpointing is None else checkpointing)
    hidden = input_embeddings(model).shape[1]
    counter = ByteCounter(selected=micro_batch * record.picture_tokens * hidden)
    trained = [p for p in model.parameters() if p.requires_grad]
    with _unchecked(), _labelled(model, counter), counter, fused_attention(on_gpu), torch.device("meta"):
        _add_weights(model, counter)
        optimizer = _optimizer(model, experiment, counter, on_gpu)
        if training.gradient_accumulation == 1:
            optimizer.zero_grad()
        counter.restart()
        counter.label = INPUTS
        inputs, labels, vision = _inputs(model, record, micro_batch)
        # The guard against losses that are not finite keeps a step's batches, to run one again.
        kept = [_copies(vision) for _ in range(training.gradient_accumulation - 1)]
        counter.label, counter.learned, before = FEATURES, None, counter.floating_point
        embedded, held, uncounted = _embedded(model, experiment, inputs.pop("input_ids"), vision, record)
        counter.label, counter.learned = ELSEWHERE, micro_batch * record.learned
        head = model.get_output_embeddings()
        loss = answer_loss(
            model, head, {"inputs_embeds": embedded, **inputs}, labels, torch.empty((), dtype=torch.int64)
        )
        del embedded, held
        saved = dict(counter.live)
        counter.label = WORK
        loss.backward()
        operations = counter.floating_point - before
        del loss
        counter.label = OPTIMIZER
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        del kept
        result = StepCount(counter.peak, dict(+counter.at_peak), saved, operations, uncounted)
    for parameter in trained:
        parameter.grad = None
    return result


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(value) for name, value in tensors.items()}


def _add_weights(model: Model, counter: ByteCounter) -> None:
    labels = {"adapter": ADAPTER, "projector": PROJECTOR}
    parts = part_of(model)
    for parameter in model.parameters():
        part = parts.get(parameter)
        counter.add(parameter, WEIGHTS if part is None else labels.get(part, BASE))
    for buffer in model.buffers():
        counter.add(buffer, WEIGHTS)


def _optimizer(
    model: Model, experiment: Experiment, counter: ByteCounter, on_gpu: bool
) -> torch.optim.Optimizer:
    """AdamW after its first step, with its moments, and gradients."""
    training = experiment.training
    counter.label = GRADIENTS
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    counter.label = OPTIMIZER
    groups = parameter_groups(model, rates_of(experiment), training.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, training.learning_rate, (training.betas[0], training.betas[1]), foreach=on_gpu
    )
    optimizer.step()
    return optimizer


def _inputs(
    model: Model, record: Record, micro_batch: int
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """A batch: inputs, labels, and those of pictures."""
    shape = micro_batch, record.tokens

    def integers(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int64)

    inputs = {name: integers(*shape) for name in ("input_ids", "attention_mask", *record.by_token)}
    labels = integers(*shape)
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "router_input", None) == "sequence":
        inputs["rode_prompt_mask"] = torch.empty(shape, dtype=torch.bool)
    names = [getattr(config, "id_input", None)]
    if getattr(config, "aux_groups", None) is not None:
        names.append("rode_task_ids")
    if isinstance(config, PolyConfig):
        names.append("task_ids")
    inputs.update({name: integers(micro_batch) for name in names if name is not None})
    vision = {}
    for name, value in record.vision.items():
        sizes = micro_batch * value.shape[0], *value.shape[1:]
        if value.is_floating_point():
            vision[name] = torch.empty(sizes, dtype=value.dtype)
        else:  # sizes of pictures, which decide shapes
            vision[name] = value.repeat(micro_batch, *[1] * (value.dim() - 1))
    return inputs, labels, vision


def _embedded(
    model: Model, experiment: Experiment, ids: Tensor, vision: dict[str, Tensor], record: Record
) -> tuple[Tensor, Any, str]:
    """Embeddings of a batch with the pictures' features in their places, what the model holds beside them, and why the tower was
    not run, or "".

    A model looks for the places of pictures by the values of its ids, which are not there; so this stands in for that.
    """
    embedded: Tensor = model.get_input_embeddings()(ids)
    if not record.picture_tokens:
        return embedded, None, ""
    features, why = _features(model, experiment, vision)
    rows = ids.shape[0] * record.picture_tokens
    if features is None or features.numel() != rows * embedded.shape[-1]:
        if features is not None:
            why = f"its features are {tuple(features.shape)}, for {rows} tokens"
        features = torch.empty(rows, embedded.shape[-1], dtype=embedded.dtype)
    places = torch.empty(ids.shape, dtype=torch.bool).unsqueeze(-1).expand_as(embedded)
    features = features.to(embedded.dtype)
    return embedded.masked_scatter(places, features), (features, places), why


def _features(model: Model, experiment: Experiment, vision: dict[str, Tensor]) -> tuple[Tensor | None, str]:
    """What tower and projector make of the pictures; None, and why, where that cannot be counted."""
    inner = base_model(model).model
    if experiment.model.vision_features != "live":
        return None, "" if experiment.stage == "adapter" else "features are stored"
    if not vision:
        return None, "the shape of pictures is not known without the model's processor"
    if not hasattr(inner, "get_image_features"):
        return None, f"{type(inner).__name__} has no get_image_features"
    takes = inspect.signature(inner.get_image_features).parameters
    given = {name: value for name, value in vision.items() if name in takes}
    try:
        with torch.device(
            "cpu"
        ):  # sizes of pictures have values, and so have the places that are computed from them
            out = inner.get_image_features(**given, return_dict=True).pooler_output
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        return None, f"its sizes depend on values ({type(error).__name__})"
    if isinstance(out, (list, tuple)):
        out = torch.cat([one.flatten(0, -2) for one in out])
    return out, ""


@contextmanager
def _unchecked() -> Iterator[None]:
    """Within this context distributions (PEFT's Poly draws from one) do not look at the values of their parameters."""
    cls = torch.distributions.Distribution
    before = cls._validate_args
    cls.set_default_validate_args(False)
    try:
        yield
    finally:
        cls.set_default_validate_args(before)


@contextmanager
def _labelled(model: Model, counter: ByteCounter) -> Iterator[None]:
    """Within this context storages are labelled by the layer that makes them, and gradients as such."""
    text = language_model(model)
    lists = [child for child in text.modules() if isinstance(child, nn.ModuleList)]
    blocks = max(lists, key=len, default=nn.ModuleList())
    handles = []
    for i, block in enumerate(blocks):
        handles += _label_calls(block, counter, f"{LAYER}{i}")
    head = model.get_output_embeddings()
    handles.append(head.register_forward_pre_hook(_start(counter, LOGITS)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(
                parameter.register_post_accumulate_grad_hook(
                    lambda p: None if p.grad is None else counter.relabel(p.grad, GRADIENTS)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _start(counter: ByteCounter, label: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if counter.label != WORK:  # else checkpointing computes it again
            counter.label = label

    return hook


def _label_calls(block: nn.Module, counter: ByteCounter, label: str) -> list[Any]:
    return [
        block.register_forward_pre_hook(_start(counter, label)),
        block.register_forward_hook(_start(counter, ELSEWHERE)),
    ]

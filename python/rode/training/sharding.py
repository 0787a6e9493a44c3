"""Runs whose weights, gradients and optimizer are spread over the processes: torch's FSDP2 and DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


def allow_fsdp_on_cpus(arguments: TrainingArguments) -> None:
    """Let accelerate turn on FSDP for processes on CPUs, where it would fall back to DDP without a word.

    torch's `fully_shard` works there as on GPUs; accelerate asks for the kind of device before it looks for FSDP.
    """
    state = arguments.distributed_state
    if arguments.fsdp and state is not None and state.distributed_type is DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def shard_by_block(arguments: TrainingArguments, model: torch.nn.Module) -> None:
    """Tell FSDP which modules are sharded on their own, where the config does not: the blocks of the model's parts.

    transformers takes every class of `_no_split_modules`, and fails where the model lacks one: LLaVA lists CLIP's text tower.
    """
    options = arguments.fsdp_config
    if not arguments.fsdp or (isinstance(options, dict) and options.get("transformer_layer_cls_to_wrap")):
        return
    there = {type(module).__name__ for module in model.modules()}
    blocks = sorted(there & set(getattr(model, "_no_split_modules", None) or ()))
    arguments.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(blocks)


@contextmanager
def whole_while_loaded(arguments: TrainingArguments) -> Iterator[None]:
    """Keep transformers from cutting up a model for ZeRO-3 while it is loaded; DeepSpeed does so when training begins.

    `deepspeed.zero.Init` would hold frozen weights in the dtype of DeepSpeed's configuration, whatever the config says, and would
    leave empty tensors where adapters and projector are put.
    """
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)

"""transformers' TrainingArguments of a config."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Collection
from typing import Any

import torch
from transformers import TrainingArguments

from rode.training.config import Experiment
from rode.training.sharding import allow_fsdp_on_cpus

logger = logging.getLogger(__name__)


def checkpointing_options(wanted: bool, known: Collection[str]) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments for gradient checkpointing, under the name that this transformers knows.

    Args:
        wanted: compute activations again in the backward pass.
        known: names of its fields; transformers 5.23 renamed `gradient_checkpointing` to `activation_checkpointing`.
    """
    new = "activation_checkpointing"
    name = new if new in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {name: False}


def training_arguments(experiment: Experiment, progress: bool = True) -> TrainingArguments:
    """transformers' TrainingArguments of a config."""
    t = experiment.training
    for key in ("fsdp", "deepspeed"):
        if getattr(t, key) is not None and "RANK" not in os.environ:
            raise ValueError(
                f"training.{key}: expected the processes that torchrun starts, got one process started by itself; use "
                "torchrun --nproc-per-node N -m rode train, or leave it out"
            )
    schedule = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}[t.schedule]
    arguments = TrainingArguments(
        output_dir=str(experiment.run_dir),
        per_device_train_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        num_train_epochs=t.epochs,
        max_steps=t.max_steps or -1,
        learning_rate=t.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=t.warmup_steps,
        optim="adamw_torch",
        weight_decay=t.weight_decay,
        adam_beta1=t.betas[0],
        adam_beta2=t.betas[1],
        adam_epsilon=t.epsilon,
        max_grad_norm=t.max_grad_norm,
        **checkpointing_options(t.gradient_checkpointing, TrainingArguments.__dataclass_fields__),
        # Frozen weights are held in model.dtype and trained ones in float32: no autocast, which would cast the frozen
        # ones again at every step.
        bf16=False,
        fp16=False,
        seed=t.seed,
        data_seed=t.seed,
        logging_steps=t.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen
        save_steps=t.save_steps,
        save_total_limit=t.save_total_limit,
        dataloader_num_workers=t.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=t.train_base == "all",  # a LLaVA does not read the tower's last layers
        report_to="none",  # TensorBoard is added as a callback, in a folder of its own
        disable_tqdm=not (progress and sys.stderr.isatty()),  # then a plain line for each log
        use_cpu=experiment.model.device == "cpu",
        fsdp=True if t.fsdp is not None else None,  # type: ignore[arg-type]  # as its documentation says
        fsdp_config=t.fsdp,
        deepspeed=t.deepspeed,
    )
    if arguments.n_gpu > 1:
        # Several visible GPUs and one process would make Trainer use DataParallel, which cannot share frozen weights.
        arguments._n_gpu = 1
    world = arguments.world_size
    allow_fsdp_on_cpus(arguments)
    if world != t.devices:
        logger.warning(
            "the config means %d device(s) and a global batch of %d; on %d it is %d",
            t.devices,
            t.batch_size * t.gradient_accumulation * t.devices,
            world,
            t.batch_size * t.gradient_accumulation * world,
        )
    if world == 1 and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        # It starts several processes for GPUs; for CPUs it leaves that to mpirun, and takes no notice of --num_processes.
        logger.warning(
            "accelerate launch starts one process on CPUs, whatever --num_processes says; for several use "
            "torchrun --nproc-per-node N -m rode train"
        )
    return arguments


def total_steps(items: int, arguments: TrainingArguments) -> int:
    """Optimizer steps of a whole run, as Trainer counts them.

    Args:
        items: in one epoch, over all processes.
        arguments: see `training_arguments`.
    """
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(math.ceil(items / arguments.train_batch_size) / arguments.world_size)
    return math.ceil(arguments.num_train_epochs * math.ceil(batches / arguments.gradient_accumulation_steps))

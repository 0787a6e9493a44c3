"""transformers' Trainer with the few things that differ here: the loss on answers, learning rates by group, an order of
examples that depends on seed and epoch alone, small checkpoints, and a stop where numbers are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import TrainOutput

from rode.baselines.moe_llava import load_moe_weights, moe_layers, save_moe
from rode.training.base_weights import Part, part_of, save_base, tell_of_base
from rode.training.checkpoints import STATE
from rode.training.closed import ClosedGates, ZeroGradients
from rode.training.counts import RunCounts
from rode.training.diagnosis import first_not_finite
from rode.training.finite import StepGuard
from rode.training.groups import LearnedGroups
from rode.training.loss_scale import LossScale
from rode.training.order import EpochSampler, TellEpoch
from rode.training.rescue import KeepsLastStep
from rode.tuner import GateStatistics, HoldSparsity
from rode.vlm.collator import IGNORE
from rode.vlm.load import PROJECTOR_FILE, language_model, load_base, load_projector, save_projector
from rode.vlm.loss import answer_loss
from rode.vlm.packing import packed_attention

if TYPE_CHECKING:
    from rode.vlm.load import Model


def parameter_groups(model: Model, rates: Mapping[Part, float], weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters as an optimizer takes them: each part has a rate of its own, and of all of them matrices decay while
    biases and norms do not."""
    groups: dict[tuple[Part, bool], dict[str, Any]] = {}
    for parameter, part in part_of(model).items():
        decays = parameter.ndim > 1
        options = {"lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((part, decays), {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


class AnswerTrainer(KeepsLastStep):
    """Trains on answers.

    Args:
        plan: order of the examples, see `rode.training.order.EpochSampler`.
        lengths: of the examples, to batch like with like; None for the plan's order.
        rates: learning rate of each part.
        projector_trained: the projector learns; a MoE-LLaVA's checkpoints hold it then.
        base_trained: other parts of the base model learn; checkpoints hold them.
        projector_only: checkpoints hold the projector instead of an adapter. (A MoE-LLaVA's hold its mixtures.)
        statistics: gates counted between two log lines and logged with them.
        skips: steps in a row that may be left out as they are not finite.
        resumed: the run goes on from a checkpoint.
        scales_loss: the model computes in float16, whose small gradients would vanish.
    """

    model: PreTrainedModel  # never None here; or a PeftModel, which passes on what it lacks

    def __init__(
        self,
        *args: Any,
        plan: Callable[[int], list[int]],
        rates: Mapping[Part, float],
        projector_trained: bool = False,
        base_trained: bool = False,
        lengths: Sequence[int] | None = None,
        projector_only: bool = False,
        statistics: GateStatistics | None = None,
        skips: int = 0,
        resumed: bool = False,
        scales_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss_scale = LossScale(self.args.device.type) if scales_loss else None
        if self.loss_scale is not None:
            # accelerate scales by it, hands it to the optimizer and, through Trainer, keeps it with checkpoints. Its own setting
            # for float16 would bring autocast, too.
            self.accelerator.scaler = self.loss_scale
        # compute_loss divides by the tokens of the whole accumulated batch: a mean over tokens, not over batches.
        self.model_accepts_loss_kwargs = True
        self.plan, self.lengths = plan, lengths
        self.base_trained = base_trained
        self.rates, self.projector_trained, self.projector_only = rates, projector_trained, projector_only
        self.statistics, self.resumed = statistics, resumed
        self.closed_gates, self.zero_gradients = ClosedGates(), ZeroGradients()
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled  # one process alone cannot run it again
        self.guard = StepGuard(self.run_dir, skips, None if spread else self._explain)
        config = getattr(self.model, "active_peft_config", None)
        self.reads_prompts = getattr(config, "router_input", None) == "sequence"
        self.head = self.model.get_output_embeddings()
        self.language_model = language_model(self.model)
        self.truncated_answers = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self.summed_loss = torch.zeros((), dtype=torch.float64, device=self.args.device)
        self.counts = RunCounts()
        self.add_callback(self.counts)
        self.add_callback(LearnedGroups(self.model))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        self.truncated_answers += inputs.pop("truncated")
        segments = inputs.pop("segments", None)
        if self.reads_prompts:
            inputs["rode_prompt_mask"] = labels == IGNORE
        with nullcontext() if segments is None else packed_attention(self.language_model, segments):
            loss = answer_loss(model, self.head, inputs, labels, num_items_in_batch)
        # The count spans all processes while DDP averages gradients over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self.ids = inputs.pop("record_ids")
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.add(loss, self.ids, inputs)
        if self.guard.skips:  # a mean that is logged is over the steps that count
            loss = torch.where(loss.isfinite(), loss, 0.0)
        self.summed_loss += loss.detach()
        return loss

    def counted(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.summed_loss.clone(), self.truncated_answers.clone()

    def recount(self, counted: Any) -> None:
        self.summed_loss, self.truncated_answers = counted

    def _explain(self, inputs: dict[str, Any]) -> str | None:
        cut = self.truncated_answers.clone()
        try:
            return first_not_finite(
                self.model, lambda: self.compute_loss(self.model, inputs), self.statistics
            )
        finally:
            self.truncated_answers = cut

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._unscale()
        return super()._clip_grad_norm(model)

    def _unscale(self) -> None:
        if self.loss_scale is not None:
            optimizer = self.optimizer
            assert optimizer is not None, "made before the first step"
            while isinstance(optimizer, AcceleratedOptimizer):
                optimizer = optimizer.optimizer  # the one that it wraps
            self.loss_scale.unscale_(optimizer)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> float:
        """Trainer asks for it once a step, right before the optimizer, whether it clips or not."""
        if grad_norm is None:  # it was not clipped
            self._unscale()
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = self.loss_scale is not None and self.loss_scale.may_overflow
        if not self.guard.check(norm, self.state.global_step + 1, self.args.world_size, scaled=scaled):
            for parameter in model.parameters():  # the optimizer passes over parameters without a gradient
                parameter.grad = None
            return 0.0
        self.zero_gradients.add(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return norm

    def count_truncated(self) -> int:
        """Answers cut so far, on all devices, since the run began."""
        return int(self.accelerator.reduce(self.truncated_answers)) + int(
            self.counts.before.get("truncated", 0)
        )

    def count_overflows(self) -> int:
        """Steps left out since the run began because the scaled loss's gradient overflowed."""
        return self.guard.overflows + int(self.counts.before.get("overflows", 0))

    def count_nonfinite(self) -> int:
        """Steps left out since the run began."""
        return self.guard.skipped + int(self.counts.before.get("nonfinite", 0))

    def mean_loss(self) -> float | None:
        """The mean loss of the steps since the run began, on all devices; None after a checkpoint that does not hold the sum."""
        if self.counts.before or not self.resumed:
            return self._total_loss() / max(1, self.state.global_step)
        return None

    def _total_loss(self) -> float:
        own = float(self.accelerator.reduce(self.summed_loss, reduction="mean"))
        return own + self.counts.before.get("loss", 0.0)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.counts.before or not self.resumed:  # else the sums would lack their beginning
            self.counts.total = {
                "loss": self._total_loss(),
                "truncated": self.count_truncated(),
                "nonfinite": self.count_nonfinite(),
                "overflows": self.count_overflows(),
            }
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if cut := self.count_truncated():
            logs["truncated_answers"] = cut
        if left_out := self.count_nonfinite():
            logs["nonfinite_steps"] = left_out
        if self.loss_scale is not None and "loss" in logs:
            logs["loss_scale"], logs["overflow_steps"] = self.loss_scale.get_scale(), self.count_overflows()
        if self.statistics is not None and "loss" in logs:
            report = self.statistics.report(all_processes=True)
            logs.update(report.scalars())
            logs.update(self.closed_gates.update(report, self.state.global_step))
            self.statistics.reset()
        if "loss" in logs:
            self.zero_gradients.tell(self.state.global_step)
        if "loss" in logs:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, HoldSparsity):
                    logs.update(callback.scalars())
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        sampler = EpochSampler(self.plan, self.lengths, self.args.train_batch_size, self.args.seed)
        self.add_callback(TellEpoch(sampler))
        return sampler

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(cast("Model", model or self.model), self.rates, self.args.weight_decay)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model, directory = self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir
        assert directory is not None, "TrainingArguments give it a default"
        mixtures = moe_layers(model)
        if not self.projector_only and not mixtures:
            if self.base_trained:
                tell_of_base(model)
            super()._save(output_dir, state_dict)
            if self.base_trained and self.args.should_save:
                save_base(model, directory)
        elif self.args.should_save:
            if mixtures:
                save_moe(model, directory)
            if self.projector_trained:
                save_projector(model, directory)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        mixtures = moe_layers(self.model)
        if not self.projector_only and not mixtures:
            load_base(self.model, resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if mixtures:
            load_moe_weights(self.model, resume_from_checkpoint)
        if self.projector_trained:
            load_projector(self.model, Path(resume_from_checkpoint) / PROJECTOR_FILE)

    def finish(self, checkpoint: str) -> TrainOutput:
        """Take weights and history from a checkpoint of the last step, in place of `train`, which would train one more."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        self.counts.restore(self.state)
        total, last = 0.0, 0.0
        for entry in self.state.log_history:
            if "loss" in entry:  # the mean since the entry before
                total += entry["loss"] * (entry["step"] - last)
                last = entry["step"]
        return TrainOutput(self.state.global_step, total / max(1, last), {"train_runtime": 0.0})

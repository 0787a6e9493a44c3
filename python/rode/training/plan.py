"""A plan of a run before it starts: what memory a step takes, what fits a device, and how long it may take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rode.training.accelerators import GIB, Accelerator
from rode.training.meta_step import WEIGHTS, Record, StepCount, count_step
from rode.training.spread import Spread, gib, memory_of, saved_of, spread_of
from rode.vlm.load import base_model

if TYPE_CHECKING:
    from rode.training.config import Experiment
    from rode.vlm.load import Model

RESERVE = GIB
"""Bytes that are assumed to be taken by CUDA's context and the libraries' workspaces."""
FRAGMENTATION = 0.05
"""Share of the rest that is assumed to be lost between the allocator's blocks."""
UTILISATION = (0.2, 0.5)
"""Shares of the peak that training is assumed to reach, at least and at most."""
_MOST = 4096  # records of a micro-batch


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch for one setting.

    Attributes:
        checkpointing: whether gradient checkpointing is on. micro_batch: 0 where none fits. bytes: of that one on a device.
        bytes_of_one: of a micro-batch of one record.
    """

    checkpointing: bool
    micro_batch: int
    bytes: int
    bytes_of_one: int


@dataclass(frozen=True)
class Plan:
    """What a run of a config takes.

    Attributes:
        model: its type. parameters, trained: numbers of weights.
        record: sizes of each record. micro_batch, checkpointing: the config's.
        spread: over devices. step: counted as if on one device. memory: bytes of one device at the peak, by kind.
        saved: bytes held between forward and backward pass, by layer.
        accelerator: the device, or None. budget: its bytes less what is reserved.
        fits: the largest micro-batches, without and with checkpointing.
        floating_point: operations of an optimizer step on one device.
        examples, steps: None where not known. seconds: least and most, of all steps; None likewise.
        notes: assumptions, and what is not counted.
    """

    model: str
    parameters: int
    trained: int
    record: Record
    micro_batch: int
    checkpointing: bool
    spread: Spread
    step: StepCount
    memory: dict[str, int]
    saved: dict[str, int]
    accelerator: Accelerator | None
    budget: int | None
    fits: list[Fit]
    floating_point: int
    examples: int | None
    steps: int | None
    seconds: tuple[float, float] | None
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes of one device."""
        return sum(self.memory.values())

    @property
    def advice(self) -> str:
        """What to do so that it fits, in a sentence or two."""
        if self.budget is None:
            return ""
        of = {fit.checkpointing: fit for fit in self.fits}
        plain, saving = of[False].micro_batch, of[True].micro_batch
        if self.peak <= self.budget:
            if not self.checkpointing:
                return "It fits as configured. Neither checkpointing nor quantisation is needed."
            needed = plain < self.micro_batch
            return f"It fits as configured. Checkpointing is {'' if needed else 'not '}needed for it; quantisation is not."
        if not self.checkpointing and saving >= self.micro_batch:
            return "It does not fit as configured, and does with training.gradient_checkpointing=true; quantisation is not needed."
        best = saving if self.checkpointing else max(plain, saving)
        if best:
            times = math.ceil(self.micro_batch / best)
            with_it = "" if plain == best else " training.gradient_checkpointing=true"
            return (
                f"It does not fit as configured, and does with training.batch_size={best}{with_it} (and about {times} times the "
                "gradient_accumulation for the same batch); quantisation is not needed."
            )
        # of four bits and a scale for each 64 weights, as QLoRA's NF4
        held = self.memory.get(WEIGHTS, 0)
        fourth = self.fits[-1].bytes_of_one - int(held * 0.72)
        if fourth <= self.budget:
            return (
                "Not even one record fits with checkpointing. A base quantised to 4 bits would leave about "
                f"{gib(self.budget - fourth)} free with one record (0.28 of the bytes in bfloat16, an estimate); else divide the "
                "weights over devices (training.fsdp)."
            )
        return "Not even one record fits, with checkpointing and a base quantised to 4 bits; use shorter records or more memory."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        record = {
            "tokens": self.record.tokens,
            "learned": self.record.learned,
            "picture_tokens": self.record.picture_tokens,
        }
        device = None if self.accelerator is None else {**vars(self.accelerator), "budget": self.budget}
        return {
            "model": self.model,
            "parameters": self.parameters,
            "trained": self.trained,
            "record": record,
            "micro_batch": self.micro_batch,
            "checkpointing": self.checkpointing,
            "spread": vars(self.spread),
            "peak_bytes": self.peak,
            "peak_bytes_by_kind": self.memory,
            "saved_for_backward_bytes": self.saved,
            "device": device,
            "fits": [vars(fit) for fit in self.fits],
            "flops_of_a_step": self.floating_point,
            "examples": self.examples,
            "steps": self.steps,
            "seconds": self.seconds,
            "advice": self.advice,
            "notes": self.notes,
        }


def budget_of(accelerator: Accelerator) -> int:
    """The bytes of a device that tensors may take, as assumed."""
    return max(0, int((accelerator.memory - RESERVE) * (1 - FRAGMENTATION)))


def largest_micro_batch(bytes_of: Callable[[int], int], budget: int, most: int = _MOST) -> tuple[int, int]:
    """The largest micro-batch whose bytes are within a budget, and its bytes; 0 and 0 where one record is too much.

    Bytes grow by nearly the same number with each record, so two counts tell where to look. The answer itself is counted.

    Args:
        bytes_of: micro-batch -> bytes, which grow with it.
    """
    low, of_low = 1, bytes_of(1)
    if of_low > budget:
        return 0, 0
    high, of_high = 2, bytes_of(2)
    above: int | None = None  # the smallest that is known not to fit
    while True:
        if of_high > budget:
            above = high
        else:
            low, of_low = high, of_high
            if low >= most:
                return low, of_low
        if above is not None and above - low == 1:
            return low, of_low
        slope = max(1.0, (of_high - bytes_of(1)) / max(1, high - 1))
        guess = low + int((budget - of_low) / slope)
        high = max(low + 1, min(guess, most if above is None else above - 1))
        of_high = bytes_of(high)


def make_plan(
    experiment: Experiment,
    model: Model,
    record: Record,
    *,
    accelerator: Accelerator | None = None,
    devices: int | None = None,
    examples: int | None = None,
    mean_tokens: int | None = None,
) -> Plan:
    """The plan of a config.

    Args:
        model: see `rode.training.meta_step.meta_model`.
        record: the longest; memory is counted for batches of it.
        accelerator: the device. devices: their number, in place of `training.devices`.
        examples: records of an epoch; None where not known.
        mean_tokens: of a record, for the time; None for as many as the longest has.
    """
    training, spread = experiment.training, spread_of(experiment, devices)
    counted: dict[tuple[int, bool], StepCount] = {}

    def step_of(micro_batch: int, checkpointing: bool) -> StepCount:
        key = micro_batch, checkpointing
        if key not in counted:
            counted[key] = count_step(model, experiment, record, micro_batch, checkpointing=checkpointing)
        return counted[key]

    def bytes_of(micro_batch: int, checkpointing: bool) -> int:
        return sum(memory_of(step_of(micro_batch, checkpointing), spread, model).values())

    step = step_of(training.batch_size, training.gradient_checkpointing)
    budget, fits = None, []
    if accelerator is not None:
        budget = budget_of(accelerator)
        for checkpointing in (False, True):

            def of(n: int, checkpointing: bool = checkpointing) -> int:
                return bytes_of(n, checkpointing)

            best, held = largest_micro_batch(of, budget)
            fits.append(Fit(checkpointing, best, held, of(1)))
    usual = step
    if mean_tokens is not None and mean_tokens != record.tokens:
        fewer = max(mean_tokens, record.picture_tokens + 2)
        text, all_text = fewer - record.picture_tokens, record.tokens - record.picture_tokens
        shorter = replace(record, tokens=fewer, learned=max(1, record.learned * text // all_text))
        usual = count_step(
            model, experiment, shorter, training.batch_size, checkpointing=training.gradient_checkpointing
        )
    operations = usual.floating_point * training.gradient_accumulation
    steps = training.max_steps
    if steps is None and examples is not None:
        batches = math.ceil(math.ceil(examples / training.batch_size) / spread.devices)
        steps = math.ceil(training.epochs * math.ceil(batches / training.gradient_accumulation))
    seconds = None
    if steps is not None and accelerator is not None and accelerator.flops is not None:
        least, most = UTILISATION
        seconds = (
            steps * operations / accelerator.flops / most,
            steps * operations / accelerator.flops / least,
        )
    return Plan(
        model=str(base_model(model).config.model_type),
        parameters=sum(p.numel() for p in base_model(model).parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        record=record,
        micro_batch=training.batch_size,
        checkpointing=training.gradient_checkpointing,
        spread=spread,
        step=step,
        memory=memory_of(step, spread, model),
        saved=saved_of(step),
        accelerator=accelerator,
        budget=budget,
        fits=fits,
        floating_point=operations,
        examples=examples,
        steps=steps,
        seconds=seconds,
        notes=_notes(experiment, record, step, spread, accelerator, mean_tokens),
    )


def _notes(
    experiment: Experiment,
    record: Record,
    step: StepCount,
    spread: Spread,
    accelerator: Accelerator | None,
    mean_tokens: int | None,
) -> list[str]:
    notes = [
        f"every record has {record.tokens} tokens, {record.picture_tokens} of them a picture's, and logits for {record.learned}",
        "batches are padded, so attention gets a mask",
    ]
    if spread.devices > 1 and not spread.gradients:
        notes.append("data parallelism holds each gradient a second time, in its buckets")
    if spread.weights:
        notes.append(
            "two of the largest blocks are gathered whole at a time; each device holds an equal part of the rest"
        )
    if experiment.training.deepspeed is not None:
        notes.append("DeepSpeed's own buffers and any offloading are not counted")
    if experiment.training.questions_per_picture > 1:
        notes.append("a pack of questions counts as one record: give --tokens of a pack")
    if accelerator is not None:
        notes.append(
            f"of {gib(accelerator.memory)}, {gib(RESERVE)} are reserved for CUDA's context and libraries, and {FRAGMENTATION:.0%} "
            "of the rest for the allocator's gaps"
        )
        if accelerator.flops is not None:
            least, most = UTILISATION
            notes.append(
                f"time: predicted from {accelerator.flops / 1e12:.0f} TFLOPS ({accelerator.source}), of which {least:.0%} to "
                f"{most:.0%} are reached with records of {mean_tokens or record.tokens} tokens; nothing was measured"
            )
    if step.uncounted:
        notes.append(f"the vision tower's pass is not counted: {step.uncounted}")
    return notes

"""The values of a config: an experiment, its model, data, adapter, training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rode_food.metrics.tokens import TokenizerName
from rode_food.settings import SettingsError

TaskName = Literal["ingredients", "recipe", "nutrition", "category", "question"]
ALL_TASKS: tuple[TaskName, ...] = get_args(TaskName)


ConfigError = SettingsError
"""A config that cannot be used. One line: which key, what it got, what was wanted."""


@dataclass
class ModelConfig:
    """The base model, and how it is held."""

    path: str
    """Checkpoint directory, or hub name "owner/name"."""
    projector: str | None = None
    """`projector.safetensors` of a stage-1 run, or its folder; replaces the checkpoint's projector."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What frozen weights are held in. Trained ones are float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; "auto" is the GPU where there is one."""
    attention: str | None = None
    """transformers' attn_implementation; null for its own choice."""
    prompt: Literal["vicuna", "chat_template", "auto"] = "auto"
    """`vicuna` (LLaVA-1.5's), `chat_template` (the checkpoint's own), or `auto`: the template if there is one, else Vicuna."""
    vision_features: Literal["live", "memory", "disk"] = "live"
    """"memory" and "disk" compute the frozen tower once for each picture; "live" at every step."""
    picture_shape: Literal["processor", "pad"] = "processor"
    """"pad" makes pictures square first, as LLaVA-1.5 does; "processor" leaves them to the model's own processor, and LLaVA's
    then cuts off what is outside of the middle square."""
    features_dir: str = "runs/features"
    """Where "disk" keeps them."""
    picture_pool: int = 1
    """More than 1: the mean of each square of so many by so many patches stands in their place, before a LLaVA's projector, so
    that 2 leaves a quarter of the picture's tokens. It needs `vision_features` "memory" or "disk"."""
    clusters: str | None = None
    """File of `rode fit-clusters`, for an adapter whose router reads the cluster of a question."""


@dataclass
class SourceConfig:
    """One file of records, or one folder of shards."""

    path: str
    """The file, or the folder."""
    name: str | None = None
    """By which metrics are kept apart; null for what the records say."""
    weight: float = 1.0
    """Passes over this source per epoch: 0.5 half of it (the other half in the next epoch), 0 leaves it out."""
    fraction: float = 1.0
    """Share of its training records to use: 0.25 is a quarter of them, in every epoch the same, and part of 0.5's half."""
    tasks: list[TaskName] = field(default_factory=lambda: list(ALL_TASKS))
    """Which questions are made from its records ([records.md](records.md#tasks))."""
    split_fractions: dict[str, float] | None = None
    """{train: 0.8, val: 0.1, test: 0.1} for records that state no split: a hash of the id decides."""
    shuffle_shards: int = 16
    """So many shards are shuffled together; a file of records is shuffled as a whole."""


@dataclass
class DataConfig:
    """Data that is learned from."""

    sources: list[SourceConfig]
    """Files of records or folders of shards, one entry for each."""
    wording: Literal["first", "all", "random"] = "random"
    """Wordings of a question in training; evaluation always asks the first."""
    on_bad_record: Literal["error", "skip"] = "error"
    """A record that cannot be used (a picture that cannot be read, an empty answer): stop, or leave it out and say so."""


@dataclass
class TrainingConfig:
    """How it is trained; reaches transformers' TrainingArguments through `rode.training.arguments.training_arguments`."""

    learning_rate: float = 3e-4
    """The adapter's learning rate, at its highest."""
    train_base: Literal["none", "projector", "language_model", "all"] = "none"
    """Stage "adapter": the part of the base model that is trained beside the adapter, in float32. "language_model" is the language
    model with its embeddings and its head, "all" is vision tower, projector and language model."""
    projector_learning_rate: float | None = None
    """The projector's learning rate; a rate trains it, whatever `train_base` says. Null: `learning_rate`, where it is trained."""
    language_model_learning_rate: float | None = None
    """The language model's own weights' learning rate; null for `learning_rate`."""
    vision_learning_rate: float | None = None
    """The vision tower's learning rate; null for `learning_rate`."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the mean and the variance of gradients."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """A gradient whose norm is larger is scaled down to it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient norm is not finite: stop before it changes a weight, or leave it out and say so."""
    max_nonfinite: int = 10
    """So many steps in a row may be left out; the next one stops the run."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up. "linear" is DeepSpeed's WarmupDecayLR."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises to its highest."""
    batch_size: int = 4
    """Per device."""
    gradient_accumulation: int = 10
    """Batches whose gradients make one step of the optimizer."""
    devices: int = 1
    """How many devices the numbers above are meant for; a run on another number says what the batch comes to."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; null for `epochs`."""
    max_minutes: float | None = None
    """Stop with a checkpoint, as Ctrl-C does, when a run has taken so long from its start; null for no limit."""
    max_length: int | None = None
    """Tokens of prompt, picture and answer together; null for no limit."""
    on_long_answer: Literal["truncate", "error"] = "truncate"
    """An answer that does not fit `max_length`: cut it and count it, or stop."""
    questions_per_picture: int = 1
    """More than 1: up to so many questions about one picture stand behind one prefix and share its tokens; batch_size
    then counts such packs. The loss is the same, for less work."""
    group_by_length: bool = False
    """Batch examples of like length: less padding, a less random order."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""
    seed: int = 0
    """The seed of everything that is drawn."""
    logging_steps: int = 10
    """Steps between two entries of the log."""
    gate_statistics: bool = True
    """Log how far the gates open, by kind of token and by expert."""
    save_steps: int = 500
    """Steps between two checkpoints."""
    save_total_limit: int = 2
    """Checkpoints that are kept."""
    workers: int = 0
    """Data-loader processes per device."""
    fsdp: dict[str, Any] | None = None
    """Spread weights, gradients and optimizer over the processes by torch's FSDP2: transformers' `fsdp_config` ({} for its
    defaults). Null: every process holds all."""
    deepspeed: dict[str, Any] | None = None
    """Spread them by DeepSpeed's ZeRO: DeepSpeed's own configuration, "auto" where `training` says it already."""


@dataclass
class EvaluationConfig:
    """How `rode evaluate` asks and scores."""

    split: Literal["train", "val", "test"] = "test"
    """Which part of the sources is asked about."""
    batch_size: int = 8
    """Questions that are answered together."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    limit: int | None = None
    """Examples of each source; null for all."""
    vocabulary: str | None = None
    """File of `rode data vocabulary`: names of ingredients are merged with it before answers and truths are compared."""
    tokenizer: TokenizerName = "auto"
    """Tokenizer of BLEU and ROUGE-L. "auto" goes by the script of the true answers, for each source; for Latin letters it is 13a
    ([records.md](records.md#languages))."""
    keep_answers: bool = False
    """`rode reproduce` keeps every answer beside the result, for statistics over records."""


@dataclass
class Experiment:
    """One experiment: the values of a config file."""

    name: str
    """Name of the run, and of its folder below runs/."""
    model: ModelConfig
    """The base model, and how it is held."""
    data: DataConfig
    """Data that is learned from."""
    stage: Literal["adapter", "projector"] = "adapter"
    """"projector" is LLaVA's stage 1: the projector alone. "adapter" trains what `adapter` says."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Fields of `rode.tuner.RodeConfig`; with `preset: NAME` those that differ from a preset's (`rode.tuner.presets`); with
    `method: peft` and `peft_type: POLY` (LORA, XLORA, ...) the fields of PEFT's own configuration; with `method: moe-llava`
    those of `rode.baselines.moe_llava.MoeConfig`."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How `rode evaluate` asks and scores."""
    output_dir: str | None = None
    """Null for runs/NAME."""

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir or Path("runs") / self.name)

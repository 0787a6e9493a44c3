"""Reading training samples out of shards against loose files: how many a second one process gets.

A sample is what a data-loader worker takes: the record's question and answer, and the picture's bytes; with "decoded" the
picture's pixels too. Made-up recipes of some 2 kB and pictures of some 60 kB. All forms must give the same samples before any is
timed; rounds are interleaved. "Shuffled" is the order of an epoch: of all loose files, and of a few shards at a time. Cold: the
files' pages are dropped from the system's cache before each round, as far as a user may (names and inodes of loose files stay
cached, which is in their favour). The start of a run is what precedes its first step: records of a file are parsed and their
pictures decoded once, for one cut short is found in no other way; those in shards were checked when they were written.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import random
import tempfile
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import write_json
from benchmarks.timing import Spread, headline, interleaved, machine, ratios, spread
from rode.training.usable import usable
from rode.vlm import open_image
from rode_food import FoodRecord, Ingredient, Nutrition, Source, load_examples, write_records
from rode_food.data_mixture import DataMixture
from rode_food.images import open_picture
from rode_food.shards.write import write_shards

PICTURES = 32
"""Different ones; each copy has a number after its end, which readers of pictures do not mind."""
WORDS = (
    "beans",
    "rice",
    "onion",
    "slowly",
    "pan",
    "oil",
    "water",
    "salt",
    "leaves",
    "until",
    "soft",
    "stir",
    "add",
    "cover",
    "hot",
    "simmer",
    "minutes",
)


def pictures(seed: int = 0) -> list[bytes]:
    """JPEG files of 512 x 512 pixels and some 60 kB each."""
    made = []
    for number in range(PICTURES):
        generator = np.random.default_rng([seed, number])
        coarse = generator.integers(0, 256, (64, 64, 3), np.uint8)
        image = Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)
        noise = generator.normal(0, 6, (512, 512, 1))
        pixels = np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=75)
        made.append(out.getvalue())
    return made


def make_records(folder: Path, count: int) -> list[FoodRecord]:
    """`count` records and their pictures as loose files, 1000 in a folder."""
    files, words = pictures(), random.Random(0)
    records = []
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[number % PICTURES] + number.to_bytes(8, "little"))
        steps = tuple(" ".join(words.choices(WORDS, k=25)).capitalize() + "." for _ in range(8))
        ingredients = tuple(
            Ingredient(word, 1.0, "cup", 158.0, Nutrition(158.0, 205.0, 0.4, 4.3, 44.5))
            for word in words.sample(WORDS, 8)
        )
        whole = Nutrition(100.0 + number, 500.0, 5.0, 6.0, 70.0)
        records.append(
            FoodRecord(
                f"dish{number:06d}", str(path), "made-up", category=words.choice(WORDS), split="train",
                ingredients=ingredients, instructions=steps, nutrition=whole,
            )
        )  # fmt: skip
    return records


def read(mixture: DataMixture, order: Sequence[int], decode: bool) -> None:
    for index in order:
        example = mixture.examples[index]
        if decode:
            open_image(example.image)
        else:
            with open_picture(example.image) as file:
                file.read()


def digest(mixture: DataMixture) -> str:
    """A digest of all samples, independent of their order and place."""
    found = []
    for example in mixture.examples:
        with open_picture(example.image) as file:
            picture = hashlib.sha256(file.read()).hexdigest()
        found.append(repr((example.record_id, example.task, example.question, example.answer, picture)))
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def drop_cached(paths: Sequence[Path]) -> None:
    """Ask the system to forget what it holds of these files; they must have been written to disk."""
    for path in paths:
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def fraction_cached(paths: Sequence[Path], tries: int = 200) -> float:
    """The fraction of `tries` places in these files that the system still holds."""
    generator, held = random.Random(0), 0
    for _ in range(tries):
        path = generator.choice(paths)
        number = os.open(path, os.O_RDONLY)
        offset = generator.randrange(max(1, path.stat().st_size - 4096))
        try:
            held += os.preadv(number, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        finally:
            os.close(number)
    return held / tries


def rows(args: Namespace) -> list[dict[str, Any]]:
    """Measure.

    Args:
        args: records (how many), shard_size, window (of shards shuffled together), rounds, folder (for a temporary one;
            None for the system's).

    Returns:
        A row for each form, order, cache and kind of sample: `rate` (samples/s: median, low, high) and `ratio`, how many times as
        many as loose files in the same order; then one for each form's start: `seconds`, and `held`, bytes of Python's
        memory for each example.

    Raises:
        AssertionError: a form gave other samples than the loose files.
    """
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        records = make_records(folder / "pictures", args.records)
        write_records(folder / "records.jsonl", records)
        write_shards(records, folder / "tar", size=args.shard_size)
        write_shards(records, folder / "parquet", format="parquet", size=args.shard_size)
        os.sync()
        sources = {"loose": "records.jsonl", "tar": "tar", "parquet": "parquet"}
        files = {
            "loose": [Path(record.image) for record in records],
            "tar": sorted((folder / "tar").glob("*.tar")),
            "parquet": sorted((folder / "parquet").glob("*.parquet")),
        }
        by_form = {
            form: Source(str(folder / path), tasks=("nutrition",), shuffle_shards=args.window)
            for form, path in sources.items()
        }
        forms = {form: load_examples([source], "train") for form, source in by_form.items()}
        digests = {form: digest(mixture) for form, mixture in forms.items()}
        assert len(set(digests.values())) == 1, f"the samples differ: {digests}"
        out = []
        for decode in (False, True):
            for order in ("sequential", "shuffled"):
                for cache in ("warm", "cold"):
                    out += _rows(forms, files, order, cache, decode, args.rounds)
        return out + _starts(by_form, args.rounds)


def _rows(
    forms: dict[str, DataMixture],
    files: dict[str, list[Path]],
    order: str,
    cache: str,
    decode: bool,
    rounds: int,
) -> list[dict[str, Any]]:
    held: dict[str, float] = {}

    def prepare(form: str) -> Callable[[], Callable[[], None]]:
        mixture = forms[form]
        indices = mixture.plan(0) if order == "shuffled" else range(len(mixture))
        indices = indices[: _taken(mixture, decode)]

        def prepared() -> Callable[[], None]:
            if cache == "cold":
                drop_cached(files[form])
                held[form] = max(held.get(form, 0.0), fraction_cached(files[form]))
            return lambda: read(mixture, indices, decode)

        return prepared

    calls = {form: prepare(form) for form in forms}
    times = interleaved(calls, rounds, warm_up=int(cache == "warm"), prepared=True)
    if any(fraction > 0.05 for fraction in held.values()):
        raise RuntimeError(f"the system did not drop these files from its cache: {held}")
    out = []
    for form, mixture in forms.items():
        rate = spread([_taken(mixture, decode) / seconds for seconds in times[form]])
        row = {"form": form, "order": order, "cache": cache, "decoded": decode, "rate": rate._asdict()}
        out.append({**row, "ratio": ratios(times, "loose", form)._asdict()})
    return out


def _taken(mixture: DataMixture, decode: bool) -> int:
    """Samples of a round: decoding takes so much longer that fewer will do."""
    return max(1, len(mixture) // 8) if decode else len(mixture)


def _starts(sources: dict[str, Source], rounds: int) -> list[dict[str, Any]]:
    def start(source: Source) -> DataMixture:
        return usable(load_examples([source], "train"), "error")[0]

    times = interleaved(
        {form: functools.partial(start, source) for form, source in sources.items()}, rounds, warm_up=0
    )
    out = []
    for form, source in sources.items():
        tracemalloc.start()
        mixture = load_examples([source], "train")
        held = tracemalloc.get_traced_memory()[0] / len(mixture)
        tracemalloc.stop()
        out.append({"form": form, "seconds": spread(times[form])._asdict(), "held": held})
    return out


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| | cache | loose files | tar | | Parquet | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    starts = {row["form"]: row for row in found if "seconds" in row}
    for row in found:
        if "seconds" in row:
            continue
        what = f"{'decoded' if row['decoded'] else 'bytes'}, {row['order']}"
        cases.setdefault((what, row["cache"]), {})[row["form"]] = row
    for (what, cache), by_form in cases.items():
        cells = [_rate(by_form["loose"])]
        for form in ("tar", "parquet"):
            cells += [_rate(by_form[form]), f"{by_form[form]['ratio']['median']:.2f}x"]
        lines.append(f"| {what} | {cache} | {' | '.join(cells)} |")
    if starts:
        seconds = [Spread(**row["seconds"]).text(3) for row in starts.values()]
        held = [f"{row['held']:,.0f}" for row in starts.values()]
        for what, (loose, tar, parquet) in (
            ("start of a run, s | warm", seconds),
            ("held, bytes an example |", held),
        ):
            lines.append(f"| {what} | {loose} | {tar} | | {parquet} | |")
    return "\n".join(lines)


def _rate(row: dict[str, Any]) -> str:
    rate = row["rate"]
    return f"{rate['median']:,.0f} ({rate['low']:,.0f} to {rate['high']:,.0f})"


def main(options: Namespace) -> None:
    """`options` as `rows` has them, and `json`: a file to write, or None."""
    about = {"benchmark": "shards", **machine(), "records": options.records, "rounds": options.rounds}
    print(f"{headline(about)}; samples a second, and how many times as many as from loose files")
    found = rows(options)
    print(table(found))
    if options.json:
        write_json(options.json, {**about, "rows": found})

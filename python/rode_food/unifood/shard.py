"""The last stage: the records that are left, with their pictures, as shards to train from."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rode_food.progress import Progress
from rode_food.records import SPLITS, write_records
from rode_food.shards.write import write_shards
from rode_food.unifood.stage import Stage

FOLDER = "shards"


def run(stage: Stage) -> dict[str, Any]:
    """Write `shards/` (`docs/shards.md`), and the same records with their loose pictures as `stage.output`.

    Raises:
        ImageError: naming record and picture, with `on_bad_image: error`.
        OSError: a full disk, for example; finished shards are kept.
    """
    settings = stage.settings.shard
    if stage.dry_run:
        splits: Counter[str] = Counter()
        size = 0
        for record in stage.records():
            splits[record.split or ""] += 1
            size += sum(os.path.getsize(image) for image in record.images if os.path.isfile(image))
        shards = sum(math.ceil(count / settings.size) for count in splits.values())
        return {"records": dict(splits), "shards": shards, "bytes_of_pictures": size}

    def spread(
        function: Callable[[list[str]], list[str]], parts: Iterable[tuple[str, list[str]]]
    ) -> Iterator[tuple[str, list[str]]]:
        parts = list(parts)
        yield from Progress(
            stage.engine.map(function, parts),
            total=len(parts),
            desc="shards",
            unit="shard",
            show=stage.progress,
        )

    for aside in stage.folder.glob(".*.tmp"):  # of a killed run
        aside.unlink()
    written = write_shards(
        stage.records(),
        stage.folder / FOLDER,
        name=stage.settings.name,
        format=settings.format,
        size=settings.size,
        on_bad_image=settings.on_bad_image,
        overwrite=True,
        map=spread,
    )
    left_out = {id for id, _ in written.left_out}
    write_records(stage.output, (record for record in stage.records() if record.id not in left_out))
    return {
        "records": {split: written.records.get(split, 0) for split in SPLITS},
        "shards": written.shards,
        "bytes": written.bytes,
        "left_out": len(written.left_out),
    }

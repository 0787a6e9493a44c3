"""A folder of shards: which samples stand where (`index.json`, `samples.npy`), and whether they are what was written."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rode_food.records import SPLITS, FoodRecord, record_as_written, with_images
from rode_food.shards.address import ShardError, forget_open_files, make_address, read_part
from rode_food.tasks import TASKS

INDEX, SAMPLES, PICTURES = "index.json", "samples.npy", "pictures.npy"
VERSION = 2
FORMATS = {"webdataset": ".tar", "parquet": ".parquet"}

SAMPLE = np.dtype(
    [
        ("record", "<u8"),  # offset of the record's JSON in its shard
        ("record_size", "<u4"),
        ("picture", "<u8"),  # offset of the first picture's bytes
        ("picture_size", "<u4"),  # 0 where the record has no picture
        ("more", "<u4"),  # further pictures, and the row of `PICTURES` where they begin
        ("first_more", "<u4"),
        ("rank", "<u8"),  # by which `Source.fraction` chooses
        (
            "answers",
            "<u4",
            (len(TASKS),),
        ),  # characters of the answer to each task, 0 where the record has none
        ("turns", "<u4"),  # questions of the record's own, and the characters of them and of their answers
        ("turns_size", "<u4"),
    ]
)
"""What is known of a sample without reading it: 64 bytes, in the order of the shards."""
PICTURE = np.dtype([("offset", "<u8"), ("size", "<u4")])
"""The place of a picture after a sample's first: 12 bytes, in the order of the samples."""


@dataclass(frozen=True)
class Shard:
    """One file. `bytes` and `sha256` are of the whole file."""

    file: str
    split: str
    records: int
    bytes: int
    sha256: str


class Shards:
    """Samples of a folder, numbered through in the order of its index.

    Attributes:
        folder: absolute.
        facts: what index.json says.
        shards: the files, sorted by name.
        samples: array of `SAMPLE`, mapped from the file and not read.
        pictures: array of `PICTURE`, likewise; empty where no record has several.
        first: number of each shard's first sample, and at the end their total.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        shards: list[Shard],
        samples: np.ndarray,
        pictures: np.ndarray,
    ) -> None:
        self.folder, self.facts, self.shards = folder, facts, shards
        self.samples, self.pictures = samples, pictures
        self.first = np.cumsum([0, *(shard.records for shard in shards)])
        self._paths = [os.fspath(folder / shard.file) for shard in shards]

    def __len__(self) -> int:
        return len(self.samples)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.first, sample, side="right")) - 1

    def image(self, sample: int) -> str:
        """The first picture's address, which stands for a path; "" where there is none."""
        return (self.images(sample) or [""])[0]

    def images(self, sample: int) -> list[str]:
        """The addresses of all pictures of a sample."""
        row, path = self.samples[sample], self._paths[self.shard_of(sample)]
        if not row["picture_size"]:
            return []
        more = self.pictures[int(row["first_more"]) : int(row["first_more"]) + int(row["more"])]
        places = [
            (row["picture"], row["picture_size"]),
            *((place["offset"], place["size"]) for place in more),
        ]
        return [make_address(path, int(offset), int(size)) for offset, size in places]

    def record(self, sample: int) -> FoodRecord:
        """The record as it was written, its images the pictures' addresses.

        Raises:
            ShardError: where it should stand is no record.
        """
        row, path = self.samples[sample], self._paths[self.shard_of(sample)]
        text = read_part(path, int(row["record"]), int(row["record_size"]))
        try:
            return with_images(record_as_written(json.loads(text)), self.images(sample))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ShardError(
                f"{path}: sample {sample - int(self.first[self.shard_of(sample)])} is damaged ({error}); copy the shard again"
            ) from None

    def verify(self) -> None:
        """Read every shard whole and compare its digest.

        Raises:
            ShardError: for the first that differs.
        """
        for shard in self.shards:
            path = self.folder / shard.file
            if (found := file_digest(path)) != shard.sha256:
                raise ShardError(
                    f"{path}: damaged: SHA-256 is {found[:16]}..., the index says {shard.sha256[:16]}...; copy it again"
                )


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_shards(folder: str | os.PathLike[str]) -> Shards:
    """Read a folder's index. Every shard must be there in its full size; `Shards.verify` reads them too.

    Raises:
        ShardError: naming the file that is missing, cut short or does not fit the index.
    """
    folder = Path(folder).resolve()
    path = folder / INDEX
    if not path.is_file():
        raise ShardError(
            f"{folder}: no folder of shards: {INDEX} is missing; it is written last, by `rode data shard`"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["version"]
        if version != VERSION:
            raise ShardError(
                f"{path}: version {version!r}, this program reads {VERSION}; write the shards anew"
            )
        if facts["format"] not in FORMATS or any(s["split"] not in SPLITS for s in facts["shards"]):
            raise ValueError("unknown format or split")
        shards = [Shard(**{key: shard[key] for key in Shard.__annotations__}) for shard in facts["shards"]]
        tasks = facts["tasks"]
        digests = {SAMPLES: facts["samples_sha256"]}
        if "pictures_sha256" in facts:
            digests[PICTURES] = facts["pictures_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: damaged ({type(error).__name__}: {error}); copy it again") from None
    if tasks != list(TASKS):
        raise ShardError(
            f"{path}: made for the tasks {', '.join(tasks)}; this program has others: write it anew"
        )
    for shard in shards:
        file = folder / shard.file
        if not file.is_file():
            raise ShardError(f"{file}: no such shard, but {INDEX} names it; copy it again")
        if (size := file.stat().st_size) != shard.bytes:
            what = "cut short" if size < shard.bytes else "too long"
            raise ShardError(f"{file}: {what}: {size} bytes, the index says {shard.bytes}; copy it again")
    tables = {PICTURES: np.empty(0, PICTURE)}
    for name, digest in digests.items():
        table = folder / name
        if not table.is_file() or file_digest(table) != digest:
            raise ShardError(f"{table}: missing or damaged; copy it again")
        tables[name] = np.load(table, mmap_mode="r")
    forget_open_files()
    return Shards(folder, facts, shards, tables[SAMPLES], tables[PICTURES])

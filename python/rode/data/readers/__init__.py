"""Readers: each turns one published layout into records.

A reader is a function `(source: Path, log: ReadLog) -> Iterator[FoodRecord]`. It tells the log what it leaves
out and why, so that nothing vanishes unsaid, and takes the data's own split where there is one. It streams:
its memory does not grow with the records, except for what it must know of each (an id, an offset).
"""

from rode.data.readers import food_photos, nutrition5k
from rode.data.records import read_records

READERS = {
    "records": lambda source, log: read_records(source),
    "food-photos": food_photos.read,
    "nutrition5k-jsonl": nutrition5k.read_jsonl,
}
"""Kind, as `rode data convert` takes it, -> reader."""

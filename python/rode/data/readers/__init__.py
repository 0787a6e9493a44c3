"""Readers: each turns one published layout into records.

A reader is a function `(source: Path, left_out: Counter[str]) -> Iterator[FoodRecord]`. It counts what it
leaves out by reason, so that nothing vanishes unsaid, and takes the data's own split where there is one.
"""

from rode.data.readers import food_photos, nutrition5k

READERS = {"food-photos": food_photos.read, "nutrition5k-jsonl": nutrition5k.read_jsonl}
"""Kind, as `rode data convert` takes it, -> reader."""

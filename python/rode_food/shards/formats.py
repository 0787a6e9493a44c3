"""The two kinds of file that a shard can be, written so that every record and picture stands in it as plain bytes at one place."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import mmap
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from rode_food.records import NUTRITION_FIELDS

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

Place = tuple[int, int]
"""Offset and size in the shard."""


class Places(NamedTuple):
    """Where a sample's parts stand: its record's JSON and each of its pictures."""

    record: Place
    pictures: list[Place]


ROW_GROUP = 100
"""Rows that Parquet writes, and its readers read, at once."""


class TarShard:
    """A WebDataset shard: for each sample `KEY.json`, `KEY.jpg`, and `KEY.1.jpg`, `KEY.2.jpg` for further pictures; nothing
    in the headers but names and sizes.

    Args:
        file: open for writing bytes, at its start.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.tar = tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self.places: list[Places] = []

    def add(self, key: str, record: Mapping[str, Any], text: bytes, pictures: Sequence[bytes]) -> None:
        """`text` is the JSON of `record`. A key must fit a tar's header: ASCII, at most 90 characters."""
        # A member's extension is the name of its field to all readers, so it is the same for every kind of picture: where
        # one sample had .jpg and another .png, `datasets` would leave all pictures of one kind out, without a word.
        place = self._member(f"{key}.json", text)
        named = [(f"{key}.{number}.jpg" if number else f"{key}.jpg") for number in range(len(pictures))]
        self.places.append(Places(place, [*map(self._member, named, pictures)]))

    def _member(self, name: str, data: bytes) -> Place:
        member = tarfile.TarInfo(name)  # mode 0644, time, user and group 0
        member.size = len(data)
        offset = self.tar.offset + tarfile.BLOCKSIZE
        self.tar.addfile(member, io.BytesIO(data))
        return offset, len(data)

    def close(self) -> list[Places]:
        self.tar.close()
        return self.places

    def abandon(self) -> None:
        """For a file that is thrown away."""


class ParquetShard:
    """A Parquet shard: the record's fields as columns, the pictures as `datasets` has them, and the record's JSON.

    Pictures and JSON are neither compressed nor put in a dictionary, so that each stands in the file as it is and a reader finds
    it by offset: pictures would not get smaller, and one of them can be read without its row group.

    Args:
        file: open for writing bytes, at its start, with a name by which it can be read.

    Raises:
        ImportError: without pyarrow.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.digests: list[tuple[bytes, list[bytes]]] = []
        parquet = import_parquet()
        self.schema = parquet_schema()
        self.writer = parquet.ParquetWriter(
            file,
            self.schema,
            compression="NONE",
            use_dictionary=False,
            write_statistics=False,
            data_page_version="1.0",
        )

    def add(self, key: str, record: Mapping[str, Any], text: bytes, pictures: Sequence[bytes]) -> None:
        images = [{"bytes": picture, "path": f"{key}.jpg"} for picture in pictures]
        for number, image in enumerate(images[1:], start=1):
            image["path"] = f"{key}.{number}.jpg"
        columns = {
            **_columns(record),
            "json": text.decode(),
            "image": images[0] if images else None,
            "more_images": images[1:],
        }
        self.rows.append(columns)
        if len(self.rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        if self.rows:
            self.writer.write_table(pyarrow.Table.from_pylist(self.rows, schema=self.schema))
            self.digests += [
                (_mark(row["json"].encode()), [_mark(image["bytes"]) for image in _images(row)])
                for row in self.rows
            ]
            self.rows = []

    def close(self) -> list[Places]:
        self._flush()
        self.writer.close()
        self.file.flush()
        parquet = import_parquet()
        places: list[Places] = []
        with open(self.file.name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            facts = parquet.ParquetFile(file).metadata
            for number in range(facts.num_row_groups):
                group = facts.row_group(number)
                rows = self.digests[len(places) : len(places) + group.num_rows]
                columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
                texts = _find(data, columns["json"], [text for text, _ in rows])
                first = iter(_find(data, columns["image.bytes"], [mark for _, p in rows for mark in p[:1]]))
                more = [mark for _, p in rows for mark in p[1:]]
                rest = iter(_find(data, columns["more_images.list.element.bytes"], more))
                for text, (_, pictures) in zip(texts, rows, strict=True):
                    own = [*itertools.islice(first, len(pictures[:1]))]
                    places.append(Places(text, [*own, *itertools.islice(rest, len(pictures[1:]))]))
        return places

    def abandon(self) -> None:
        """For a file that is thrown away: else pyarrow would write to it once more when it is garbage."""
        with contextlib.suppress(Exception):
            self.writer.close()
        self.writer.is_open = False


def _images(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if row["image"] is not None:
        yield row["image"]
        yield from row["more_images"]


def _mark(value: bytes) -> bytes:
    """The marks by which a value is known afterwards: how it begins in a page, and its digest."""
    return struct.pack("<I", len(value)) + value[:64] + hashlib.sha256(value).digest()


def _find(data: mmap.mmap, column: pyarrow.parquet.ColumnChunkMetaData, marks: list[bytes]) -> list[Place]:
    """(offset, size) of each value of a column chunk of PLAIN byte arrays: length in four bytes, then the bytes."""
    position = column.data_page_offset
    end = position + column.total_compressed_size
    places = []
    for mark in marks:
        head, digest = mark[:-32], mark[-32:]
        (size,) = struct.unpack("<I", head[:4])
        position = data.find(head, position, end)  # between values there are but the headers of pages
        start = position + 4
        if position < 0 or hashlib.sha256(data[start : start + size]).digest() != digest:
            raise RuntimeError("this version of pyarrow does not write byte arrays as they are")
        places.append((start, size))
        position = start + size
    return places


def import_parquet() -> ModuleType:
    """`pyarrow.parquet`, or an ImportError that says where it comes from."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet shards are written by pyarrow: pip install 'rode[data]'") from error
    module: ModuleType = pyarrow.parquet
    return module


def parquet_schema() -> pyarrow.Schema:
    """Columns of a Parquet shard; what the schema says of itself makes `datasets` decode the pictures."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    micronutrients = pa.list_(pa.struct({"name": text, "value": number, "unit": text}))
    nutrition = pa.struct({**dict.fromkeys(NUTRITION_FIELDS, number), "micronutrients": micronutrients})
    ingredient = pa.struct(
        {"name": text, "amount": number, "unit": text, "mass": number, "nutrition": nutrition, "text": text}
    )
    picture = pa.struct({"bytes": pa.binary(), "path": text})
    features: dict[str, object] = {"image": {"_type": "Image"}, "more_images": [{"_type": "Image"}]}
    return pa.schema(
        {
            "id": text,
            "image": picture,
            "more_images": pa.list_(picture),
            "source": text,
            "title": text,
            "category": text,
            "ingredients": pa.list_(ingredient),
            "instructions": pa.list_(text),
            "nutrition": nutrition,
            "split": text,
            "conversation": pa.list_(pa.struct({"question": text, "answer": text})),
            "json": text,
        },
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )


def _columns(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's JSON object with micronutrients, whose names are data, as a list."""

    def nutrition(value: Mapping[str, Any]) -> dict[str, Any]:
        micro = [{"name": name, **entry} for name, entry in value.get("micronutrients", {}).items()]
        return {**value, "micronutrients": micro}

    out = dict(record)
    if "nutrition" in out:
        out["nutrition"] = nutrition(out["nutrition"])
    out["ingredients"] = [
        {**i, "nutrition": nutrition(i["nutrition"])} if "nutrition" in i else i
        for i in out.get("ingredients", ())
    ]
    return out

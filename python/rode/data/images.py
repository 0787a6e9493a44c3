"""Is a record's picture there, and can it be decoded?"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from rode.data.records import FoodRecord
from rode.data.shards.address import parse_address, read_part


class ImageError(ValueError):
    """A picture that is missing or cannot be decoded. One line that names record and file."""


def open_picture(address: str | os.PathLike[str]) -> BinaryIO:
    """A picture's bytes as an open file: of a path, or of a part of a shard (`train-000012.tar#1536+61234`).

    Raises:
        FileNotFoundError, OSError: as `open` does; `rode.data.shards.address.ShardError` for a shard.
    """
    part = parse_address(os.fspath(address))
    return open(address, "rb") if part is None else io.BytesIO(read_part(*part))


def check_image(record: FoodRecord) -> None:
    """Decodes the whole picture: a file cut short passes a look at its header.

    Raises:
        ImageError: naming the record, the file and what is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError  # slow to import, and only needed here

    path = Path(record.image)
    try:
        with open_picture(path) as file, Image.open(file) as image:
            image.load()
    except FileNotFoundError:
        raise ImageError(f"record {record.id!r}: image {path} is missing") from None
    except UnidentifiedImageError:
        raise ImageError(f"record {record.id!r}: image {path} is not a picture that Pillow knows") from None
    # Pillow's decoders raise many types for damaged data
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"record {record.id!r}: image {path} cannot be decoded: {error}") from None

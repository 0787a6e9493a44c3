"""Is a record's picture there, and can it be decoded?"""

from __future__ import annotations

from pathlib import Path

from rode.data.records import FoodRecord


class ImageError(ValueError):
    """A picture that is missing or cannot be decoded. One line that names record and file."""


def check_image(record: FoodRecord) -> None:
    """Decodes the whole picture: a file cut short passes a look at its header.

    Raises:
        ImageError: naming the record, the file and what is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError  # slow to import, and only needed here

    path = Path(record.image)
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise ImageError(f"record {record.id!r}: image {path} is missing") from None
    except UnidentifiedImageError:
        raise ImageError(f"record {record.id!r}: image {path} is not a picture that Pillow knows") from None
    # Pillow's decoders raise many types for damaged data
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"record {record.id!r}: image {path} cannot be decoded: {error}") from None

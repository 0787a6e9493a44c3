"""Is a record's picture there, and can it be decoded?"""

from __future__ import annotations

from typing import Any

from rode.data.records import FoodRecord


class ImageError(ValueError):
    """A picture that is missing or cannot be decoded. One line that names record and file."""


def open_picture(path: str, who: str, smallest_side: int | None = None) -> Any:
    """The decoded picture, a PIL image.

    Args:
        path: of the file.
        who: begins an error's message.
        smallest_side: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its sides keep so
            many pixels; all of its data is read still.

    Raises:
        ImageError: naming `who`, the file and what is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError  # slow to import, and only needed here

    try:
        with Image.open(path) as image:
            if smallest_side is not None:
                image.draft("RGB", (smallest_side, smallest_side))
            image.load()
            return image
    except FileNotFoundError:
        raise ImageError(f"{who}: image {path} is missing") from None
    except UnidentifiedImageError:
        raise ImageError(f"{who}: image {path} is not a picture that Pillow knows") from None
    # Pillow's decoders raise many types for damaged data
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{who}: image {path} cannot be decoded: {error}") from None


def check_image(record: FoodRecord) -> None:
    """Decodes the whole picture: a file cut short passes a look at its header.

    Raises:
        ImageError: naming the record, the file and what is wrong with it.
    """
    open_picture(record.image, f"record {record.id!r}")

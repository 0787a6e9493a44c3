"""Is a picture there, can it be decoded, and is it of a size that one may decode?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rode.data.records import FoodRecord

MAX_PIXELS = 64_000_000
"""Pixels that a picture may have; more is taken for a decompression bomb: kilobytes on disk, gigabytes in memory."""


class ImageError(ValueError):
    """A picture that is missing or cannot be decoded. One line that names the file, and the record where there is one."""


def check_pixels(image: Any) -> None:
    """Call it on what `PIL.Image.open` gives, which has read the header alone. Raises ImageError above `MAX_PIXELS`."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")


def check_picture(path: str | os.PathLike[str]) -> str:
    """Decodes the whole picture: a file cut short passes a look at its header.

    Returns:
        Its format, as Pillow calls it: "JPEG". The name's suffix does not count: a GIF named .jpg is a GIF.

    Raises:
        ImageError: naming the file and what is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError  # slow to import, and only needed here

    try:
        with Image.open(path) as image:
            check_pixels(image)
            image.load()
            return image.format or ""
    except FileNotFoundError:
        raise ImageError(f"image {path} is missing") from None
    except UnidentifiedImageError:
        raise ImageError(f"image {path} is not a picture that Pillow knows") from None
    # Pillow's decoders raise many types for damaged data
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} cannot be decoded: {error}") from None


def check_image(record: FoodRecord) -> None:
    """`check_picture` of the record's picture.

    Raises:
        ImageError: naming the record, the file and what is wrong with it.
    """
    try:
        check_picture(record.image)
    except ImageError as error:
        raise ImageError(f"record {record.id!r}: {error}") from None


def wrong_suffix(path: str | os.PathLike[str], image_format: str) -> str | None:
    """The format that the name's suffix promises, if it is another one than the file's; None if it fits or says nothing."""
    from PIL import Image

    promised = Image.registered_extensions().get(Path(path).suffix.lower())
    # MPO is a JPEG with more pictures after it, as telephones write them
    return promised if promised not in (None, "JPEG" if image_format == "MPO" else image_format) else None

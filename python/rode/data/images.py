"""Is a record's picture there, and can it be decoded?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rode.data.records import FoodRecord

if TYPE_CHECKING:
    from PIL import Image


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


def open_image(path: str | Path) -> Image.Image:
    """Decode a picture to RGB, turned upright as its EXIF orientation says.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file is no picture that Pillow knows, or is cut short.
    """
    from PIL import Image, ImageOps

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such picture")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports a broken PNG as SyntaxError and a hopeless header as ValueError.
        raise OSError(f"{path}: not a readable picture ({error})") from error

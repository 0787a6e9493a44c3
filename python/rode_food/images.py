"""Is a picture there, can it be decoded, and is it of a size that one may decode?"""

from __future__ import annotations

import functools
import io
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from rode_food.look_up import look_up
from rode_food.records import FoodRecord
from rode_food.shards.address import parse_address, read_part

if TYPE_CHECKING:
    import PIL.Image

MAX_PIXELS = 64_000_000
"""Pixels that a picture may have; more is taken for a decompression bomb: kilobytes on disk, gigabytes in memory."""


MAX_ASPECT = 200
"""Longer side over shorter side that a picture may have; some image processors refuse more, and nothing is seen on it."""


_ORIENTATION = 0x0112  # EXIF's tag; from 5 on, width and height are exchanged


class ImageError(ValueError):
    """A picture that is missing or cannot be decoded. One line that names the file, and the record where there is one."""


@functools.cache
def _know_heic() -> None:
    """Lets Pillow open HEIC where pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def _unknown(path: str | os.PathLike[str]) -> str:
    """Why Pillow does not know a file."""
    with open_picture(path) as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "is HEIC, which needs pillow-heif: pip install 'rode[heic]'"
    return "is not a picture that Pillow knows"


def check_pixels(image: PIL.Image.Image) -> None:
    """Call it on what `PIL.Image.open` gives, which has read the header alone. Raises ImageError for a size of 0, and above
    `MAX_PIXELS` or `MAX_ASPECT`."""
    width, height = image.size
    if not min(width, height) or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{width} x {height} pixels: expected sides above 0, one at most {MAX_ASPECT} times the other"
        )
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")


def open_picture(address: str | os.PathLike[str]) -> BinaryIO:
    """A picture's bytes as an open file: of a path, or of a part of a shard (`train-000012.tar#1536+61234`).

    A path is found by `look_up`, in whichever Unicode form its name is on disk.

    Raises:
        FileNotFoundError, OSError: as `open` does; `rode_food.shards.address.ShardError` for a shard.
    """
    part = parse_address(os.fspath(address))
    if part is not None:
        return io.BytesIO(read_part(*part))
    try:
        return _open_file(address)
    except FileNotFoundError:
        found = look_up(Path(address))
        if found == Path(address):
            raise
        return _open_file(found)


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    kind = os.stat(path).st_mode
    if not (
        stat.S_ISREG(kind) or stat.S_ISDIR(kind)
    ):  # a pipe waits for a writer, and a device may never end
        raise OSError("expected a file, got a pipe, a socket or a device")
    return open(path, "rb")


class PixelBudget:
    """Lets threads decode pictures side by side, but only as many pixels at a time as `total`; a larger picture goes alone."""

    def __init__(self, total: int) -> None:
        self.total, self._used, self._free = total, 0, threading.Condition()

    @contextmanager
    def holding(self, size: tuple[int, int]) -> Iterator[None]:
        """Waits until a picture of this width and height may be decoded."""
        pixels = min(size[0] * size[1], self.total)
        with self._free:
            self._free.wait_for(lambda: self._used + pixels <= self.total)
            self._used += pixels
        try:
            yield
        finally:
            with self._free:
                self._used -= pixels
                self._free.notify_all()


_decoding = PixelBudget(MAX_PIXELS)


def _forget_other_threads() -> None:  # of the process that forked: they end nothing here
    global _decoding
    _decoding = PixelBudget(MAX_PIXELS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def decode_picture(path: str | os.PathLike[str], smallest_side: int | None = None) -> PIL.Image.Image:
    """The whole picture as a PIL image: a file cut short passes a look at its header.

    Its `format` is Pillow's name for it, "JPEG", and does not go by the file's suffix: a GIF named .jpg is a GIF.

    Args:
        path: of a file, or the address of a part of a shard.
        smallest_side: a JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its sides keep so
            many pixels; all of its data is read still.

    Raises:
        ImageError: naming the file and what is wrong with it.
    """
    from PIL import Image, UnidentifiedImageError  # slow to import, and only needed here

    _know_heic()

    image: Image.Image  # Pillow does not say what `with` gives
    try:
        with open_picture(path) as file, Image.open(file) as image:
            check_pixels(image)
            if smallest_side is not None:
                image.draft("RGB", (smallest_side, smallest_side))
            with _decoding.holding(image.size):
                image.load()
            return image
    except FileNotFoundError:
        raise ImageError(f"image {path} is missing") from None
    except UnidentifiedImageError:
        raise ImageError(f"image {path} {_unknown(path)}") from None
    # Pillow's decoders raise any type for damaged data, and NotImplementedError for what they do not do (DDS)
    except Exception as error:
        raise ImageError(f"image {path} cannot be decoded: {error}") from None


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as a person sees it, in RGB: upright as its EXIF orientation says, what is transparent over white, 16-bit
    grey scaled to 8 bits."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # as stored: 65535 is white; Pillow's own conversion makes everything above 255 white
        grey = image.convert("F")
        _, most = grey.getextrema()
        deep = isinstance(most, int | float) and most > 255
        image = grey.point(lambda value: value / 257 + 0.0).convert("L") if deep else grey.convert("L")
    if "A" in image.mode or image.mode == "PA" or "transparency" in image.info:
        image = image.convert("RGBA")
        over = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(over, image)
    return image.convert("RGB")


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) as `open_image` gives them, from the file's header. Raises OSError."""
    from PIL import Image

    _know_heic()
    with open_picture(path) as file, Image.open(file) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.height, image.width) if turned else image.size


def open_image(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """The picture in RGB by `to_rgb`: a PIL image.

    Args:
        path: of a file, or the address of a part of a shard.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file is no picture that Pillow knows, is cut short, or has more pixels than `MAX_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    _know_heic()
    try:
        with open_picture(path) as file, Image.open(file) as image:
            check_pixels(image)
            with _decoding.holding(image.size):
                return to_rgb(image)
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{path}: no such picture") from None
    except UnidentifiedImageError:
        raise OSError(f"{path}: not a readable picture (it {_unknown(path)})") from None
    # Pillow reports a broken PNG as SyntaxError, a hopeless header as ValueError, an odd DDS as NotImplementedError
    except Exception as error:
        raise OSError(f"{path}: not a readable picture ({error})") from error


def picture_from_bytes(data: bytes, formats: tuple[str, ...]) -> PIL.Image.Image:
    """The picture that these bytes hold, in RGB by `to_rgb`.

    Args:
        data: of a file that somebody else sent; nothing in them is believed.
        formats: Pillow's names of those that are taken; decoders of others are not tried.

    Raises:
        ImageError: what is wrong with them, without a name.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            check_pixels(image)
            # a JPEG has more than one picture where a telephone adds a preview
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise ImageError("expected one picture, got an animation")
            with _decoding.holding(image.size):
                return to_rgb(image)
    except UnidentifiedImageError:
        raise ImageError(
            f"expected a picture of the format {' or '.join(formats)}, got other bytes"
        ) from None
    except ImageError:
        raise
    except Exception as error:  # see `open_image`
        raise ImageError(f"a damaged picture ({error})") from None


def check_image(record: FoodRecord) -> None:
    """`decode_picture` of each of the record's pictures.

    Raises:
        ImageError: naming the record, the file and what is wrong with it.
    """
    try:
        for image in record.images:
            decode_picture(image)
    except ImageError as error:
        raise ImageError(f"record {record.id!r}: {error}") from None


def wrong_suffix(path: str | os.PathLike[str], image_format: str) -> str | None:
    """The format that the name's suffix promises, if it is another one than the file's; None if it fits or says nothing."""
    from PIL import Image

    promised = Image.registered_extensions().get(Path(path).suffix.lower())
    # MPO is a JPEG with more pictures after it, as telephones write them
    return promised if promised not in (None, "JPEG" if image_format == "MPO" else image_format) else None

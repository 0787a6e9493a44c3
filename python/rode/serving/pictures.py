"""Pictures of a request: data URLs, and nothing else."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from rode.serving.errors import wrong
from rode_food.images import ImageError, picture_from_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

_TAKEN = "a data URL of a JPEG, PNG or WebP picture (data:image/jpeg;base64,...)"
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.=+-]+)*),", re.ASCII | re.IGNORECASE)
_FORMATS = {"image/jpeg": "JPEG", "image/jpg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}


def bytes_of(url: str, param: str) -> bytes:
    """The bytes in a data URL. No address is fetched and no file is opened.

    Raises:
        ApiError: it is none, or none of a picture that is taken.
    """
    if not url[:5].lower() == "data:":
        raise wrong(
            param,
            f"expected {_TAKEN}, got {url[:40]!r}; the server fetches no address and opens no file",
        )
    head = _DATA_URL.match(url[:200])
    kind = "" if head is None else (head[1] or "text/plain").lower()
    if head is None or not head[2].lower().endswith(";base64") or kind not in _FORMATS:
        raise wrong(param, f"expected {_TAKEN}, got one that begins with {url[:40]!r}")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):  # ValueError: text that is not ASCII
        raise wrong(param, f"expected {_TAKEN}, got one whose base64 is damaged") from None


def decode(data: bytes, param: str) -> Image:
    """The picture, whatever of the taken formats its URL called it.

    Raises:
        ApiError: it cannot be decoded, or has too many pixels.
    """
    try:
        return picture_from_bytes(data, tuple(dict.fromkeys(_FORMATS.values())))
    except ImageError as error:
        raise wrong(param, str(error), code="invalid_image") from None

"""Pictures as others' rows hold them (paths, bytes, PIL images, data URLs), as paths of files."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

from rode_food.atomic import replacing
from rode_food.look_up import look_up
from rode_food.readers.common import Broken, shown

_KINDS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"))


class PictureFiles:
    """Gives each picture a path; those without one are written to a folder.

    Args:
        base: the folder to which relative paths are relative.
        folder: of pictures that have no file of their own, named by a digest, so that equal ones share a file.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base.resolve(), folder.resolve()

    def path(self, value: object) -> str:
        """The absolute path of a picture.

        Raises:
            Broken: a picture at a URL, which is not fetched, or of another form than the known ones.
        """
        if isinstance(value, str) and value.strip():
            return self._named(value)
        if isinstance(value, Path):
            return self._named(str(value))
        if isinstance(value, bytes | bytearray):
            return self._written(bytes(value))
        if isinstance(value, Mapping):
            if isinstance(value.get("bytes"), bytes | bytearray):
                return self._written(bytes(value["bytes"]))
            for key in ("path", "url", "image"):
                if value.get(key):
                    return self.path(value[key])
        if hasattr(value, "save") and hasattr(
            value, "convert"
        ):  # a PIL image; Pillow need not be imported for others
            out = io.BytesIO()
            mode = getattr(value, "mode", "")
            (
                value if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16") else value.convert("RGB")
            ).save(out, "PNG")
            return self._written(out.getvalue())
        raise Broken("a picture of an unknown form", shown(value))

    def _named(self, text: str) -> str:
        scheme = text.partition(":")[0].lower()
        if scheme == "data":
            head, _, data = text.partition(",")
            try:
                return self._written(
                    base64.b64decode(data, validate=True) if head.endswith(";base64") else b""
                )
            except binascii.Error as error:
                raise Broken("a damaged data URL", str(error)) from None
        if scheme in ("http", "https", "s3", "gs", "hf"):
            raise Broken("a picture at a URL, which is not fetched", shown(text))
        if scheme == "file":
            text = unquote(urlparse(text).path)
        return str(look_up(self.base / text))

    def _written(self, data: bytes) -> str:
        kinds = (kind for magic, kind in _KINDS if data.startswith(magic))
        suffix = next(kinds, "webp" if data[8:12] == b"WEBP" else None)
        if suffix is None:
            raise Broken("bytes that are no picture", shown(data[:20]))
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
        if not path.is_file():
            with replacing(path, "wb") as out:
                out.write(data)
        return str(path)

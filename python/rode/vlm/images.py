"""Opening pictures, and finding out before a run which of them cannot be opened."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from rode_food.images import open_image


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of one colour, as large as its longer side."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class HasImage(Protocol):
    """The part of an example that is needed to pack it (`rode_food.Example` has it)."""

    @property
    def images(self) -> tuple[str, ...]: ...


E = TypeVar("E", bound=HasImage)


def image_problems(paths: Iterable[str | Path], workers: int = 8) -> dict[str, str]:
    """Decode every picture once; the message for each that fails, by path. Decoding is the only sure test: a
    picture cut short has a sound header."""

    def problem(path: str) -> str | None:
        try:
            open_image(path)
        except OSError as error:
            return str(error)
        return None

    unique = list(dict.fromkeys(str(path) for path in paths))
    with ThreadPoolExecutor(workers) as pool:
        return {
            path: message for path, message in zip(unique, pool.map(problem, unique), strict=True) if message
        }

"""Opening pictures, and finding out before a run which of them cannot be opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """The part of an example that is needed here (`rode_food.Example` has it)."""

    @property
    def record_id(self) -> str: ...

    @property
    def image(self) -> str: ...


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


def drop_bad_images(examples: Sequence[E], on_bad_image: str = "error") -> tuple[list[E], list[str]]:
    """Split off the examples whose picture cannot be read.

    Args:
        examples: anything with `record_id` and `image`.
        on_bad_image: "error" raises on the first bad picture, "skip" leaves its examples out.

    Returns:
        The usable examples in their order, and one line per record left out.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image: expected 'error' or 'skip', got {on_bad_image!r}")
    problems = image_problems(example.image for example in examples)
    lines = list(
        dict.fromkeys(
            f"record {example.record_id}: {problems[example.image]}"
            for example in examples
            if example.image in problems
        )
    )
    if lines and on_bad_image == "error":
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise OSError(f"{lines[0]}{more}; mend the picture, or set data.on_bad_image=skip")
    return [example for example in examples if example.image not in problems], lines

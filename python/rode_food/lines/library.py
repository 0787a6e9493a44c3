"""The library's reading of a line, as plain values that a file can keep.

`ingredient_parser` (https://ingredient-parser.readthedocs.io) is a sequence model trained on 80,000 lines. It reads about 170
lines a second, and its import takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingredient_parser.dataclasses import CompositeIngredientAmount, IngredientAmount, ParsedIngredient


@dataclass(frozen=True)
class RawAmount:
    """One amount, unit as the library names it.

    Attributes:
        low, high: the ends of a range; None where the line gives no number.
        unit: "cup", "fluid_ounce", "large handfuls", "".
        each: the amount is that of one container.
        parts: of "1 lb 2 oz"; then the rest is empty.
        subtractive: the second part is taken off: "1 cup minus 1 tbsp".
    """

    low: float | None = None
    high: float | None = None
    unit: str = ""
    each: bool = False
    parts: tuple[RawAmount, ...] = ()
    subtractive: bool = False


@dataclass(frozen=True)
class Raw:
    """The library's reading of one line: names of alternatives, amounts in order, and the words around them.

    `failed`: it raised an error, and the rest is empty.
    """

    names: tuple[str, ...] = ()
    amounts: tuple[RawAmount, ...] = ()
    size: str = ""
    preparation: str = ""
    comment: str = ""
    failed: bool = False


def version() -> str:
    """The library's version: another one may read another way.

    Raises:
        ImportError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("ingredient_parser_nlp")
    except PackageNotFoundError as error:
        raise _not_installed(error) from None


def parse(text: str) -> Raw:
    """Reads one line.

    Raises:
        ImportError: without ingredient-parser-nlp.
        OSError: without NLTK's tagger; says which download.
    """
    read = parser()
    try:
        return _raw(read(text))
    # it is not written for any text at all: "", "1/0" and lone signs raise a variety of errors
    except Exception:
        return Raw(failed=True)


@functools.cache
def parser() -> Callable[[str], ParsedIngredient]:
    """`parse_ingredient`, after a look whether NLTK's data is there: without it the first line would fail."""
    module = _import()
    try:
        module.parse_ingredient("1 cup water")
    except LookupError as error:
        raise _no_tagger() from error
    found: Callable[[str], ParsedIngredient] = module.parse_ingredient
    return found


def _import() -> ModuleType:
    try:
        import ingredient_parser  # slow: a model and NLTK
    except ImportError as error:
        raise _not_installed(error) from None
    except LookupError as error:
        raise _no_tagger() from error
    return ingredient_parser


def _not_installed(error: Exception) -> ImportError:
    return ImportError(
        f"reading ingredient lines needs ingredient-parser-nlp: pip install 'rode[data]' ({error})"
    )


def _no_tagger() -> OSError:
    return OSError(
        "ingredient-parser-nlp needs NLTK's tagger, which is not here and cannot be downloaded: run "
        "`python -m nltk.downloader averaged_perceptron_tagger_eng` where there is a network, and set NLTK_DATA to the "
        "folder that it made if it is not nltk_data in the home folder"
    )


def _raw(parsed: ParsedIngredient) -> Raw:
    return Raw(
        tuple(name.text for name in parsed.name if name.text),
        tuple(_amount(entry) for entry in parsed.amount),
        size=parsed.size.text if parsed.size else "",
        preparation=parsed.preparation.text if parsed.preparation else "",
        comment=parsed.comment.text if parsed.comment else "",
    )


def _amount(entry: IngredientAmount | CompositeIngredientAmount) -> RawAmount:
    parts: Any = getattr(entry, "amounts", None)
    if parts is not None:
        return RawAmount(
            parts=tuple(map(_amount, parts)), subtractive=bool(getattr(entry, "subtractive", False))
        )
    single: Any = entry
    try:
        low, high = float(single.quantity), float(single.quantity_max)
    except ValueError:  # "a few", or no number at all
        return RawAmount(unit=str(single.unit), each=bool(single.SINGULAR))
    return RawAmount(low, high, str(single.unit), bool(single.SINGULAR))


def to_values(raw: Raw) -> list[Any]:
    """Lists, texts and numbers, for JSON."""
    return [
        list(raw.names),
        [_amount_values(a) for a in raw.amounts],
        raw.size,
        raw.preparation,
        raw.comment,
        raw.failed,
    ]


def from_values(values: list[Any]) -> Raw:
    """The reading that `to_values` wrote."""
    names, amounts, *rest = values
    return Raw(tuple(names), tuple(map(_amount_from, amounts)), *rest)


def _amount_values(amount: RawAmount) -> list[Any]:
    if amount.parts:
        return [amount.subtractive, [_amount_values(part) for part in amount.parts]]
    return [amount.low, amount.high, amount.unit, amount.each]


def _amount_from(values: list[Any]) -> RawAmount:
    if len(values) == 2:
        return RawAmount(subtractive=values[0], parts=tuple(map(_amount_from, values[1])))
    return RawAmount(*values)

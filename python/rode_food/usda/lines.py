"""The reading of an ingredient line: names, amounts with their units, size.

Read by `ingredient_parser` (https://ingredient-parser.readthedocs.io): a sequence model trained on 80,000 lines, which
keeps every amount of a line apart ("2 cups (250 g)", "2 (6 oz) cans") and the names of alternatives.
`rode_food.ingredient_lines`, which readers use, adds its reading of the name: on "Salt Amount = 10 g" and the like
it is the better one (docs/golden.md has both measured).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from rode_food.ingredient_lines import parse_ingredient_line
from rode_food.records import Ingredient
from rode_food.usda.names import singular
from rode_food.usda.units import GRAMS, MILLILITRES, unit_name

if TYPE_CHECKING:
    from ingredient_parser.dataclasses import CompositeIngredientAmount, IngredientAmount, ParsedIngredient

_COUNTED_WORDS = "clove stalk stick slice sprig leaf root bulb head rib fillet ear wedge floret cube"
_COUNTED = frozenset(_COUNTED_WORDS.split())


@dataclass(frozen=True)
class Amount:
    """One amount of a line.

    Attributes:
        low, high: the ends of a range; equal where the line gives one number.
        unit: "g", "cup", "clove", ... in the singular; "" for a bare count.
        each: the amount is that of one container: "2 (6 oz) cans".
    """

    low: float
    high: float
    unit: str
    each: bool = False

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Line:
    """One line, read.

    Attributes:
        names: what it may be about, the likeliest first.
        amounts: in the line's order.
        words: everything that describes it (name, size, preparation), lower case, for the choice of a measure.
    """

    names: tuple[str, ...]
    amounts: tuple[Amount, ...]
    words: str = ""


def _import_parser() -> ModuleType:
    try:
        import ingredient_parser  # slow: a model and NLTK
    except ImportError as error:
        raise ImportError(
            f"reading ingredient lines needs ingredient-parser-nlp: pip install 'rode[data]' ({error})"
        ) from None
    except LookupError as error:
        raise _no_tagger() from error
    return ingredient_parser


def _no_tagger() -> OSError:
    return OSError(
        "ingredient-parser-nlp needs NLTK's tagger, which is not here and cannot be downloaded: run "
        "`python -m nltk.downloader averaged_perceptron_tagger_eng` where there is a network, and set NLTK_DATA to the "
        "folder that it made if it is not nltk_data in the home folder"
    )


@functools.cache
def _parser() -> Callable[[str], ParsedIngredient]:
    """`parse_ingredient`, after a look whether NLTK's data is there: without it the first line would fail."""
    module = _import_parser()
    try:
        module.parse_ingredient("1 cup water")
    except LookupError as error:
        raise _no_tagger() from error
    parse: Callable[[str], ParsedIngredient] = module.parse_ingredient
    return parse


def line_of(ingredient: Ingredient) -> Line:
    """An ingredient of a record as a line: its own `text` where it has one, else amount, unit and name as it states them.

    A name is read as a line of its own, for it may still hold more than a name ("garlic cloves, minced").

    Raises:
        ImportError, OSError: of `read_line`.
    """
    if ingredient.text:
        line = read_line(ingredient.text)
        return Line(tuple(dict.fromkeys((*line.names, ingredient.name))), line.amounts, line.words)
    line = read_line(ingredient.name)
    amounts = line.amounts
    if ingredient.amount is not None:
        counted = ingredient.name.lower().split()[-1]
        unit = unit_name(ingredient.unit or "") or (
            singular(counted) if singular(counted) in _COUNTED else ""
        )
        amounts = (Amount(ingredient.amount, ingredient.amount, unit),)
    return Line(tuple(dict.fromkeys((ingredient.name, *line.names))), amounts, line.words)


@functools.lru_cache(maxsize=200_000)
def read_line(text: str) -> Line:
    """Reads one line.

    Raises:
        ImportError: without ingredient-parser-nlp.
        OSError: without NLTK's tagger; says which download.
    """
    parsed = _parser()(_plain(text))
    from ingredient_parser.dataclasses import IngredientAmount  # it is there now

    names = [_with_state(clean, text) for name in parsed.name if (clean := _clean(name.text))]
    own = parse_ingredient_line(text)
    if own is not None:
        names.append(_clean(own.name))
    amounts = [amount for entry in parsed.amount if (amount := _amount(entry)) is not None]
    # "Ginger Slice 6-8 slices" is read as 1 slice and 6 to 8 slices
    amounts = [
        a for a in amounts if a.high != 1 or not any(b is not a and b.unit == a.unit for b in amounts)
    ] or amounts
    size = parsed.size.text if parsed.size else ""
    if len(amounts) == 1 and not amounts[0].unit:
        # "2 garlic cloves" are 2 cloves, "Scallion: 2 stalks" may be read as a name of its own
        last = [singular(name.lower().split()[-1]) for name in names]
        last += [
            unit_name(str(entry.unit))
            for entry in parsed.amount
            if isinstance(entry, IngredientAmount) and entry.quantity == ""
        ]
        counted = next((word for word in last if word in _COUNTED), None)
        if counted:
            amounts = [Amount(amounts[0].low, amounts[0].high, counted)]
    if own is not None and own.amount is not None and not any(amount.unit for amount in amounts):
        unit = unit_name(own.unit or "")  # the other reading knows "9 dl"
        if not amounts or unit in GRAMS or unit in MILLILITRES:
            amounts = [Amount(own.amount, own.amount, unit)]
    preparation = parsed.preparation.text if parsed.preparation else ""
    words = " ".join([*(name.text for name in parsed.name), size, preparation]).lower()
    return Line(tuple(dict.fromkeys(filter(None, names))), tuple(amounts), words)


def _plain(text: str) -> str:
    """Without the signs of a list of amounts: "Salt Amount = 10 g" and "Salt: 10 g" are "Salt 10 g"."""
    text = re.sub(r"\s+(?:amount|usage|quantity)\b(?=\s*[=:])", " ", text, flags=re.I)
    return re.sub(r"\s*[=:]\s*", " ", text).strip()


def _with_state(name: str, text: str) -> str:
    """With the word before it that makes another food of it, which the parser takes for preparation: "cooked rice"; "rice,
    cooked" was measured before."""
    match = re.search(rf"\b(cooked|mashed)\s+{re.escape(name)}", text, re.I)
    return f"{match[1]} {name}" if match else name


def _clean(name: str) -> str:
    return re.sub(
        r"^(?:of|the|a|an)\s+|\s+(?:amount|usage|quantity|servings?)$", "", name.strip(" .,;:=-*"), flags=re.I
    )


def _amount(entry: IngredientAmount | CompositeIngredientAmount) -> Amount | None:
    from ingredient_parser.dataclasses import CompositeIngredientAmount

    if isinstance(entry, CompositeIngredientAmount):
        # "1 lb 2 oz", "1 cup plus 1 tbsp": one amount if the units agree, else in the first unit
        inner = [amount for part in entry.amounts if (amount := _amount(part)) is not None]
        same = len({amount.unit for amount in inner}) == 1
        if not inner or entry.subtractive:
            return None
        if same:
            return Amount(sum(a.low for a in inner), sum(a.high for a in inner), inner[0].unit)
        return _sum(inner)
    try:
        low, high = float(entry.quantity), float(entry.quantity_max)
    except ValueError:  # "a few", or no number at all
        return None
    if low < 0 or high <= 0:
        return None
    return Amount(low, high, unit_name(str(entry.unit)), entry.SINGULAR)


def _sum(amounts: list[Amount]) -> Amount | None:
    """Amounts of several units, all weights or all volumes, in that of the first; else None."""
    for table in (GRAMS, MILLILITRES):
        if all(amount.unit in table for amount in amounts):
            base = table[amounts[0].unit]
            factors = [table[a.unit] / base for a in amounts]
            low = sum(a.low * f for a, f in zip(amounts, factors, strict=True))
            return Amount(
                low, sum(a.high * f for a, f in zip(amounts, factors, strict=True)), amounts[0].unit
            )
    return None

"""The reading of an ingredient line: names, amounts with their units, size.

One reading for readers, labelling and golden set: the line is made plain (`prepare`), read by the library (`library`, kept by
`store`), and put right where the library errs. Chinese and Japanese lines have a reader of their own (`cjk`).
`rode_food.lines.simple`, which needs no library, gives the name where the library finds none.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rode_food.lines import library
from rode_food.lines.cjk import is_cjk, read_cjk
from rode_food.lines.library import Raw, RawAmount
from rode_food.lines.prepare import Prepared, number_of, prepare
from rode_food.lines.simple import is_heading, parse_ingredient_line
from rode_food.lines.store import Store, cache_path
from rode_food.lines.units import GRAMS, MILLILITRES, unit_name
from rode_food.lines.words import singular
from rode_food.records import Ingredient

_COUNTED_WORDS = "clove stalk stick slice sprig leaf root bulb head rib fillet ear wedge floret cube"
_COUNTED = frozenset(_COUNTED_WORDS.split())
_NUMBER = r"(?:\d+\s+\d+/\d+|\d+/\d+|\d+(?:\.\d+)?)"
# "2 (10 oz) packages", "2 x 400 g tins", "4 15oz cans": the second number is that of one
_EACH = re.compile(
    rf"^(?P<count>{_NUMBER})\s*(?:x\s*)?(?P<open>\(\s*)?(?:about\s+|approx\.?\s+)?{_NUMBER}\s*-?\s*(?:oz|ounces?|g|grams?|kg|lbs?|pounds?|ml)\b",
    re.I,
)
_EACH_WORD = re.compile(r"\b(?:each|apiece|per (?:can|tin|jar|pack|package|bag))\b", re.I)
_UNIT_WORDS = (
    r"(?:g|kg|mg|ml|cl|dl|l|oz|fl oz|lbs?|cups?|tbsps?|tsps?|tablespoons?|teaspoons?|pounds?|ounces?|grams?)"
)
_JUNK_BEFORE = re.compile(
    rf"^(?:(?:x\s+)?[\d./½¼¾⅓⅔⅛-]+\s*(?:{_UNIT_WORDS}\b\.?)?\s*|x\s+(?=\d)|[/|+&,;:)]\s*|{_UNIT_WORDS}\.\s+)+",
    re.I,
)
# "White sugar 120 g", "Onion (half)": an amount behind the name, which the library leaves there now and then
_AMOUNT_AFTER = re.compile(
    r"(?:\s+[\d./½¼¾-]+\s*(?:[a-z]{1,8}\.?)?|\s*\((?:half|whole|[\d./½¼¾-]+\s*[a-z]*)\))$", re.I
)
_TEMPERATURE = re.compile(
    r"^(?:boiling|hot|cold|warm|lukewarm|tepid|ice[- ]cold|iced|room[- ]temperature)\s+"
    r"(?=(?:\w+\s+)?(?:water|milk|stock|broth)$)",
    re.I,
)
_BATCH = 200


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
        names: what it may be about, the likeliest first; none for a heading or a line without a word.
        amounts: in the line's order.
        words: everything that describes it (name, size, preparation), lower case, for the choice of a measure.
        notes: doubts about the reading, in words.
    """

    names: tuple[str, ...]
    amounts: tuple[Amount, ...]
    words: str = ""
    notes: tuple[str, ...] = ()


def stated_mass(line: Line) -> float | None:
    """Grams that a line states: its first weight, times the containers that hold so much each; None without a weight.

    A fraction never multiplies: "1/2 (400 g) can" may be half of 400 g, or 400 g that half a can holds, so it states nothing.
    """
    for amount in line.amounts:
        if amount.unit in GRAMS:
            count = containers(amount, line.amounts)
            if count != int(count):
                return None
            grams = amount.middle * GRAMS[amount.unit] * count
            return grams if math.isfinite(grams) else None
    return None


def containers(amount: Amount, amounts: Sequence[Amount]) -> float:
    """How many containers of that amount each: 2 for "2 (6 oz) cans", else 1."""
    if not amount.each:
        return 1.0
    others = [
        a.middle for a in amounts if a is not amount and a.unit not in GRAMS and a.unit not in MILLILITRES
    ]
    return others[0] if others else 1.0


def to_ingredient(line: Line, text: str) -> Ingredient | None:
    """The line as a record holds it: its likeliest name in lower case, its first amount (the middle of a range) and its
    weight; None for a line that names nothing."""
    if not line.names:
        return None
    amount = next((a for a in line.amounts if not a.each), None) or next(iter(line.amounts), None)
    value = None if amount is None or not math.isfinite(amount.middle) else amount.middle
    unit = None if amount is None or value is None else amount.unit or None
    name = _TEMPERATURE.sub("", line.names[0]).lower()
    return Ingredient(name, value, unit, stated_mass(line), text=text)


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
    return read_lines([text])[0]


def read_lines(texts: Sequence[str]) -> list[Line]:
    """Reads lines; each that this machine has read before comes from the file of `store.cache_path`.

    Raises:
        ImportError, OSError: of `read_line`.
    """
    plain = {text: prepare(text) for text in texts if not is_cjk(text)}
    raw = _parsed(list(dict.fromkeys(p.text for p in plain.values())))
    return [
        _assemble(text, plain[text], raw[plain[text].text]) if text in plain else _cjk(text) for text in texts
    ]


@functools.lru_cache(maxsize=1)
def _store() -> Store:
    return Store(cache_path(), library.version())


def _parsed(texts: list[str]) -> dict[str, Raw]:
    store = _store()
    found = store.get(texts)
    missing = [text for text in texts if text not in found]
    for start in range(0, len(missing), _BATCH):
        new = {text: library.parse(text) for text in missing[start : start + _BATCH]}
        store.put(new)
        found |= new
    return found


def _cjk(text: str) -> Line:
    name, amounts = read_cjk(text)
    return Line((name,) if name else (), tuple(Amount(*amount) for amount in amounts), name)


def _assemble(text: str, plain: Prepared, raw: Raw) -> Line:
    if is_heading(text):
        return Line((), ())
    own = parse_ingredient_line(plain.text)
    trailing = own is not None and own.amount is not None and any(_AMOUNT_AFTER.search(n) for n in raw.names)
    names = _joined([n for n in map(_clean, raw.names) if n], plain.text)
    names = [_with_state(_outside(name, plain.text), text) for name in names]
    if own is not None:
        names.append(_clean(own.name))
    amounts = [amount for entry in raw.amounts if (amount := _amount(entry)) is not None]
    # "Ginger Slice 6-8 slices" is read as 1 slice and 6 to 8 slices
    amounts = [
        a for a in amounts if a.high != 1 or not any(b is not a and b.unit == a.unit for b in amounts)
    ] or amounts
    amounts = _each(_said(amounts, plain.text), plain.text)
    if len(amounts) == 1 and not amounts[0].unit:
        # "2 garlic cloves" are 2 cloves, "Scallion: 2 stalks" may be read as a name of its own
        last = [singular(name.lower().split()[-1]) for name in names if name]
        last += [unit_name(entry.unit) for entry in raw.amounts if entry.low is None and not entry.parts]
        counted = next((word for word in last if word in _COUNTED), None)
        if counted:
            amounts = [Amount(amounts[0].low, amounts[0].high, counted)]
    if trailing and own is not None and own.amount is not None:
        names = [_AMOUNT_AFTER.sub("", name) for name in names]
        amounts = [Amount(own.amount, own.amount, unit_name(own.unit or ""))]
    if own is not None and own.amount is not None and not any(amount.unit for amount in amounts):
        unit = unit_name(own.unit or "")  # the other reading knows "9 dl"
        if not amounts or unit in GRAMS or unit in MILLILITRES:
            amounts = [Amount(own.amount, own.amount, unit)]
    notes = (
        (*plain.notes, "the library fails on it: read by the simple parser") if raw.failed else plain.notes
    )
    words = " ".join([*raw.names, raw.size, raw.preparation]).lower()
    names = [name for name in names if re.search(r"[^\W\d_]", name)] or _whatever(plain.text)
    if plain.qualifier and names:
        names.insert(0, f"{names[0]} ({plain.qualifier})")
    return Line(tuple(dict.fromkeys(names)), tuple(amounts), words, notes)


def _whatever(text: str) -> list[str]:
    """The words of a line in which nobody finds a name: it is kept, not lost."""
    outside = re.sub(r"\([^)]*\)?", " ", text)
    for candidate in (outside, text):
        name = " ".join(_clean(re.split(r"[,;]", candidate)[0]).split())
        if re.search(r"[^\W\d_]", name):
            return [name]
    name = _clean(text)
    return [name] if re.search(r"[^\W\d_]", name) else []


def _joined(names: list[str], text: str) -> list[str]:
    """ "salt & pepper" names one thing that is two, "butter or oil" one of two."""
    if len(names) < 2:
        return names
    both = re.search(rf"\b{re.escape(names[0])}\s*(?:&|and)\s+{re.escape(names[1])}\b", text, re.I)
    return [" ".join(both[0].split()), *names] if both else names


def _outside(name: str, text: str) -> str:
    """ "Garlic (fresh, peeled)" is garlic, not "Garlic fresh", which nobody wrote."""
    if "(" not in text or "(" in name or name.lower() in text.lower():
        return name
    without = re.sub(r"\([^)]*\)?", " ", text).lower()
    kept = [word for word in name.split() if word.lower() in without]
    return " ".join(kept) or name


def _with_state(name: str, text: str) -> str:
    """With the word before it that makes another food of it, which the parser takes for preparation: "cooked rice"; "rice,
    cooked" was measured before."""
    match = re.search(rf"\b(cooked|mashed)\s+{re.escape(name)}", text, re.I)
    return f"{match[1]} {name}" if match else name


def _clean(name: str) -> str:
    name = re.split(r"(?<=\w{4})\.\s", name)[0]  # the next sentence is a remark
    name = _JUNK_BEFORE.sub("", name.strip(" .,;:=-*|/+"))
    return re.sub(
        r"^(?:of|the|a|an)\s+|\s+(?:amount|usage|quantity|servings?)$",
        "",
        name.strip(" .,;:=-*|/+"),
        flags=re.I,
    ).strip()


def _said(amounts: list[Amount], text: str) -> list[Amount]:
    """Without the one tin of "400g/14oz tin tomatoes", which the library adds: the line begins with the weight."""
    begins = re.match(_NUMBER, text)
    if len(amounts) < 2 or begins is None or number_of(begins[0]) == 1:
        return amounts
    weighed = any(a.unit in GRAMS or a.unit in MILLILITRES for a in amounts)
    return [
        a
        for a in amounts
        if not weighed or (a.low, a.high) != (1, 1) or a.unit in GRAMS or a.unit in MILLILITRES
    ]


def _each(amounts: list[Amount], text: str) -> list[Amount]:
    """With `each` where the words say so: before the container, or by "each". The library says it too of "1/4 cup (30 g)"."""
    if len(amounts) < 2:
        return [Amount(a.low, a.high, a.unit) for a in amounts]
    before = _EACH.match(text)
    word = _EACH_WORD.search(text) is not None
    form = before is not None and (before["open"] is not None or any(a.each for a in amounts))
    first = amounts[0]
    measured = first.unit in GRAMS or first.unit in MILLILITRES
    counts = form or word
    if before is not None and form and measured:  # the library may give the weight first
        measured = first.middle == number_of(before["count"])
    return [
        Amount(a.low, a.high, a.unit, counts and not measured and (a.unit in GRAMS or a.unit in MILLILITRES))
        for a in amounts
    ]


def _amount(entry: RawAmount) -> Amount | None:
    if entry.parts:
        # "1 lb 2 oz", "1 cup plus 1 tbsp": one amount if the units agree, else in the first unit
        inner = [amount for part in entry.parts if (amount := _amount(part)) is not None]
        if not inner:
            return None
        if entry.subtractive:  # "1 cup minus 2 tbsp"
            inner = [inner[0], *(Amount(-a.high, -a.low, a.unit) for a in inner[1:])]
        if len({amount.unit for amount in inner}) == 1:
            return Amount(sum(a.low for a in inner), sum(a.high for a in inner), inner[0].unit)
        return _sum(inner)
    if entry.low is None or entry.high is None or entry.low < 0 or entry.high <= 0:
        return None
    return Amount(entry.low, entry.high, unit_name(entry.unit), entry.each)


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

"""A first reading of a line, without the library: "~150g (1/3 lb) bacon cubes" -> bacon cubes, 150 g.

Readers use it because it reads 20,000 lines a second; `rode_food.lines.reading` reads better, where names and amounts are needed.
A small parser for the common forms, not a grammar of cookery: what stands before the first comma, without
amount, brackets and words of preparation, is the name. A line it cannot make sense of keeps its text as name.
"""

from __future__ import annotations

import re
import unicodedata

from rode_food.records import Ingredient

_GRAMS = {"mg": 0.001, "g": 1.0, "kg": 1000.0, "oz": 28.349523125, "lb": 453.59237}
_UNIT_WORDS = {
    "mg": "mg milligram milligrams",
    "g": "g gr gram grams gramme grammes",
    "kg": "kg kilo kilos kilogram kilograms",
    "oz": "oz ounce ounces",
    "lb": "lb lbs pound pounds",
    "ml": "ml milliliter milliliters millilitre millilitres cc",
    "cl": "cl",
    "dl": "dl",
    "l": "l liter liters litre litres",
    "tsp": "tsp tsps teaspoon teaspoons",
    "tbsp": "tbsp tbsps tbs tablespoon tablespoons",
    "cup": "cup cups",
    "pint": "pint pints",
    "quart": "quart quarts",
    "gallon": "gallon gallons gal",
}
_CONTAINERS = (
    "can jar tin bottle glass bag pack packet package sachet stick stalk sprig root head bulb clove slice "
    "piece block bunch handful pinch dash drop spoon portion serving leaf plant segment section cob"
)
_UNIT_WORDS |= {word: f"{word} {word}s" for word in _CONTAINERS.split()}
_UNIT_WORDS["glass"] += " glasses"
_UNIT_WORDS["dash"] += " dashes"
_UNIT_WORDS["pinch"] += " pinches"
_UNIT_WORDS["bunch"] += " bunches"
_UNIT_WORDS["leaf"] += " leaves"
_UNITS = {word: unit for unit, words in _UNIT_WORDS.items() for word in words.split()}
# units that may be meant without a number: "pinch of salt"
_BARE = r"(?:can|jar|tin|bottle|glass|drop)(?= of\b)|bunch|handful|pinch|dash"
_COUNT_WORDS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "half": 0.5}

_ALONE = ("a", "an", "one", "two", "half", "half a")  # number words that count without a unit

_THOUSANDS = r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?![\d,])"  # "1,000"; "0,125" and "1,5" have a decimal comma
_ONE = rf"(?:\d+\s+\d+/\d+|\d+/\d+|{_THOUSANDS}|\d+(?:[.,]\d+)?)"
_WORDS = "|".join(_COUNT_WORDS)
_AMOUNT = rf"(?:(?P<low>{_ONE})(?:\s*(?:-|–|~|to|or)\s*(?P<high>{_ONE}))?|(?P<word>(?:{_WORDS})(?:\s+a)?\b(?!-)))(?!\d|\s*%)"
_UNIT = r"(?P<unit>" + "|".join(sorted(_UNITS, key=len, reverse=True)) + r")(?![^\W\d_])\.?"
_LEADING = re.compile(rf"\s*{_AMOUNT}\s*(?:(?:metric|heaped|level|large|small|medium)\s+)?(?:{_UNIT})?", re.I)
_TRAILING = re.compile(rf"^(?P<name>\D*?[^\W\d_])[\s:=–-]+{_AMOUNT}\s*(?:{_UNIT})?(?P<rest>.*)$", re.I)
_SIZE = re.compile(rf"\s*-?\s*{_ONE}\s*-?\s*(?:g|ml|oz|ounces?)\b\.?", re.I)
_BARE_UNIT = re.compile(rf"\s*(?P<unit>{_BARE})\b(?:\s+of\b)?", re.I)

_APPROXIMATE = re.compile(r"^\s*(?:~|≈|about\b|approx(?:imately|\.)?|around\b|ca\.?\s)\s*", re.I)
_PREPARATION = (
    "large|small|medium|medium-sized|medium sized|big|whole|fresh|freshly|finely|thinly|roughly|coarsely|very|thin|"
    "chopped|minced|diced|small-diced|sliced|grated|shredded|peeled|crushed|melted|softened|cooked|rinsed|drained|"
    "cubed|halved|boiling|cold|warm|lukewarm|hot|room temperature|some|few|a few|several|good quality"
)
_BEFORE_NAME = re.compile(rf"^(?:(?:of|the|(?:slices?|pieces?) of|{_PREPARATION})\s+)+", re.I)
_AFTER_NAME = re.compile(
    r"(?:\s+(?:chopped|minced|diced|sliced|grated|shredded|peeled|crushed|melted|softened|optional|preferably)|"
    r"\s+(?:to taste|per \w+|as needed|as required|at room temperature|for (?!the\b).*|for the .*))+$",
    re.I,
)
# the first one of several alternatives, and nothing of an aside
_END_OF_NAME = re.compile(r"[,;:/|]|\.\s|\s[-–—]\s|\s+or\s+|\s+\+\s+|\s+plus\s+", re.I)
_NAMED_UNIT = re.compile(r"^(?P<name>.+) (?P<unit>cloves?|sticks?|sprigs?|stalks?|bulbs?)$", re.I)
_HEADING = re.compile(r"^\s*(?:for (?:the )?[^\d]*|[^\d]*:)\s*$", re.I)


def parse_ingredient_line(line: str) -> Ingredient | None:
    """One line of a recipe's list.

    Returns:
        The ingredient: name in lower case, `amount` (the middle of a range) and `unit` as stated, `mass` in
        grams where the line states a weight (in brackets too). None for a heading, for a line that begins with "or" and
        for one without a word, and for no other.
    """
    text = _plain(line)
    if is_heading(text):
        return None
    each = re.match(rf"{_ONE} ?\([^)]*\) ?{_UNIT}", text, re.I) is not None  # "2 (6 oz) cans": 6 oz each
    asides = re.findall(r"\(([^)]*)\)?", text)
    text = re.sub(r"\s*\([^)]*\)?\s*", " ", text).strip()
    amount, unit, rest = _take_amount(_APPROXIMATE.sub("", text))
    if amount is None:  # "Rice (50 grams)", "Egg (3)"
        for aside in asides:
            inner, inner_unit, left = _take_amount(_APPROXIMATE.sub("", aside.strip()))
            if inner is not None and not left.strip(" .,"):
                amount, unit = inner, inner_unit
                break
    # a line in which no name is found keeps its words as name: none is lost
    name = (
        _name(rest)
        or _name(re.sub(r"^[\W\d_]+", "", rest))
        or _name(re.sub(r"^[\W\d_]+", "", text))
        or _words(rest)
        or _words(line)
    )
    named = None if unit else _NAMED_UNIT.match(name)
    if named:  # "2 garlic cloves" are 2 cloves of garlic
        name, unit = named["name"], _unit(named["unit"])
    return Ingredient(name, amount, unit, _mass(amount, unit, asides, each=each))


def is_heading(line: str) -> bool:
    """True for "For the sauce:", a line that begins with "or" (another way to do the line before) and one without a word."""
    text = _plain(line)
    return bool(_HEADING.match(text) or re.match(r"or\b", text, re.I) or not re.search(r"[^\W\d_]", text))


def parse_amount(text: str) -> float | None:
    """The number at the beginning of "1 1/2", "2-3" (the middle) or "half a"; None if there is none."""
    match = re.match(rf"\s*{_AMOUNT}", _plain(text), re.I)
    return None if match is None else _number(match)


def normalise_unit(text: str) -> str | None:
    """ "Tablespoons" and "tbs." -> tbsp; a unit that is not known stays as it is, in lower case; None for no word."""
    word = " ".join(text.lower().split()).rstrip(".")
    return _UNITS.get(word, word) or None


def _plain(line: str) -> str:
    line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line)  # a Markdown link is its text
    line = re.sub(r"([¼-¾⅐-⅞])", r" \1", line)  # 1½ is 1 1/2, not 11/2
    line = unicodedata.normalize("NFKC", line).replace("⁄", "/").replace("（", "(").replace("）", ")")
    line = re.sub(r"^\s*(?:essential|optional|main ingredients?|seasonings?)\s*:\s*", "", line, flags=re.I)
    line = re.sub(r"\(\s*optional\s*\)", "", line, flags=re.I)
    return " ".join(re.sub(r"^\s*[-*•]\s+", "", line).split())


def _take_amount(text: str) -> tuple[float | None, str | None, str]:
    """(amount, unit, what is left of the text)."""
    match = _LEADING.match(text)
    # "Five Spice Powder" is no five of anything
    if match and (match["unit"] or not match["word"] or match["word"].lower() in _ALONE):
        rest = text[match.end() :]
        unit = match["unit"]
        size = None if unit else _SIZE.match(rest)
        if size:  # "4 15oz cans of beans" are 4 cans
            container = re.match(rf"\s*(?:(?:large|small)\s+)?{_UNIT}", rest[size.end() :], re.I)
            if container:
                unit, rest = container["unit"], rest[size.end() + container.end() :]
        # the same once more in other units: "1 cup / 240 ml flour"
        rest = re.sub(rf"^\s*/\s*{_ONE}\s*{_UNIT}", "", rest, flags=re.I)
        return _number(match), _unit(unit), rest
    match = _BARE_UNIT.match(text)
    if match:
        return 1.0, _unit(match["unit"]), text[match.end() :]
    match = _TRAILING.match(text)
    # "Onion: Half", "Shrimp 250g"; not "Beef 3 ways with ...", where words go on without a unit
    if match and (match["unit"] or not re.match(r"\s*[^\W\d_]", match["rest"])):
        return _number(match), _unit(match["unit"]), match["name"]
    return None, None, text


def _number(match: re.Match[str]) -> float:
    if match["word"]:
        return float(_COUNT_WORDS[match["word"].lower().split()[0]])
    values = [_float(match[key]) for key in ("low", "high") if match[key]]
    return sum(values) / len(values)


def _float(text: str) -> float:
    total = 0.0
    text = text.replace(",", "" if re.fullmatch(_THOUSANDS, text) else ".")
    for part in text.split():
        top, _, bottom = part.partition("/")
        # "1/0" is a slip of the pen; keep the upper number
        total += float(top) / (float(bottom) or 1.0) if bottom else float(top)
    return total


def _unit(word: str | None) -> str | None:
    return None if word is None else _UNITS[word.lower()]


def _mass(amount: float | None, unit: str | None, asides: list[str], *, each: bool) -> float | None:
    if amount is not None and unit in _GRAMS:
        return amount * _GRAMS[unit]
    for aside in asides:
        value, aside_unit, _ = _take_amount(_APPROXIMATE.sub("", aside.strip()))
        if value is not None and aside_unit in _GRAMS:
            return value * _GRAMS[aside_unit] * (amount if each and amount is not None else 1.0)
    return None


def _words(text: str) -> str:
    """The words of a text, and nothing else."""
    return " ".join(re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)).lower()


def _name(text: str) -> str:
    text = text.strip(" .,;:=-~*\"'")
    text = _END_OF_NAME.split(text, maxsplit=1)[0]
    before = None
    while before != text:
        before = text
        text = _AFTER_NAME.sub("", _BEFORE_NAME.sub("", text)).strip(" .,;:=-~*\"'")
    return text.lower()

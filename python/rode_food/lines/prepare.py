"""A line made plain before it is read: signs, numbers and short forms that the library does not know.

Every rule here is one that the library gets wrong (docs/labelling.md has the measurements); it is run on plain text only.
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass, field

_FRACTION = r"\d{1,2}/\d{1,2}"
_NUMBER = rf"(?:\d+\s+{_FRACTION}|{_FRACTION}|\d+(?:\.\d+)?)"
_METRIC = r"(?:g|gr|grams?|grammes?|kg|kilos?|ml|millilit(?:er|re)s?|mg)\b"
_BULLET = re.compile(r"^(?:\s|[*•·▪▫◦‣⁃●○■□☐☑✓✔➢►–—]|[-+](?!\d)|[-+](?=\d+(?:[./]\d+)?\s)|&bull;)+")
_LISTED = re.compile(r"^\d{1,2}[.)]\s+(?=\d)")  # "3. 2 eggs" is the third line
_SHORT = (
    (r"(?<=\d)\s*c\.?(?=\s+(?!\.))", " cup"),
    (r"(?<=\d)\s*T\.?(?=\s)", " tbsp"),
    (r"(?<=\d)\s*t\.?(?=\s)", " tsp"),
    (r"\bpkgs?\b\.?", "package"),
    (r"\bpkts?\b\.?", "packet"),
    (r"(?<=\d)\s*qts?\b\.?", " quart"),
    (r"(?<=\d)\s*pts?\b\.?", " pint"),
    (r"(?<=\d)\s*gals?\b\.", " gallon"),
    (r"\blg\b\.?|\blrg\b\.?", "large"),
    (r"\bmed\.(?=\s)", "medium"),
    (r"\bsm\.(?=\s)", "small"),
    (r"\b(oz|lbs?|tbsps?|tbs|tsps?|ml|kg)\.(?=[\s),])", r"\1"),
    (r"\b(?:heaping|heaped|level|scant|rounded)\s+(?=(?:tbsps?|tablespoons?|tsps?|teaspoons?|cups?)\b)", ""),
    (r"(?<=\d)\s*fl\.?\s*oz\b\.?", " fl oz"),
)
_SHORT_PATTERNS = tuple((re.compile(pattern), into) for pattern, into in _SHORT)
# "a little oil" is no number of anything, and "scant 1/4 cup" is about that much
_VAGUE = re.compile(
    r"^(?:a\s+(?:little|bit of|few|touch of|generous quantity of)|scant|generous|heaped|heaping|about|"
    r"approx(?:imately|\.)?|around|roughly|~)\s+",
    re.I,
)
_DOZENS = {"": 12, "a": 12, "half a": 6, "a half": 6, "half": 6, "one": 12, "two": 24, "three": 36}
_DOZEN = re.compile(
    rf"\b(?:(?P<word>half an?|a half|half|an?|one|two|three)\s+|(?P<number>{_NUMBER})\s+)dozen\b(?:\s+of\b)?",
    re.I,
)
# "80/20 ground beef": lean and fat, no amount; the two make 100
_RATIO = re.compile(r"(?<![\d/.])(\d{2})\s*/\s*(\d{2})(?![\d/])(?:\s+lean)?")

# Recipe1M lost the slash of fractions: "14 cup" is 1/4 cup
_LOST = {code: f"{code[0]}/{code[1]}" for code in ("12", "13", "23", "14", "34", "18", "38", "58", "78")}
_CODE = "|".join(_LOST)
# a plural tells a number above one; "12 cups" may well be twelve
_ONE_OF = r"(?:cup|teaspoon|tablespoon|pound|quart|pint|tsp)\b"
_SEVERAL_OF = r"(?:cups?|teaspoons?|tablespoons?|pounds?|quarts?|pints?|tsps?|tbsps?|tbs|lbs?)\b"
_LOST_ALONE = re.compile(rf"(?:^|(?<=[(+] )|(?<=[(+]))({_CODE})\s+(?={_ONE_OF})", re.I)
_LOST_AFTER = re.compile(rf"^(\d{{1,2}})\s+({_CODE})\s+(?={_SEVERAL_OF})", re.I)
_DOUBTFUL = re.compile(
    rf"^({_CODE})\s+(?=(?:cups|teaspoons|tablespoons|tsps|tbsps?|tbs|pounds|lbs?)\b)", re.I
)


@dataclass(frozen=True)
class Prepared:
    """A line for the library.

    Attributes:
        text: the plain line.
        qualifier: "80/20" of "80/20 ground beef", which is no amount; else "".
        notes: doubts, in words.
    """

    text: str
    qualifier: str = ""
    notes: tuple[str, ...] = field(default=())


def prepare(line: str) -> Prepared:
    """The line in plain signs, numbers and words."""
    text = tidy(line)
    notes: list[str] = []
    ratio = next((m for m in _RATIO.finditer(text) if int(m[1]) + int(m[2]) == 100), None)
    if ratio:
        text = f"{text[: ratio.start()]} {text[ratio.end() :]}"
    for pattern, into in _SHORT_PATTERNS:
        text = pattern.sub(into, text)
    text = _DOZEN.sub(_dozen, text)
    text = _VAGUE.sub("", _numbers(" ".join(text.split())))
    text = _lost_slash(text, notes)
    text = re.sub(r"\s+(?:amount|usage|quantity)\b(?=\s*[=:])", " ", text, flags=re.I)
    text = re.sub(r"\s*[=:]\s*", " ", text)  # "Salt: 10 g" is "Salt 10 g"
    return Prepared(" ".join(text.split()), f"{ratio[1]}/{ratio[2]}" if ratio else "", tuple(notes))


def tidy(line: str) -> str:
    """The line without the marks of a page: entities, Markdown links and emphasis, bullets, odd white space and slashes."""
    text = html.unescape(line)
    text = re.sub(r"<[a-zA-Z/][^<>]*>", " ", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"([¼-¾⅐-⅞])", r" \1", text)  # 1½ is 1 1/2, not 11/2
    text = unicodedata.normalize("NFKC", text).translate(_PLAIN).replace("**", "").replace("__", "")
    text = _BULLET.sub("", " ".join(text.split()))
    return " ".join(_LISTED.sub("", text).split())


_PLAIN = str.maketrans(
    {
        "⁄": "/",
        "∕": "/",
        "（": "(",
        "）": ")",
        "，": ",",
        "\u00ad": None,
        "\u200b": None,
        "\ufeff": None,
        "×": "x",
    }
)


def _numbers(text: str) -> str:
    text = re.sub(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m[1].replace(",", ""), text)
    text = re.sub(rf"(?<![\d.,/])([1-9]\d{{0,2}}) (\d{{3}})(?=\s*{_METRIC})", r"\1\2", text)  # "1 200 g"
    text = re.sub(r"(?<![\d.,])(\d+),(\d{1,2})(?=\s*[^\W\d_])", r"\1.\2", text)  # "1,5 kg"
    text = re.sub(r"(?<![\d.,])(0),(\d{3})(?=\s*[^\W\d_])", r"\1.\2", text)
    text = re.sub(r"(?<![\d.])\.(\d)", r"0.\1", text)
    text = re.sub(r"(\d/\d{1,2})(?:rds?|ths?|nds?)\b", r"\1", text)
    text = re.sub(rf"(?<![\d/.])(\d+)\s*(?:and|&|\+)\s*({_FRACTION})(?![\d/])", r"\1 \2", text, flags=re.I)
    # "1-1/2" is no range: it would go down
    return re.sub(rf"(?<![\d/.-])([1-9]\d?)\s?[-–]\s?({_FRACTION})(?![\d/])", _mixed, text)


def _mixed(match: re.Match[str]) -> str:
    top, _, bottom = match[2].partition("/")
    return f"{match[1]} {match[2]}" if int(top) < int(bottom) else match[0]


def _dozen(match: re.Match[str]) -> str:
    if match["word"]:
        return str(_DOZENS.get(match["word"].lower().removesuffix("n"), 12))
    return f"{12 * number_of(match['number']):g}"


def number_of(text: str) -> float:
    """ "1 1/2" -> 1.5."""
    total = 0.0
    for part in text.split():
        top, _, bottom = part.partition("/")
        total += float(top) / (float(bottom) or 1.0) if bottom else float(top)
    return total


def _lost_slash(text: str, notes: list[str]) -> str:
    def after(match: re.Match[str]) -> str:
        read = f"{match[1]} {_LOST[match[2]]} "
        notes.append(f"a lost slash: {match[0].strip()!r} read as {read.strip()}")
        return read

    def alone(match: re.Match[str]) -> str:
        notes.append(f"a lost slash: {match[1]!r} read as {_LOST[match[1]]}")
        return f"{_LOST[match[1]]} "

    if "/" in text:  # this line kept its slashes
        return text
    text = _LOST_AFTER.sub(after, text)
    text = _LOST_ALONE.sub(alone, text)
    doubtful = _DOUBTFUL.match(text)
    if doubtful:
        notes.append(f"perhaps a lost slash: {doubtful[1]!r} may be {_LOST[doubtful[1]]}")
    return text

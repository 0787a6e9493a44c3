"""Names of ingredients and categories in the one form in which they are compared.

Forms that mean the same become one: case, composed and decomposed letters, full-width and half-width ones (NFKC), and marks
that only help to pronounce a word. A mark that makes another word of it stays. docs/vocabulary.md has the rules by script.
"""

from __future__ import annotations

import functools
import re
import unicodedata

_MARKS_MEAN_LITTLE = frozenset(("LATIN", "GREEK", "HEBREW"))
"""Scripts, as Unicode's names of letters begin, whose readers leave marks out: crème, μέλι and its capitals ΜΕΛΙ, points."""
_HAMZA = "\u0653\u0654\u0655"
_STRESS = "\u0300\u0301"
_CYRILLIC_VOWELS = "аеиоуыэюяіє"
# marks of vowels that hardly any other language in Latin letters has; its other marks then mean as much: "bơ" is not "bò"
_VIETNAMESE = re.compile("[\u0309\u031b]|[aeiouy]\u0323|[aeiouy][\u0302\u0306][\u0300\u0301\u0303]")
# apostrophes within a word ("baker's", "м'ясо"), Hebrew's quotation marks, the dash that stretches Arabic words; dotless i, whose
# capital is that of i
_SPELLINGS = str.maketrans({**dict.fromkeys("'’‘`ʼʻ׳״\u0640"), "ı": "i"})


@functools.lru_cache(maxsize=1 << 16)  # a million recipes name the same few thousand things
def normalise_name(name: str) -> str:
    """Lower case; digits and punctuation stripped (a hyphen parts words); one space between words; accents folded.

    Plurals and synonyms are not merged: "egg" and "eggs" differ; `rode_food.vocabulary` merges them. It is its own normal form,
    and the same for every Unicode form and case of a name.
    """
    while (again := _pass(name)) != name:  # a few letters fold into such as fold once more
        name = again
    return name


def _pass(name: str) -> str:
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", name).casefold()).translate(_SPELLINGS)
    if text.isascii():
        return " ".join(re.sub(r"[\W\d_]+", " ", text).split())
    all_marks = _VIETNAMESE.search(text) is not None
    kept: list[str] = []
    base = ""  # the letter to which a mark belongs
    for char in text:
        if char.isalnum() and not char.isdecimal():
            base = char
            kept.append(char)
        elif (kind := unicodedata.category(char)) in ("Mn", "Mc"):
            if base and _carries_meaning(base, char, all_marks):
                kept.append(char)
        elif kind != "Cf":  # joiners, soft hyphens and the like are not seen
            base = ""
            kept.append(" ")
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


@functools.lru_cache(maxsize=1 << 12)
def _carries_meaning(base: str, mark: str, all_marks: bool) -> bool:
    """Whether a letter with a mark is another letter than the one without it."""
    if unicodedata.name(mark, "").startswith(("VARIATION SELECTOR", "COMBINING GRAPHEME JOINER")):
        return False
    script = unicodedata.name(base, "").partition(" ")[0]
    if script in _MARKS_MEAN_LITTLE:
        return script == "LATIN" and all_marks
    if script == "CYRILLIC":  # the stress, and ё; but й, ї, ў, ќ are letters
        return not ((mark in _STRESS and base in _CYRILLIC_VOWELS) or base + mark == "е\u0308")
    return script != "ARABIC" or mark in _HAMZA  # short vowels, which are seldom written


@functools.lru_cache(maxsize=1 << 16)
def ingredient_key(name: str) -> str:
    """`normalise_name` with words joined by `_`, "&" and "'n" read as "and": "2% Milk & Honey" is `milk_and_honey`.

    It is its own key: `ingredient_key(ingredient_key(name)) == ingredient_key(name)`. Empty where no letter is left.
    """
    name = re.sub(r"&|(?<!\w)['’]n['’]?(?!\w)", " and ", name)
    return normalise_name(name).replace(" ", "_")

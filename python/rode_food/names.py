"""Names of ingredients and categories in the one form in which they are compared."""

from __future__ import annotations

import functools
import re
import unicodedata


def normalise_name(name: str) -> str:
    """Lower case; digits and punctuation stripped (a hyphen parts words); one space between words.

    Plurals and synonyms are not merged: "egg" and "eggs" differ; `rode_food.vocabulary` merges them.
    """
    name = unicodedata.normalize("NFKC", name).casefold()
    name = re.sub(r"['’`]", "", name)  # "baker's" is one word
    return " ".join(re.sub(r"[\W\d_]+", " ", name).split())


@functools.lru_cache(maxsize=1 << 16)  # a million recipes name the same few thousand things
def ingredient_key(name: str) -> str:
    """`normalise_name` with words joined by `_`, "&" and "'n" read as "and": "2% Milk & Honey" is `milk_and_honey`.

    It is its own key: `ingredient_key(ingredient_key(name)) == ingredient_key(name)`. Empty where no letter is left.
    """
    name = re.sub(r"&|(?<!\w)['’]n['’]?(?!\w)", " and ", name)
    key = normalise_name(name)
    while (again := normalise_name(key)) != key:  # a few letters fold into such as fold once more
        key = again
    return key.replace(" ", "_")

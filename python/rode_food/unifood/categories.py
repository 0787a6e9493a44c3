"""Categories from titles: what the dish is called by its last words.

Recipe1M has no classes. Its authors made them from the most frequent word pairs of the training titles (Marin et
al., "Recipe1M+", section 3.3), anywhere in a title. Here a pair, or a single word where no pair is frequent, counts
where the dish is named: at the end of the title's main phrase. "Apple pie ice cream with nuts" is an ice cream.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rode_food.atomic import write_json

# what follows says how the dish is served or made, not what it is
_END = re.compile(
    r"[,:;(\[{!?/|]|\s[-–—]\s|\b(?:with|in|on|for|from|by|over|under|without|w|topped|served|stuffed|a\s+la|or|aka|to|that|recipe)\b",
    re.I,
)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
# words that end a title and name no dish
_NO_DISH_WORDS = (
    "recipe recipes style version dish dishes meal meals dinner lunch breakfast snack snacks i ii iii iv v vi copycat "
    "clone easy best delight surprise supreme deluxe special"
)
_NO_DISH = frozenset(_NO_DISH_WORDS.split())


def _stem(word: str) -> str:
    """The stem that singular and plural have in common: cookies and cookie, potatoes and potato, berries and berry."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if len(word) > 3 and word.endswith("e"):
        word = word[:-1]
    return word[:-1] + "i" if len(word) > 3 and word.endswith("y") else word


def head(title: str) -> list[str]:
    """The last two words, or the last one, of the title's main phrase, in lower case: ["chocolate", "cookies"].

    Two words with "and" between them stand as one: "macaroni and cheese" is named by both.
    """
    phrase = title.lower()
    # a title may begin with such a word: "In-N-Out burger"
    ends = (match.start() for match in _END.finditer(phrase) if _WORD.search(phrase, 0, match.start()))
    words = _WORD.findall(phrase[: next(ends, len(phrase))])
    while words and words[-1] in _NO_DISH:
        words.pop()
    return words[-3:] if words[-2:-1] == ["and"] and len(words) > 2 else words[-2:]


def _terms(words: list[str]) -> list[tuple[str, str]]:
    """(term with its last word's stem, term as it stands): all the words, then the last one."""
    return [
        (" ".join([*some[:-1], _stem(some[-1])]), " ".join(some))
        for some in (words, words[-1:] if len(words) > 1 else [])
        if some
    ]


@dataclass(frozen=True)
class Categories:
    """Terms that stand for categories, and the category's name for each.

    Attributes:
        names: term -> name, the form in which most titles have it; the most frequent category first.
    """

    names: dict[str, str]

    @classmethod
    def fit(cls, titles: Iterable[str], size: int, min_count: int) -> Categories:
        """The `size` most frequent terms of training titles.

        A title counts for its pair where the pair is frequent enough, else for its last word. Every title is seen
        once; what is kept grows with the number of distinct terms.

        Args:
            titles: of the training split only.
            size: categories at most.
            min_count: titles that a category must have.
        """
        pairs: Counter[str] = Counter()
        singles: Counter[str] = Counter()
        by_pair: Counter[tuple[str, str]] = Counter()  # (pair, its last word)
        forms: Counter[tuple[str, str]] = Counter()
        for title in titles:
            found = _terms(head(title))
            forms.update(found)
            if len(found) == 2:
                pairs[found[0][0]] += 1
                by_pair[found[0][0], found[1][0]] += 1
            if found:
                singles[found[-1][0]] += 1
        frequent = {term: count for term, count in pairs.items() if count >= min_count}
        for (pair, last), count in by_pair.items():
            if pair in frequent:
                singles[last] -= count
        counts = Counter(frequent)
        counts.update({term: count for term, count in singles.items() if count >= min_count})
        order = sorted(counts, key=lambda term: (-counts[term], term))[:size]
        kept = set(order)
        best: dict[str, tuple[int, str]] = {}
        for (term, form), count in forms.items():
            if term in kept:
                best[term] = min(best.get(term, (1, "")), (-count, form))
        return cls({term: best[term][1] for term in order})

    def of(self, title: str | None) -> str | None:
        """The category of a title; None where it has none of the terms."""
        for term, _ in _terms(head(title or "")):
            if term in self.names:
                return self.names[term]
        return None

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, {"names": self.names})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Categories:
        return cls(json.loads(Path(path).read_text(encoding="utf-8"))["names"])

"""Tokens of texts in any language: the tokenizer that suits the references, for BLEU and for ROUGE-L alike.

`auto` looks at the letters of a data set's references. Texts in Latin letters keep sacrebleu's 13a and rouge_score's own tokens.
"""

from __future__ import annotations

import functools
import importlib
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

logger = logging.getLogger(__name__)

TokenizerName = Literal["auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores200"]
"""`auto`, and sacrebleu's names."""
TOKENIZERS: tuple[TokenizerName, ...] = get_args(TokenizerName)
ROUGE_SCORE = "rouge_score"
"""The tokens of rouge_score itself: runs of a to z and 0 to 9."""

_SUITS = {
    "han": ("zh",),
    "kana": ("ja-mecab", "char"),
    "hangul": ("ko-mecab", "intl"),
    "unspaced": ("char",),
    "other": ("intl",),
}
"""Script -> tokenizers, the best first; a later one is taken where the one before is not installed."""
_INSTALL = {
    "ja-mecab": "pip install 'sacrebleu[ja]'",
    "ko-mecab": "pip install 'sacrebleu[ko]'",
    "flores200": "pip install sentencepiece, and let sacrebleu download its model once",
}
_SCRIPTS = {
    **dict.fromkeys(("LATIN", "FULLWIDTH"), "latin"),
    **dict.fromkeys(("CJK", "IDEOGRAPHIC", "BOPOMOFO"), "han"),
    **dict.fromkeys(("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HALFWIDTH"), "kana"),
    "HANGUL": "hangul",
    **dict.fromkeys(("THAI", "LAO", "KHMER", "MYANMAR"), "unspaced"),
}
"""First word of a letter's name in Unicode -> script; `other` has spaces between words."""
_FOREIGN = 0.05  # share of references in another script than Latin up to which a data set counts as one in Latin letters
_KANA = 0.1  # share of kana among Chinese characters and kana that makes a text Japanese
_ACCENTED = 0.01  # share of letters outside of a to z, in half of the references, that English does not have


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizers of a data set.

    Attributes:
        bleu: sacrebleu's name of it.
        rouge: the same, or `ROUGE_SCORE`.
    """

    bleu: str
    rouge: str


def package(name: str, metric: str) -> ModuleType:
    """A package of `rode[metrics]`. Raises ImportError that names the pip command."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{metric} needs the package {name.split('.')[0]}: pip install 'rode[metrics]'"
        ) from error


def choose_tokenizer(references: Iterable[str], name: str = "auto") -> Tokenizer:
    """The tokenizer of one data set.

    Args:
        references: its true texts; answers have no say.
        name: one of `TOKENIZERS`; "auto" goes by the references' scripts.

    Raises:
        ValueError: for another name.
        ImportError: a tokenizer that was asked for by name needs a package, or a model, that is not there.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer: expected one of {', '.join(TOKENIZERS)}, got {name!r}")
    texts = list(references)
    latin = Tokenizer("13a", "13a" if _accented(texts) else ROUGE_SCORE)
    scripts = Counter(script for script in map(main_script, texts) if script is not None)
    foreign = scripts.total() - scripts["latin"]
    in_latin = foreign <= _FOREIGN * scripts.total()
    if name == "13a":
        return latin if in_latin else Tokenizer("13a", "13a")
    if name != "auto":
        sacrebleu_metric(name)
        return Tokenizer(name, name)
    if in_latin:
        return latin
    del scripts["latin"]
    found = _installed(*_SUITS[scripts.most_common(1)[0][0]])
    return Tokenizer(found, found)


def _installed(name: str, *others: str) -> str:
    try:
        sacrebleu_metric(name)
    except ImportError as error:
        if not others or f"tokenizer {name}" not in str(error):
            raise
        _say_once(f"{error}; {others[0]} is taken instead")
        return _installed(*others)
    return name


@functools.cache
def _say_once(text: str) -> None:
    logger.warning("%s", text)


def sacrebleu_metric(tokenizer: str) -> Any:
    """sacrebleu's BLEU object. Raises ImportError, in one sentence that says what to install."""
    bleu = package("sacrebleu", "SacreBLEU").BLEU
    if tokenizer not in _INSTALL:
        return bleu(tokenize=tokenizer)
    try:
        return bleu(tokenize=tokenizer)
    # RuntimeError without MeCab, AssertionError with another dictionary, URLError or SystemExit for a download
    except (Exception, SystemExit) as error:
        if isinstance(error, ImportError | RuntimeError):
            raise ImportError(f"tokenizer {tokenizer} is not installed: {_INSTALL[tokenizer]}") from error
        why = " ".join(str(error).split())
        raise ImportError(
            f"tokenizer {tokenizer} does not work here ({why}): {_INSTALL[tokenizer]}"
        ) from error


class RougeTokens:
    """A tokenizer for rouge_score: the words within another tokenizer's tokens, in lower case.

    Punctuation is dropped, as rouge_score does; English text gives the same tokens as there.
    """

    def __init__(self, split: Callable[[str], str]) -> None:
        self._split = split

    def tokenize(self, text: str) -> list[str]:
        return [word for token in self._split(text).lower().split() for word in _words(token)]


def rouge_tokenizer(name: str) -> Any:
    """An object with `tokenize(text)`, by its name in `Tokenizer.rouge`."""
    if name == ROUGE_SCORE:
        return package("rouge_score.tokenizers", "ROUGE-L").DefaultTokenizer()
    return RougeTokens(sacrebleu_metric(name).tokenizer)


def _words(token: str) -> list[str]:
    """Runs of letters with their marks, and digits."""
    return "".join(map(_word_part, token)).split()


@functools.lru_cache(maxsize=1 << 14)
def _word_part(char: str) -> str:
    kind = unicodedata.category(char)
    if char.isalnum() or kind.startswith("M"):
        return char
    return "" if kind == "Cf" else " "  # joiners stand within words


@functools.lru_cache(maxsize=1 << 14)
def _script(char: str) -> str:
    return _SCRIPTS.get(unicodedata.name(char, "").partition(" ")[0], "other")


def main_script(text: str) -> str | None:
    """The script of most letters: latin, han, kana (Japanese, Chinese characters included), hangul, unspaced (Thai, Lao, Khmer,
    Burmese), other; None without a letter."""
    if text.isascii():
        return "latin" if any(map(str.isalpha, text)) else None
    scripts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if char.isalpha():
            scripts[_script(char)] += count
    chinese = scripts["han"] + scripts["kana"]
    if scripts["kana"] > _KANA * chinese:
        scripts["kana"], scripts["han"] = chinese, 0
    return scripts.most_common(1)[0][0] if scripts.total() else None


def _accented(texts: Sequence[str]) -> bool:
    """Whether texts in Latin letters are of a language that has others than a to z: rouge_score would cut words there."""
    letters = Counter(char for text in texts if not text.isascii() for char in text if char.isalpha())
    beyond = sum(count for char, count in letters.items() if not char.isascii())
    within = sum(count for char, count in letters.items() if char.isascii())
    within += sum(sum(map(str.isalpha, text)) for text in texts if text.isascii())
    marked = sum(any(char.isalpha() and not char.isascii() for char in text) for text in texts)
    return beyond > _ACCENTED * (beyond + within) and 2 * marked >= len(texts)

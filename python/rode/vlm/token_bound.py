"""How many tokens a text can have at most, from its size alone."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

_EXPANSION = {None: 1, "NFC": 3, "NFD": 3, "Lowercase": 2, "Strip": 1, "Prepend": 1, "ByteLevel": 1, "Nmt": 1}
"""By how much a normalizer can lengthen a text in UTF-8 (Unicode Standard Annex 15, "Maximum expansion factors"; "İ" in lower
case has three bytes instead of two). "Prepend" adds one character in all."""
_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def tokens_per_byte(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens that a byte of text, in UTF-8, can become; None where that is not known.

    Each of the tokenizers' models gives one token for at least one byte of the normalized text. A token or two that are put
    before or after the text are not counted.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ not in _MODELS:
        return None
    state = None if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())
    return _expansion(state, tokenizer)


def _expansion(normalizer: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> int | None:
    kind = None if normalizer is None else normalizer["type"]
    if kind in _EXPANSION:
        return _EXPANSION[kind]
    assert normalizer is not None, "no normalizer is in the table"
    if kind == "Sequence":
        product = 1
        for part in normalizer["normalizers"]:
            factor = _expansion(part, tokenizer)
            if factor is None:
                return None
            product *= factor
        return product
    if kind == "Replace":  # Llama writes a space as a sign of its vocabulary
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        if pattern and (len(content) <= len(pattern) and content in tokenizer.get_vocab()):
            return 1
        if pattern and len(content.encode()) <= len(pattern.encode()):
            return 1
    return None

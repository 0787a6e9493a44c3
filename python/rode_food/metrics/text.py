"""Recipe generation: SacreBLEU and ROUGE-L, by their own packages so that the numbers compare with others'."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType


def _package(name: str, metric: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{metric} needs the package {name.split('.')[0]}: pip install 'rode[metrics]'"
        ) from error


def _one_line(texts: Sequence[str]) -> list[str]:
    # steps stand on lines of their own; both metrics take a text for one sentence
    return [" ".join(text.split()) for text in texts]


def _check(predicted: Sequence[str], true: Sequence[str]) -> None:
    if len(predicted) != len(true) or not true:
        raise ValueError(
            f"predicted and true: expected equal lengths > 0, got {len(predicted)} and {len(true)}"
        )


def sacrebleu(predicted: Sequence[str], true: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU with sacrebleu's defaults (13a tokens, exp smoothing, case kept), one reference each.

    Returns:
        The score in percent and the signature to print beside it.

    Raises:
        ImportError: without the package; names the pip command.
    """
    _check(predicted, true)
    metric = _package("sacrebleu", "SacreBLEU").BLEU()
    result = metric.corpus_score(_one_line(predicted), [_one_line(true)])
    return float(result.score), str(metric.get_signature())


def rouge_l(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Mean ROUGE-L F measure in percent: Google's `rouge_score`, no stemmer.

    Raises:
        ImportError: without the package; names the pip command.
    """
    _check(predicted, true)
    scorer = _package("rouge_score.rouge_scorer", "ROUGE-L").RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(_one_line(predicted), _one_line(true), strict=True)
    total: float = sum(scorer.score(truth, text)["rougeL"].fmeasure for text, truth in pairs)
    return 100 * total / len(true)


def bleu_counts(predicted: str, true: str) -> tuple[float, ...]:
    """What one text adds to corpus BLEU: its length, the reference's, then n-grams found and n-grams in all, n = 1 to 4.

    Raises:
        ImportError: without the package; names the pip command.
    """
    found = (
        _package("sacrebleu", "SacreBLEU").BLEU().corpus_score(_one_line([predicted]), [_one_line([true])])
    )
    return (found.sys_len, found.ref_len, *found.counts, *found.totals)


def bleu_of_counts(counts: Sequence[float]) -> float:
    """Corpus BLEU in percent from the sums of `bleu_counts`."""
    found, total = [int(n) for n in counts[2:6]], [int(n) for n in counts[6:10]]
    compute = _package("sacrebleu", "SacreBLEU").BLEU.compute_bleu
    result = compute(found, total, sys_len=int(counts[0]), ref_len=int(counts[1]), smooth_method="exp")
    return float(result.score)

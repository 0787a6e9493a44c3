"""Recipe generation: SacreBLEU and ROUGE-L, by their own packages so that the numbers compare with others'."""

from __future__ import annotations

from collections.abc import Sequence

from rode_food.metrics.tokens import (
    Tokenizer,
    choose_tokenizer,
    package,
    rouge_tokenizer,
    sacrebleu_metric,
)


def _one_line(texts: Sequence[str]) -> list[str]:
    # steps stand on lines of their own; both metrics take a text for one sentence
    return [" ".join(text.split()) for text in texts]


def _check(predicted: Sequence[str], true: Sequence[str]) -> None:
    if len(predicted) != len(true) or not true:
        raise ValueError(
            f"predicted and true: expected equal lengths > 0, got {len(predicted)} and {len(true)}"
        )


def _chosen(true: Sequence[str], tokenizer: str | Tokenizer) -> Tokenizer:
    return tokenizer if isinstance(tokenizer, Tokenizer) else choose_tokenizer(true, tokenizer)


def sacrebleu(
    predicted: Sequence[str], true: Sequence[str], tokenizer: str | Tokenizer = "auto"
) -> tuple[float, str]:
    """Corpus BLEU with sacrebleu's defaults (exp smoothing, case kept), one reference each.

    Args:
        predicted, true: texts in the same order.
        tokenizer: one of `rode_food.metrics.tokens.TOKENIZERS`, or a choice already made. "auto" is 13a for Latin letters.

    Returns:
        The score in percent and the signature to print beside it, which names the tokenizer.

    Raises:
        ImportError: without the package; names the pip command.
    """
    _check(predicted, true)
    metric = sacrebleu_metric(_chosen(true, tokenizer).bleu)
    result = metric.corpus_score(_one_line(predicted), [_one_line(true)])
    return float(result.score), str(metric.get_signature())


def rouge_l(predicted: Sequence[str], true: Sequence[str], tokenizer: str | Tokenizer = "auto") -> float:
    """Mean ROUGE-L F measure in percent: Google's `rouge_score`, no stemmer.

    Args:
        predicted, true: texts in the same order.
        tokenizer: as `sacrebleu`'s. "auto" keeps rouge_score's own tokens for English, which know no other letters than a to z.

    Raises:
        ImportError: without the package; names the pip command.
    """
    _check(predicted, true)
    tokens = rouge_tokenizer(_chosen(true, tokenizer).rouge)
    scorer = package("rouge_score.rouge_scorer", "ROUGE-L").RougeScorer(["rougeL"], tokenizer=tokens)
    pairs = zip(_one_line(predicted), _one_line(true), strict=True)
    total: float = sum(scorer.score(truth, text)["rougeL"].fmeasure for text, truth in pairs)
    return 100 * total / len(true)


def without_tokens(
    predicted: Sequence[str], true: Sequence[str], tokenizer: str | Tokenizer = "auto"
) -> tuple[int, int]:
    """(answers, references) that are not blank but in which ROUGE-L's tokenizer sees no token: they score 0.

    BLEU's tokenizers see one in every text that is not blank.
    """
    tokenize = rouge_tokenizer(_chosen(true, tokenizer).rouge).tokenize
    answers, references = (
        sum(bool(text) and not tokenize(text) for text in _one_line(texts)) for texts in (predicted, true)
    )
    return answers, references


def bleu_counts(predicted: str, true: str) -> tuple[float, ...]:
    """What one text adds to corpus BLEU: its length, the reference's, then n-grams found and n-grams in all, n = 1 to 4.

    Raises:
        ImportError: without the package; names the pip command.
    """
    found = sacrebleu_metric("13a").corpus_score(_one_line([predicted]), [_one_line([true])])
    return (found.sys_len, found.ref_len, *found.counts, *found.totals)


def bleu_of_counts(counts: Sequence[float]) -> float:
    """Corpus BLEU in percent from the sums of `bleu_counts`."""
    found, total = [int(n) for n in counts[2:6]], [int(n) for n in counts[6:10]]
    compute = package("sacrebleu", "SacreBLEU").BLEU.compute_bleu
    result = compute(found, total, sys_len=int(counts[0]), ref_len=int(counts[1]), smooth_method="exp")
    return float(result.score)

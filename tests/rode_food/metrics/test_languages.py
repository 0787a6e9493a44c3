"""Recipes and answers in other scripts than Latin: tokens that fit them, and English exactly as before."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from rode_food.metrics import rouge_l, sacrebleu, score
from rode_food.metrics.tokens import (
    TOKENIZERS,
    RougeTokens,
    Tokenizer,
    _say_once,
    choose_tokenizer,
    main_script,
    rouge_tokenizer,
    sacrebleu_metric,
)

ENGLISH = ["boil the rice in a lot of salted water. serve hot", "fry the egg and put it on top of the rice"]
CHINESE = "把鸡蛋打散。\n热锅放油，倒入蛋液。\n加盐和葱花，炒匀出锅。"
JAPANESE = "卵を溶きます。\nフライパンに油を熱し、卵を流し入れます。"
THAI = "ตอกไข่ใส่ชาม\nใส่น้ำปลาแล้วตีให้เข้ากัน\nทอดจนเหลือง"
KOREAN = "달걀을 잘 풀어 주세요.\n팬에 기름을 두르고 달걀을 부어 익힙니다."
RUSSIAN = "Взбейте яйца.\nЖарьте их на масле, пока не станут золотистыми."
HINDI = "दाल को धो लें।\nपानी में नमक और हल्दी डालकर उबालें।"
ARABIC = "اخفق البيض جيدا.\nسخن الزيت في المقلاة، ثم أضف البيض."
VIETNAMESE = "Đập trứng vào bát.\nCho dầu vào chảo, rồi đổ trứng vào và chiên vàng."


def row(source: str, task: str, answer: str, truth: str) -> dict:
    reference = truth.split("\n") if task == "recipe" else truth
    return {
        "id": "x", "source": source, "task": task, "answer": answer, "truth": truth, "reference": reference
    }  # fmt: skip


@pytest.fixture
def without_mecab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ko_mecab.MeCab", None)
    _say_once.cache_clear()


def bleu_of(answers: list[list[str]], truths: list[list[str]]) -> float:
    """Papineni et al. 2002, one reference, no smoothing."""
    logs = 0.0
    for n in range(1, 5):
        hits = total = 0
        for answer, truth in zip(answers, truths, strict=True):
            left = Counter(tuple(answer[i : i + n]) for i in range(len(answer) - n + 1))
            right = Counter(tuple(truth[i : i + n]) for i in range(len(truth) - n + 1))
            hits += sum((left & right).values())
            total += sum(left.values())
        logs += math.log(hits / total) / 4
    c, r = sum(map(len, answers)), sum(map(len, truths))
    return 100 * math.exp(logs) * (1 if c > r else math.exp(1 - r / c))


# --- the cases


def test_a_perfect_chinese_recipe_is_perfect() -> None:
    found = score([row("s", "recipe", CHINESE, CHINESE)])["all"]
    assert found["sacrebleu"] == pytest.approx(100)
    assert found["rouge_l"] == pytest.approx(100)
    assert "|tok:zh|" in str(found["sacrebleu_signature"])
    assert found["rouge_l_tokenizer"] == "zh"


def test_half_a_chinese_recipe_by_hand() -> None:
    half = "把鸡蛋打散。\n热锅放油，"
    found = score([row("s", "recipe", CHINESE, CHINESE), row("s", "recipe", half, CHINESE)])["s"]
    characters = ["".join(text.split()) for text in (CHINESE, half)]
    expected = bleu_of([list(characters[0]), list(characters[1])], [list(characters[0])] * 2)
    assert found["sacrebleu"] == pytest.approx(expected)
    assert 40 < expected < 90
    # 9 of 22 characters, without punctuation: F is 18/31
    assert found["rouge_l"] == pytest.approx(100 * (1 + 18 / 31) / 2)
    assert "rouge_l_without_tokens" not in found


@pytest.mark.parametrize(
    ("text", "bleu", "rouge"),
    [
        (ENGLISH[0], "13a", "rouge_score"),
        (CHINESE, "zh", "zh"),
        (JAPANESE, "char", "char"),
        (THAI, "char", "char"),
        (KOREAN, "intl", "intl"),
        (RUSSIAN, "intl", "intl"),
        (HINDI, "intl", "intl"),
        (ARABIC, "intl", "intl"),
        (VIETNAMESE, "13a", "13a"),
    ],
)
def test_each_language_has_a_tokenizer(text: str, bleu: str, rouge: str, without_mecab: None) -> None:
    assert choose_tokenizer([text]) == Tokenizer(bleu, rouge)
    value, signature = sacrebleu([text], [text])
    assert value == pytest.approx(100)
    assert f"|tok:{bleu}|" in signature
    assert rouge_l([text], [text]) == pytest.approx(100)
    # another recipe scores less, by words or characters that the two share
    half = text[: len(text) // 2]
    assert 0 < rouge_l([half], [text]) < 100
    assert 0 < sacrebleu([half], [text])[0] < 100


def test_words_keep_their_marks() -> None:
    assert rouge_tokenizer("intl").tokenize("दाल, दिल!") == ["दाल", "दिल"]
    assert rouge_l(["दिल"], ["दाल"]) == 0
    assert rouge_tokenizer("13a").tokenize("Đập trứng vào bát.") == ["đập", "trứng", "vào", "bát"]
    assert rouge_tokenizer("zh").tokenize("加2勺Salt，炒匀。") == ["加", "2", "勺", "salt", "炒", "匀"]
    assert rouge_tokenizer("char").tokenize("กุ้ง 5") == ["ก", "ุ", "้", "ง", "5"]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Boil 2 eggs", "latin"),
        ("crème brûlée", "latin"),
        ("鸡蛋 2", "han"),
        ("卵を割る", "kana"),
        ("鶏肉300g、玉ねぎ", "kana"),
        ("ｶﾚｰ", "kana"),
        ("볶음밥", "hangul"),
        ("ข้าวผัด", "unspaced"),
        ("ເຂົ້າ", "unspaced"),
        ("гречка", "other"),
        ("add 2 tbsp of 豆瓣酱 and fry", "latin"),
        ("", None),
        ("12 - ½", None),
    ],
)
def test_scripts(text: str, script: str | None) -> None:
    assert main_script(text) == script


# --- English


plain = st.text(
    st.sampled_from("abcdefghijk ABC 0123456789 .,;:!?'()/-_%$[]{}\"+*="), min_size=1, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=4))
def test_english_is_as_before(pairs: list[tuple[str, str]]) -> None:
    answers, truths = ([" ".join(text.split()) for text in texts] for texts in zip(*pairs, strict=True))
    metric = BLEU()
    before = metric.corpus_score(answers, [truths]).score
    assert sacrebleu(answers, truths) == (before, str(metric.get_signature()))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = [
        scorer.score(truth, text)["rougeL"].fmeasure for text, truth in zip(answers, truths, strict=True)
    ]
    assert rouge_l(answers, truths) == 100 * sum(scores) / len(scores)
    # and where English stands among other languages, its tokens are the same
    default = rouge_tokenizer("rouge_score")
    for name in ("13a", "intl", "zh"):
        tokens = RougeTokens(sacrebleu_metric(name).tokenizer)
        assert all(tokens.tokenize(text) == default.tokenize(text) for text in (*answers, *truths))


def test_foreign_words_in_english_change_nothing() -> None:
    texts = [
        *ENGLISH * 20,
        "add the crème fraîche, ½ cup of jalapeño and serve at 350 °F",
        "stir in 豆瓣酱",
        "麻婆豆腐",
    ]
    assert choose_tokenizer(texts) == Tokenizer("13a", "rouge_score")
    assert choose_tokenizer([]) == choose_tokenizer(["", "12"]) == Tokenizer("13a", "rouge_score")


# --- several sources in one file


def test_each_source_has_its_own(tmp_path: Path) -> None:
    from rode.evaluation.evaluate import format_scores, rescore

    english = [row("en", "recipe", text, text[:-4]) for text in ENGLISH]
    rows = [*english, row("zh", "recipe", CHINESE, CHINESE), row("zh", "question", "鸡蛋", "鸡蛋")]
    scores = score(rows)
    alone = score(english)["en"]
    assert scores["en"] == alone
    assert scores["zh"]["sacrebleu"] == pytest.approx(100)
    assert scores["zh"]["question_rouge_l"] == 100
    assert scores["zh"]["question_rouge_l_tokenizer"] == "zh"
    assert scores["all"]["rouge_l_tokenizer"] == "zh"
    assert scores["all"]["rouge_l"] == pytest.approx((2 * float(alone["rouge_l"] or 0) + 100) / 3)
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    written = rescore(file)
    assert json.loads((tmp_path / "metrics.json").read_text()) == written == scores
    lines = format_scores(scores).splitlines()
    assert "rouge_l_tokenizer: all zh, en rouge_score, zh zh" in lines
    assert "question_rouge_l_tokenizer: zh" in lines
    assert "tok:char" in str(rescore(file, tokenizer="char")["en"]["sacrebleu_signature"])


def test_the_command_takes_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rode.cli import main

    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(row("s", "recipe", CHINESE, CHINESE)), encoding="utf-8")
    assert main(["evaluate", "--predictions", str(file)]) == 0
    said = capsys.readouterr().out
    assert "tok:zh" in said
    assert "100.00" in said
    assert main(["evaluate", "--predictions", str(file), "--tokenizer", "char"]) == 0
    assert "tok:char" in capsys.readouterr().out
    # by name, sacrebleu's 13a sees three words there, too few for BLEU
    assert main(["evaluate", "--predictions", str(file), "--tokenizer", "13a"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["s"]["sacrebleu"] == 0


# --- what is missing


def test_a_missing_tokenizer_is_missed_before_the_model_is_loaded(
    tmp_path: Path, without_mecab: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rode.cli import main

    turn = {"question": "何ですか", "answer": "卵です"}
    record = {"id": "a", "source": "s", "split": "test", "conversation": [turn]}
    (tmp_path / "r.jsonl").write_text(json.dumps(record), encoding="utf-8")
    loaded: list[object] = []
    monkeypatch.setattr("rode.commands.evaluate.load", lambda *_: loaded.append(1))
    command = ["evaluate", "--model", str(tmp_path), "--data", str(tmp_path / "r.jsonl")]
    assert main([*command, "--tokenizer", "ja-mecab"]) == 1
    assert (
        capsys.readouterr().err == "rode: tokenizer ja-mecab is not installed: pip install 'sacrebleu[ja]'\n"
    )
    assert not loaded


def test_no_token_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [row("s", "recipe", CHINESE, ENGLISH[0]), row("s", "recipe", "", ENGLISH[1])]
    with caplog.at_level(logging.WARNING):
        found = score(rows)["s"]
    # an empty answer is no fault of the tokenizer
    assert (found["rouge_l"], found["rouge_l_without_tokens"]) == (0, 1)
    assert (
        "rouge_l of source 's': the tokenizer rouge_score sees no token in 1 of 2 answers and in 0 of their references"
        in caplog.text
    )


def test_japanese_without_mecab(without_mecab: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_tokenizer([JAPANESE]) == choose_tokenizer([JAPANESE]) == Tokenizer("char", "char")
    said = "tokenizer ja-mecab is not installed: pip install 'sacrebleu[ja]'"
    assert [r.getMessage() for r in caplog.records] == [f"{said}; char is taken instead"]
    with pytest.raises(ImportError) as error:
        choose_tokenizer([JAPANESE], "ja-mecab")
    assert str(error.value) == said
    with pytest.raises(ImportError, match=r"ko-mecab is not installed: pip install 'sacrebleu\[ko\]'"):
        score([row("s", "recipe", KOREAN, KOREAN)], tokenizer="ko-mecab")


def test_japanese_with_mecab(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tagger:
        def __call__(self, line: str) -> str:
            return line.replace("を", " を ")

        def signature(self) -> str:
            return "ja-mecab-0.0-IPA"

    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.TokenizerJaMecab", Tagger)
    assert choose_tokenizer([JAPANESE]) == Tokenizer("ja-mecab", "ja-mecab")
    assert "|tok:ja-mecab-0.0-IPA|" in sacrebleu([JAPANESE], [JAPANESE])[1]
    assert rouge_tokenizer("ja-mecab").tokenize("卵を割る。") == ["卵", "を", "割る"]


def test_flores_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ImportError, match="flores200 is not installed: pip install sentencepiece, and let sacrebleu download"
    ):
        sacrebleu([THAI], [THAI], "flores200")


def test_flores_without_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network() -> object:
        raise OSError("<urlopen error [Errno 101] Network is unreachable>")

    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.Flores200Tokenizer", no_network)
    with pytest.raises(
        ImportError, match=r"flores200 does not work here \(<urlopen error .*\): pip install sent"
    ):
        choose_tokenizer([THAI], "flores200")


def test_an_unknown_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"expected one of auto, 13a, intl, zh, .*, got 'moses'"):
        score([row("s", "recipe", "a", "a")], tokenizer="moses")
    assert TOKENIZERS[0] == "auto"

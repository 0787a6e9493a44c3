"""Chinese and Japanese ingredient lines: "猪肉 500克", "鸡蛋 2个", "醤油 大さじ2"; the library reads English alone."""

from __future__ import annotations

import re
import unicodedata

_LETTERS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# (unit, factor); None for a thing that is counted
_UNITS: dict[str, tuple[str | None, float]] = {
    **dict.fromkeys(("克", "公克", "g", "グラム", "ｇ"), ("g", 1.0)),
    **dict.fromkeys(("千克", "公斤", "kg", "キロ", "キログラム"), ("kg", 1.0)),
    **dict.fromkeys(("毫克", "mg"), ("mg", 1.0)),
    "市斤": ("g", 500.0),
    "斤": ("g", 500.0),
    "两": ("g", 50.0),
    **dict.fromkeys(("毫升", "ml", "cc", "ミリリットル"), ("ml", 1.0)),
    **dict.fromkeys(("升", "公升", "l", "リットル"), ("l", 1.0)),
    **dict.fromkeys(("汤匙", "湯匙", "大匙", "大勺", "汤勺", "大さじ", "大サジ", "tbsp"), ("tbsp", 1.0)),
    **dict.fromkeys(("茶匙", "小匙", "小勺", "茶勺", "小さじ", "小サジ", "tsp"), ("tsp", 1.0)),
    **dict.fromkeys(("杯", "カップ", "cup"), ("cup", 1.0)),
    **dict.fromkeys(
        (
            "个",
            "個",
            "只",
            "隻",
            "颗",
            "顆",
            "粒",
            "枚",
            "条",
            "條",
            "匹",
            "尾",
            "本",
            "玉",
            "株",
            "丁",
            "コ",
            "ケ",
        ),
        (None, 1.0),
    ),
    **dict.fromkeys(("片", "切れ", "切"), ("slice", 1.0)),
    **dict.fromkeys(("瓣", "かけ", "片け"), ("clove", 1.0)),
    **dict.fromkeys(("根",), ("stalk", 1.0)),
    **dict.fromkeys(("块", "塊"), ("piece", 1.0)),
    **dict.fromkeys(("把", "束", "撮"), ("bunch", 1.0)),
    **dict.fromkeys(("袋", "包", "パック"), ("pack", 1.0)),
    **dict.fromkeys(("罐", "缶"), ("can", 1.0)),
    **dict.fromkeys(("瓶",), ("bottle", 1.0)),
    **dict.fromkeys(("盒", "箱"), ("box", 1.0)),
    **dict.fromkeys(("勺", "匙"), ("spoon", 1.0)),
    **dict.fromkeys(("滴",), ("drop", 1.0)),
    **dict.fromkeys(("つまみ",), ("pinch", 1.0)),
}
_DIGITS = {
    "半": 0.5,
    "一": 1.0,
    "二": 2.0,
    "两": 2.0,
    "兩": 2.0,
    "三": 3.0,
    "四": 4.0,
    "五": 5.0,
    "六": 6.0,
    "七": 7.0,
    "八": 8.0,
    "九": 9.0,
    "十": 10.0,
}
_VAGUE = r"(?:适量|適量|少许|少許|少々|若干|适当|適宜|適当|お好みで|ひとつまみ|半分量)"
_ONE = rf"(?:\d+\s*と\s*\d+/\d+|\d+\s+\d+/\d+|\d+/\d+|\d+(?:\.\d+)?|[{''.join(_DIGITS)}])"
_NUMBER = rf"(?P<low>{_ONE})(?:\s*[-~〜～–至到]\s*(?P<high>{_ONE}))?"
_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_AFTER = rf"約?约?\s*{_NUMBER}\s*(?P<unit>{_UNIT})(?P<half>半)?"
_BEFORE = r"(?P<spoon>大さじ|小さじ|大サジ|小サジ|大匙|小匙|カップ)\s*" + _NUMBER.replace(
    "low", "low2"
).replace("high", "high2")
_AMOUNT = re.compile(rf"(?:{_BEFORE}|{_AFTER})", re.I)
_EDGE = " ,、:;…・.()=-"  # of a name, after NFKC
_BARE = re.compile(rf"[\s:]\s*{_NUMBER.replace('low', 'low3').replace('high', 'high3')}\s*$")


def is_cjk(text: str) -> bool:
    """True for a line with a Chinese or Japanese letter that has few Latin ones beside it."""
    found = len(_LETTERS.findall(text))
    return (
        found > 0
        and len(re.findall(r"[A-Za-z]{3,}", text)) <= 1
        and found >= len(re.findall(r"[A-Za-z]", text)) / 3
    )


def read_cjk(line: str) -> tuple[str, tuple[tuple[float, float, str], ...]]:
    """(name, amounts as (low, high, unit)); "" for a line that names nothing."""
    text = unicodedata.normalize("NFKC", re.sub(r"([¼-¾⅐-⅞])", r" \1", line)).replace("⁄", "/").strip()
    text = re.sub(r"^[\s*•·●○◎☆★■□▪・-]+|^[A-Z]\s(?=\S)", "", text)
    amounts: list[tuple[float, float, str]] = []
    spans: list[tuple[int, int]] = []
    for match in _AMOUNT.finditer(text):
        # "三文鱼" (salmon) and "一番だし" are names: a Chinese numeral needs its unit, and a name's first letters none
        spoon, unit = match["spoon"], match["unit"]
        low, high = match["low2" if spoon else "low"], match["high2" if spoon else "high"]
        name, factor = _UNITS[(spoon or unit).lower()]
        first = _number(low) + (0.5 if match["half"] else 0.0)
        last = _number(high) if high else first
        amounts.append((first * factor, last * factor, name or ""))
        spans.append(match.span())
    if not spans:
        bare = _BARE.search(text)
        if bare:
            first = _number(bare["low3"])
            amounts.append((first, _number(bare["high3"]) if bare["high3"] else first, ""))
            spans.append(bare.span())
    for start, end in reversed(spans):
        text = f"{text[:start]} {text[end:]}"
    text = re.sub(_VAGUE, " ", text)
    outside = re.sub(r"\([^)]*\)?", " ", text)
    name = re.split(r"[,、;:…]|\.{2,}|\s{2,}|\s+(?=[/+])", (outside.strip(_EDGE) or text.strip(" ()")))[0]
    return name.strip(_EDGE + "的").lower(), tuple(amounts)


def _number(text: str) -> float:
    if text in _DIGITS:
        return _DIGITS[text]
    total = 0.0
    for part in text.replace("と", " ").split():
        top, _, bottom = part.partition("/")
        total += float(top) / (float(bottom) or 1.0) if bottom else float(top)
    return total

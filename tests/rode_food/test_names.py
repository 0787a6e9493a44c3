"""Names in the one form in which they are compared: marks that carry meaning stay, in every script; others are folded."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.metrics import category_accuracy, ingredient_iou, score
from rode_food.names import ingredient_key, normalise_name

SAME = [
    ("crème fraîche", "CREME FRAICHE"),
    ("jalapeño", "jalapen\u0303o"),
    ("Käse", "kase"),
    ("smörgås", "smorgas"),
    ("Straße", "STRASSE"),
    ("kırmızı biber", "KIRMIZI BİBER"),
    ("μέλι", "ΜΕΛΙ"),
    ("κολοκύθι ψητός", "ΚΟΛΟΚΥΘΙ ΨΗΤΟΣ"),
    ("мёд", "Мед"),
    ("м\u2019ясо", "м\u02bcясо"),
    ("молоко\u0301", "молоко"),
    ("חָלָב", "חלב"),
    ("צ'יפס", "צ\u05f3יפס"),
    ("سُكَّر", "سكر"),
    ("ســـكر", "سكر"),
    ("क़ीमा", "\u0958ीमा"),
    ("ग्रीन\u200d टी", "ग्रीन टी"),
    ("กุ้ง\u200bแห้ง", "กุ้งแห้ง"),
    ("ガーリック", "カ\u3099ーリック"),
    ("ｶﾞｰﾘｯｸ", "ガーリック"),
    ("ｔｏｆｕ　１００", "Tofu"),
    ("김치", "\u1100\u1175\u11b7\u110e\u1175"),
    ("豈", "\uf900"),
    ("միս", "ՄԻՍ"),
    ("ყველი", "ᲧᲕᲔᲚᲘ"),
    ("❤\ufe0f tomato", "tomato"),
    ("1\ufe0f\u20e3 egg", "egg"),
    ("½ cup", "cup"),
]
DIFFERENT = [
    ("दाल", "दिल"),  # lentils, heart
    ("चीनी", "चना"),  # sugar, chickpeas
    ("ডাল", "ডিল"),  # lentils, dill
    ("ਦਾਲ", "ਦਿਲ"),
    ("தேன்", "தான்"),  # honey, himself
    ("పాలు", "పోలు"),
    ("กุ้ง", "กั้ง"),  # shrimp, mantis shrimp
    ("ข้าว", "ข่าว"),  # rice, news
    ("ເຂົ້າ", "ເຂ້າ"),
    ("ត្រី", "តារី"),
    ("ငါး", "ငါ"),  # fish, I
    ("はち", "ばち"),
    ("パン", "バン"),  # bread, van
    ("чай", "чаи"),  # tea, teas
    ("їжа", "іжа"),
    ("أرز", "ارز"),
    ("bơ", "bò"),  # butter, beef
    ("cá hồi", "ca hoi"),
    ("식빵", "시빵"),
    ("egg", "eggs"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_name(one: str, other: str) -> None:
    assert normalise_name(one) == normalise_name(other) != ""


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_another_name(one: str, other: str) -> None:
    assert normalise_name(one) != normalise_name(other)
    assert ingredient_iou([[one]], [[other]]).overall == 0
    assert category_accuracy([one], [other]) == 0


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("CRÈME fraîche!", "creme fraiche"),
        ("दाल (मूंग) 2", "दाल मूंग"),
        ("กุ้งแห้ง 20 ก.", "กุ้งแห้ง ก"),
        ("น้ำปลา", unicodedata.normalize("NFKC", "น้ำปลา")),
        ("バター・無塩", "バター 無塩"),
        ("ﾊﾞﾀｰ", "バター"),
        ("Mì Quảng", "mì quảng"),
        ("ГРЕЧКА-ядрица", "гречка ядрица"),
        ("\u0301 \u093f 5\u0301", ""),
        ("", ""),
    ],
)
def test_by_hand(name: str, normalised: str) -> None:
    assert normalise_name(name) == normalised
    assert ingredient_key(name) == normalised.replace(" ", "_")


def test_composed_in_the_result() -> None:
    for name, _ in SAME + DIFFERENT:
        assert unicodedata.is_normalized("NFC", normalise_name(name))


# letters, marks and what stands between them, of the scripts in which recipes come
SCRIPTS = {
    "latin": (0x41, 0x24F),
    "vietnamese": (0x1EA0, 0x1EF9),
    "greek": (0x370, 0x3FF),
    "polytonic": (0x1F00, 0x1FFC),
    "cyrillic": (0x400, 0x52F),
    "armenian": (0x531, 0x58A),
    "hebrew": (0x591, 0x5F4),
    "arabic": (0x60C, 0x6D3),
    "devanagari": (0x900, 0x97F),
    "bengali": (0x980, 0x9FE),
    "gurmukhi": (0xA01, 0xA76),
    "tamil": (0xB82, 0xBFA),
    "telugu": (0xC00, 0xC7F),
    "sinhala": (0xD81, 0xDF4),
    "thai": (0xE01, 0xE5B),
    "lao": (0xE81, 0xEDF),
    "tibetan": (0xF00, 0xFDA),
    "burmese": (0x1000, 0x109F),
    "georgian": (0x10A0, 0x10FF),
    "hangul": (0x1100, 0x11FF),
    "ethiopic": (0x1200, 0x139F),
    "khmer": (0x1780, 0x17F9),
    "kana": (0x3041, 0x30FF),
    "syllables": (0xAC00, 0xD7A3),
    "han": (0x4E00, 0x9FFF),
    "compatibility": (0xF900, 0xFAFF),
    "wide": (0xFF01, 0xFFDC),
    "marks": (0x300, 0x36F),
    "joiners": (0x200B, 0x200F),
}


def words(first: int, last: int) -> st.SearchStrategy[str]:
    letters = st.characters(min_codepoint=first, max_codepoint=last, exclude_categories=("Cn", "Cs"))
    marks = st.sampled_from("\u0301\u0308\u0323\u0327 -'1")
    return st.text(st.one_of(letters, letters, marks), max_size=8)


def _holds(name: str) -> None:
    normal = normalise_name(name)
    assert normalise_name(normal) == normal
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normalise_name(unicodedata.normalize(form, name)) == normal
    assert normalise_name(name.upper()) == normalise_name(name.lower()) == normal
    assert normalise_name(f" {name}, ") == normal
    assert not any(c.isdecimal() or c in "-'" for c in normal)
    key = ingredient_key(name)
    assert ingredient_key(key) == key


@pytest.mark.parametrize("script", SCRIPTS)
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_form_for_all(script: str, data: st.DataObject) -> None:
    _holds(data.draw(words(*SCRIPTS[script])))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=10))
def test_one_form_for_any_text(name: str) -> None:
    _holds(name)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=127), max_size=20))
def test_english_names_are_what_they_were(name: str) -> None:
    import re

    plain = re.sub(r"['’`]", "", name.casefold())
    assert normalise_name(name) == " ".join(re.sub(r"[\W\d_]+", " ", plain).split())


def test_answers_that_differ_in_a_mark_are_wrong() -> None:
    rows = [
        {
            "id": n,
            "source": "s",
            "task": "ingredients",
            "answer": answer,
            "truth": truth,
            "reference": [truth],
        }
        for n, answer, truth in (("1", "दिल", "दाल"), ("2", "กั้ง", "กุ้ง"))
    ]
    assert score(rows)["all"]["ingredient_iou"] == 0
    right = [row | {"answer": unicodedata.normalize("NFD", row["truth"])} for row in rows]
    assert score(right)["all"]["ingredient_iou"] == 100

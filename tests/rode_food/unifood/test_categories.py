from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rode_food.unifood.categories import Categories, head

TITLES = [
    "Chocolate Chip Cookies", "Oatmeal cookies (easy!)", "Sugar Cookie", "Ginger cookies with icing", "Best Cookies",
    "Apple Pie", "Grandma's apple pie recipe", "Apple pies for a crowd", "Pecan pie", "Peach pie",
    "Apple pie ice cream", "Vanilla ice cream", "Soup of the day",
    "Macaroni and cheese", "Baked macaroni and cheese", "Macaroni and Cheese II",
]  # fmt: skip


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("Apple pie ice cream with nuts", ["ice", "cream"]),
        ("Fall Vegetable and Chickpea Curry", ["chickpea", "curry"]),
        ("Macaroni & cheese", ["macaroni", "cheese"]),
        ("Macaroni and Cheese II", ["macaroni", "and", "cheese"]),
        ("In-N-Out Burger", ["out", "burger"]),
        ("Pasta alla Norma - quick", ["alla", "norma"]),
        ("Chicken Soup (for 6)", ["chicken", "soup"]),
        ("Grandma's Apple Pie Recipe", ["apple", "pie"]),
        ("Crème brûlée", ["crème", "brûlée"]),
        ("Easy Dinner", []),
        ("", []),
        ("123 (!)", []),
    ],
)
def test_the_dish_is_named_at_the_end_of_the_main_phrase(title: str, words: list[str]) -> None:
    assert head(title) == words


def test_pairs_where_they_are_frequent_else_the_last_word() -> None:
    found = Categories.fit(TITLES, size=10, min_count=2)
    # "apple pie" has three titles of its own; "pie" is left with two
    assert list(found.names.items()) == [
        ("cooki", "cookies"), ("apple pie", "apple pie"), ("macaroni and chees", "macaroni and cheese"),
        ("ice cream", "ice cream"), ("pie", "pie"),
    ]  # fmt: skip
    assert found.of("Mum's Apple Pies") == "apple pie"
    assert found.of("Rhubarb pie in a pan") == "pie"
    assert found.of("Cookie") == "cookies"
    assert Categories.fit(["Potatoes", "Potato", "Berries", "Berry", "Quiches", "Quiche"], 9, 2).names.keys() == {
        "potato", "berri", "quich",
    }  # fmt: skip
    assert found.of("Onion soup") is None
    assert found.of(None) is None


def test_the_most_frequent_are_kept_and_names_break_ties() -> None:
    assert list(Categories.fit(TITLES, size=3, min_count=2).names) == [
        "cooki",
        "apple pie",
        "macaroni and chees",
    ]
    assert list(Categories.fit(["b soup", "a stew"], size=1, min_count=1).names) == ["a stew"]


def test_they_survive_a_file(tmp_path: Path) -> None:
    found = Categories.fit(TITLES, size=10, min_count=2)
    found.save(tmp_path / "c.json")
    assert Categories.load(tmp_path / "c.json") == found


@given(st.lists(st.sampled_from(TITLES), max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_titles_does_not_matter(titles: list[str], random: object) -> None:
    shuffled = list(titles)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    found = Categories.fit(titles, 5, 2)
    assert Categories.fit(shuffled, 5, 2) == found
    of = [found.of(title) for title in titles]
    assert all(of.count(name) >= 2 for name in found.names.values()), (
        "a category of fewer titles than asked for"
    )

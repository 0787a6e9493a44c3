from __future__ import annotations

import pytest

from rode_food.lines.cjk import is_cjk, read_cjk


@pytest.mark.parametrize(
    ("line", "name", "amounts"),
    [
        ("猪肉 500克", "猪肉", [(500, 500, "g")]),
        ("500克猪肉", "猪肉", [(500, 500, "g")]),
        ("五花肉半斤", "五花肉", [(250, 250, "g")]),
        ("鸡蛋2个", "鸡蛋", [(2, 2, "")]),
        ("生抽 1汤匙", "生抽", [(1, 1, "tbsp")]),
        ("料酒:两茶匙", "料酒", [(2, 2, "tsp")]),
        ("姜 3-4片", "姜", [(3, 4, "slice")]),
        ("蒜 5瓣(拍碎)", "蒜", [(5, 5, "clove")]),
        ("盐 适量", "盐", []),
        ("盐少许", "盐", []),
        ("牛奶 200ml", "牛奶", [(200, 200, "ml")]),
        ("三文鱼", "三文鱼", []),
        ("醤油 大さじ2", "醤油", [(2, 2, "tbsp")]),
        ("砂糖…小さじ1/2", "砂糖", [(0.5, 0.5, "tsp")]),
        ("みりん 大さじ1と1/2", "みりん", [(1.5, 1.5, "tbsp")]),
        ("豚バラ肉 ２００ｇ", "豚バラ肉", [(200, 200, "g")]),
        ("水 1カップ", "水", [(1, 1, "cup")]),
        ("水 カップ1", "水", [(1, 1, "cup")]),
        ("玉ねぎ 1/2個", "玉ねぎ", [(0.5, 0.5, "")]),
        ("玉ねぎ（中） 1個", "玉ねぎ", [(1, 1, "")]),
        ("塩 少々", "塩", []),
        ("卵 2", "卵", [(2, 2, "")]),
    ],
)
def test_lines(line, name, amounts):
    assert is_cjk(line)
    assert read_cjk(line) == (name, tuple(amounts))


@pytest.mark.parametrize("line", ["2 tbsp soy sauce (醤油)", "200 g tofu", "crème fraîche"])
def test_other_lines_are_left_to_the_library(line):
    assert not is_cjk(line)

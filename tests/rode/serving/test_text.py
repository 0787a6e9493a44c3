"""Text while it comes: the pieces together are the whole, whatever is held back meanwhile."""

from __future__ import annotations

import random

import pytest

from rode.serving.text import AnswerText
from tiny_llava import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pieces(ids, stops=()):
    text = AnswerText(TOKENIZER, stops)
    found = []
    for token in ids:
        found.append(text.add(token))
        if text.stopped:
            break
    return [*found, text.finish()], text


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_the_whole_of_any_bytes(seed):
    draw = random.Random(seed)
    ids = [draw.randrange(264) for _ in range(300)]
    assert "".join(pieces(ids)[0]) == TOKENIZER.decode(ids, skip_special_tokens=True).strip()


def test_a_character_of_several_tokens_comes_at_once():
    ids = TOKENIZER("süß 🍣!", add_special_tokens=False).input_ids
    found = [piece for piece in pieces(ids)[0] if piece]
    assert found == ["s", "ü", "ß", " 🍣", "!"]


def test_white_space_around_the_answer_is_left_out_and_within_it_stays():
    ids = TOKENIZER(" \n a \n b \n ", add_special_tokens=False).input_ids
    found, _ = pieces(ids)
    assert "".join(found) == "a \n b"
    assert [piece for piece in found if piece] == ["a", " \n b"]


@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("salt, pepper. And more", [". And"], "salt, pepper"),
        ("aaab", ["aab"], "a"),
        ("one two", ["two", "one t"], ""),
        ("ends with a half of sto", ["stop"], "ends with a half of sto"),
        ("süß", ["ß"], "sü"),
        ("no such", ["X"], "no such"),
        ("a\n\nb", ["\n\n"], "a"),
    ],
)
def test_a_stop_string_ends_the_answer_and_none_of_it_is_shown(text, stops, want):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    found, state = pieces(ids, stops)
    assert "".join(found) == want
    assert state.stopped == any(stop in text for stop in stops)

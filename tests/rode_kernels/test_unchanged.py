"""`fast_path.unchanged`: each kind of reading, and that each change of one is seen."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from rode_kernels import backends
from rode_kernels.autograd import fast_path

pytestmark = pytest.mark.skipif(fast_path is None or not backends()["cpu"].available, reason="no native code")


def readings():
    """Something to read, and the check of it."""
    watched = {"plain": object(), "number": 7, "list": [], "hooks": OrderedDict(), "none": None}
    held = SimpleNamespace(version=1000, name="a")
    answers = {"level": 1000, "mode": None}
    check = fast_path.unchanged(
        [(watched, key) for key in (*watched, "absent")],
        [(held, "version"), (held, "missing"), (torch.zeros(1), "_version")],
        [lambda: answers["level"] + 0, lambda: answers["mode"], lambda: answers["raises"]],
    )
    return watched, held, answers, check


def test_what_stays_as_it_was_holds():
    watched, held, _, check = readings()
    assert check()
    watched["other"] = held.other = 1  # nobody read these
    watched["number"], held.version = int("7"), int("1000")  # the same numbers
    assert check()


@pytest.mark.parametrize(
    "change",
    [
        lambda watched, held, answers: watched.update(plain=object()),
        lambda watched, held, answers: watched.update(number=8),
        lambda watched, held, answers: watched.update(number=True),
        lambda watched, held, answers: watched["list"].append(1),
        lambda watched, held, answers: watched.update(list=[]),
        lambda watched, held, answers: watched["hooks"].update(a=1),
        lambda watched, held, answers: watched.update(none=0),
        lambda watched, held, answers: watched.pop("none"),
        lambda watched, held, answers: watched.update(absent=None),
        lambda watched, held, answers: setattr(held, "version", 1001),
        lambda watched, held, answers: setattr(held, "missing", None),
        lambda watched, held, answers: delattr(held, "version"),
        lambda watched, held, answers: answers.update(level=1001),
        lambda watched, held, answers: answers.update(mode=0),
        lambda watched, held, answers: answers.update(raises=None),
        lambda watched, held, answers: answers.pop("level"),
    ],
)
def test_a_change_is_seen(change):
    *state, check = readings()
    change(*state)
    assert not check()
    assert not check()  # and leaves no error behind


def test_a_version_counts_writes():
    t = torch.zeros(3)
    check = fast_path.unchanged([], [(t, "_version")], [])
    assert check()
    t.add_(1)
    assert not check()

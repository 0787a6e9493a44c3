"""Interleaving, and what becomes of the times."""

from __future__ import annotations

import torch

from benchmarks import timing
from benchmarks.timing import Spread, interleaved, machine, ratios, spread


def test_spread_and_ratios():
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert spread([1.0, 2, 3, 4, 5, 6, 7, 8]) == (4.5, 3.0, 6.0)
    assert ratios({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 1.0]}, "a", "b") == (3.0, 2.0, 4.0)
    assert str(Spread(1.234, 1.0, 2.0)) == "1.23 (1.00 to 2.00)"
    assert Spread(1.234, 1.0, 2.0).text(1) == "1.2 (1.0 to 2.0)"


def test_every_round_begins_with_another_call():
    ran: list[str] = []
    calls = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    times = interleaved(calls, rounds=4, warm_up=1)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(of) for name, of in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_preparation_is_not_timed_and_comes_before_the_flush(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 64)

    def seconds(call, device, flush, clock, ahead):
        assert flush.nbytes == 128  # twice the cache
        assert ahead == 0
        events.append("flush")
        call()
        return 1.0

    monkeypatch.setattr(timing, "seconds", seconds)

    def prepare():
        events.append("prepare")
        return lambda: events.append("call")

    assert interleaved({"a": prepare}, rounds=2, warm_up=0, prepared=True, flush=True) == {"a": [1.0, 1.0]}
    assert events == ["prepare", "flush", "call"] * 2


def test_what_a_result_is_read_with():
    about = machine()
    assert about["threads"] == torch.get_num_threads()
    assert about["torch"] == torch.__version__
    assert {"machine", "python", "transformers", "peft", "rode", "date"} <= set(about)
    assert timing.version("no-such-package") is None

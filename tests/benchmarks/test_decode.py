"""The decoding benchmark runs, writes what it measured, and says what it would run where it cannot."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decode
from benchmarks.__main__ import main
from rode_kernels import backends


def test_decoding(monkeypatch, tmp_path):
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    monkeypatch.setattr(decode, "WIDTHS", (24,))
    monkeypatch.setattr(decode, "TOKENS", (1, 3))
    monkeypatch.setattr(decode, "CALLS", 2)
    monkeypatch.setattr("benchmarks.problem.cache_bytes", lambda device: 2**14)
    file = tmp_path / "decode.json"
    main(["decode", "--backend", "cpu", "--rounds", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["benchmark"] == "decode"
    assert found["threads"] == torch.get_num_threads()
    assert len(found["rows"]) == 3 * 2 * 3  # dtypes, tokens; without and with a graph, with dropout
    kinds = {(row["dtype"], row["parameters"]) for row in found["rows"]}
    assert kinds == {("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")}
    assert [row["dropout"] for row in found["rows"] if row["graph"]] == [0, 0.05] * 6
    for row in found["rows"]:
        assert set(row["ratio"]) == {"packed", "loop"}
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["open_share"] == 0.5


def test_without_a_gpu_it_says_what_it_would_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    main(["decode", "--backend", "triton"])
    assert "triton cannot run here" in capsys.readouterr().out


def test_a_run_takes_one_copy_after_the_other(monkeypatch):
    monkeypatch.setattr(decode, "CALLS", 3)
    seen: list[int] = []
    run = decode.repeated(seen.append, [[1], [2]])
    run()
    run()
    assert seen == [1, 2, 1, 2, 1, 2]

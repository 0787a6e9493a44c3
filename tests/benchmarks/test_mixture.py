"""The timing benchmark says what it would run where it cannot, refuses to time a wrong result, and writes what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import mixture
from benchmarks.__main__ import main
from rode_kernels import backends


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_without_a_gpu_it_says_what_it_would_run(backend, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    main(["mixture", "--backend", backend])
    said = capsys.readouterr().out
    assert f"{backend} cannot run here: {backends()[backend].reason}" in said
    assert "M = 8192, K = 4096, O = 4096" in said


def test_ratios_are_measured_and_written(monkeypatch, tmp_path, capsys):
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    monkeypatch.setattr(mixture, "ON_CPU", [(3, 16, 24)])
    file = tmp_path / "times.json"
    main(["mixture", "--backend", "cpu", "--rounds", "3", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2  # dtypes, with and without backward, opponents
    for row in rows:
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["milliseconds"] > 0
    assert "against packed" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed():
    p = mixture.Problem.random(4, 16, 24, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=r"packed is wrong .*nothing is timed"):
        mixture.check(p, lambda x, A, B, W, base: base, "packed")

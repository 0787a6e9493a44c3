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
    monkeypatch.setattr(mixture, "ON_CPU", [(3, 16, 24, (2, 5))])
    file = tmp_path / "times.json"
    main(["mixture", "--backend", "cpu", "--rounds", "3", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2  # dtypes, with and without backward, opponents
    for row in rows:
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["milliseconds"] > 0
    assert "against packed" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_candidate_is_right_for_all_tokens(dtype):
    p = mixture.Problem.random((70, 32, 24, (2, 5)), dtype, "cpu")
    backend = "cpu" if backends()["cpu"].available else "reference"
    runs = mixture.candidates(p, backend)
    assert list(runs) == [backend, "packed", "loop"]
    for name, run in runs.items():
        mixture.check(p, run, name, chunk=32)


class WrongGradient(torch.autograd.Function):
    """A tensor whose last row has a gradient that is off."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1] *= 1.5
        return grad


@pytest.mark.parametrize("argument", ["x", "A", "B", "the router"])
def test_a_wrong_result_is_not_timed(argument):
    p = mixture.Problem.random((70, 16, 24, (2, 5)), torch.float32, "cpu")
    right = mixture.candidates(p, "reference")["loop"]

    def late(x, A, B, W, base):  # right for the first tokens
        y = right(x, A, B, W, base)
        return torch.cat([y[:64], y[64:] * 1.01])

    with pytest.raises(RuntimeError, match=r"packed is wrong \(y, .*nothing is timed"):
        mixture.check(p, late, "packed", chunk=32)

    def wrong(*args):
        args = list(args)
        at = ("x", "A", "B", "the router").index(argument)
        args[at] = WrongGradient.apply(args[at])
        return right(*args)

    with pytest.raises(
        RuntimeError, match=rf"packed is wrong \(the gradient of {argument}, .*nothing is timed"
    ):
        mixture.check(p, wrong, "packed", chunk=32)


@pytest.mark.slow
def test_the_compiled_candidate_is_right(monkeypatch):
    p = mixture.Problem.random((70, 32, 24, (2, 5)), torch.float32, "cpu")
    run = torch.compile(mixture.candidates(p, "reference")["packed"], dynamic=False)
    mixture.check(p, run, "compiled")

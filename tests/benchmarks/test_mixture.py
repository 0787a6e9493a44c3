"""The timing benchmark says what it would run where it cannot, refuses to time a wrong result, and writes what it measured."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import mixture, problem
from benchmarks.__main__ import main
from benchmarks.cases import PASSES, Shape
from benchmarks.peak import Peak
from benchmarks.problem import Problem, forms
from benchmarks.timing import machine
from rode_kernels import backends

PEAK = Peak("by hand", {"float32": 1e9, "bfloat16": 2e9, "float16": 1e9}, read=1e9, copy=1e9)
needs_cpu = pytest.mark.skipif(not backends()["cpu"].available, reason="no native code")


@pytest.fixture
def tiny(monkeypatch):
    shapes = {
        "a": Shape(3, 16, 24, (2, 5)),
        "b": Shape(4, 16, 24, (2, 5), (0.25, 1.0), run=2),
        "c": Shape(4, 16, 24, (2, 5), dropout=0.3, params_fp32=True),
    }
    monkeypatch.setattr(mixture, "ON_CPU", shapes)
    monkeypatch.setattr(mixture, "measure", lambda device: PEAK)
    for module in ("problem", "timing"):
        monkeypatch.setattr(f"benchmarks.{module}.cache_bytes", lambda device="cpu": 2**14)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_without_a_gpu_it_says_what_it_would_run(backend, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    main(["mixture", "--backend", backend])
    said = capsys.readouterr().out
    assert f"{backend} cannot run here: {backends()[backend].reason}" in said
    assert "M = 8192, K = 4096, O = 4096" in said


@needs_cpu
def test_rows_and_what_is_written(tiny, tmp_path, capsys):
    file = tmp_path / "times.json"
    main(["mixture", "--backend", "cpu", "--rounds", "3", "--no-compile", "--json", str(file)])
    found = json.loads(file.read_text())
    about = machine()
    assert {name: found[name] for name in about} == about
    assert found["benchmark"] == "mixture"
    assert found["peak"] == PEAK.json()
    assert found["backends"] == {"cpu": backends()["cpu"].reason}
    rows = found["rows"]
    assert len(rows) == 2 * 4 * 5  # dtypes, cases with their shares, passes
    asked = {(row["case"], row["open"], row["open_share"]) for row in rows}
    assert asked == {("a", 0.5, 0.5), ("b", 0.25, 0.25), ("b", 1.0, 1.0), ("c", 0.5, 0.5)}
    assert {(row["case"], row["dropout"], row["params_fp32"]) for row in rows} == {
        ("a", 0, False),
        ("b", 0, False),
        ("c", 0.3, True),
    }
    for row in rows:
        plain = {"packed"} if row["pass"] in mixture.IN_PLACE else {"packed", "loop"}
        assert set(row["seconds"]) == plain | {"cpu"}
        assert set(row["ratio"]) == plain
        for spread in (*row["seconds"].values(), *row["ratio"].values(), row["of_frozen"]):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        roofline = row["roofline"]
        assert roofline["share"] == roofline["seconds"] / row["seconds"]["cpu"]["median"]
    said = capsys.readouterr().out
    assert str(PEAK) in said
    assert len([line for line in said.splitlines() if line.startswith(("a ", "b ", "c "))]) == len(rows)


@needs_cpu
def test_one_row_can_be_asked_for(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mixture, "measure", lambda device: None)
    file = tmp_path / "row.json"
    options = [
        "--cases",
        "b",
        "--open",
        "0.5",
        "--dtype",
        "bfloat16",
        "--pass",
        "backward",
        "--rounds",
        "2",
        "--no-compile",
    ]
    main(["mixture", "--backend", "cpu", *options, "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["case"], row["open_share"], row["dtype"], row["pass"]) == ("b", 0.5, "bfloat16", "backward")
    assert row["roofline"] is None
    assert "no C++ compiler" in capsys.readouterr().out


def test_unknown_cases_are_named(tiny):
    with pytest.raises(SystemExit, match="--cases: expected some of a, b, c; got nonsense"):
        main(["mixture", "--backend", "cpu", "--cases", "a", "nonsense"])
    with pytest.raises(SystemExit, match="one run is on one device"):
        main(["mixture", "--backend", "cpu", "cuda"])


@needs_cpu
def test_a_wrong_kernel_is_not_timed(tiny, monkeypatch):
    right = problem.rectified_mixture
    monkeypatch.setattr(problem, "rectified_mixture", lambda *args, **options: 1.01 * right(*args, **options))
    monkeypatch.setattr(mixture, "timed", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(RuntimeError, match=r"cpu is wrong \(y, .*nothing is timed"):
        main(["mixture", "--backend", "cpu", "--pass", "forward", "--no-compile"])


@pytest.mark.parametrize("what", PASSES)
def test_calls_are_the_pass_that_they_say(what):
    """Each on another copy; backward from a graph that was made before."""
    p = Problem.random(5, 16, 24, torch.float32, "cpu", (2, 5))
    others = [p, p.clone()]
    plain = {
        name: form for name, form in forms(p, []).items() if what not in mixture.IN_PLACE or form.run_in_place
    }
    y, grads = problem.gradients(p, plain["packed"])
    calls = mixture.calls(what, forms(p, []), others)
    assert list(calls) == list(plain)
    with torch.set_grad_enabled(what in mixture.TRAINING):
        first, second = calls["packed"](), calls["packed"]()
        base = [q.base.clone() for q in others]
        for q, before, call in zip(others, base, (first, second), strict=True):
            result = call()
            if what in mixture.TRAINING:
                found = plain["packed"].unpack(list(result))
                for got, want in zip(found, grads, strict=True):
                    torch.testing.assert_close(got, want)
                if what == "both in place":
                    torch.testing.assert_close(q.base, y)
            else:
                torch.testing.assert_close(result, y)
                assert (result is q.base) == (what == "in place")
                assert torch.equal(q.base, before) == (what == "forward")


def test_the_frozen_layer_is_a_linear_layer_with_other_weights_each_time(monkeypatch):
    monkeypatch.setattr(mixture, "enough", lambda bytes_, device: 2)
    p = Problem.random(5, 16, 24, torch.float32, "cpu", (2, 5))
    form, in_place = mixture.frozen(p)
    first, second, third = (form.run(*form.leaves(p)) for _ in range(3))
    base = p.base.clone()
    assert torch.equal(in_place.run_in_place(*in_place.leaves(p)), second)
    assert torch.equal(p.base, base)
    assert first.shape == (5, 24)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


@pytest.mark.slow
@needs_cpu
@pytest.mark.parametrize("case", ["a", "c"])
def test_compiled_forms_are_timed_and_the_faster_counts(case, tiny, tmp_path, capsys):
    file = tmp_path / "times.json"
    options = ["--cases", case, "--dtype", "float32", "--pass", "forward", "--rounds", "3"]
    main(["mixture", "--backend", "cpu", *options, "--json", str(file)])
    (row,) = json.loads(file.read_text())["rows"]
    both = {name: row["seconds"][f"compiled {name}"]["median"] for name in ("packed", "loop")}
    assert row["fastest_compiled"] == min(both, key=both.get)
    assert set(row["compile_seconds"]) == {"packed", "loop"}
    assert "compiled" in row["ratio"]
    assert "compiling, not in any time above" in capsys.readouterr().out

"""The benchmark of overhead measures what it names, and leaves the number of threads as it was."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.overhead import OPEN
from rode_kernels import backends


def test_parts_are_measured_and_written(tmp_path, capsys):
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    file, threads = tmp_path / "overhead.json", torch.get_num_threads()
    main(["overhead", "--rounds", "3", "--json", str(file)])
    result = json.loads(file.read_text())
    times = result["microseconds"]
    assert all(row["median"] > 0 for row in times.values())
    assert "guard" in times, "the short way is not taken"
    assert set(result["overhead"]) == {"without gradients", "with gradients"}
    assert all(us > 0 for us in result["decoding"].values())
    assert set(OPEN) <= set(result["decoding"])
    assert result["threads"] == 1
    assert torch.get_num_threads() == threads
    assert "us, at most 12 wanted" in capsys.readouterr().out

"""The command lists what there is, and refuses options that make no sense in one line."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import BENCHMARKS, main


def test_without_a_name_everything_is_listed(capsys):
    main([])
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == list(BENCHMARKS)
    assert {"mixture", "decode", "plot"} <= set(BENCHMARKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "expected at least 1, got 0"),
        (["--open", "1.5"], "expected a share in [0, 1], got 1.5"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--pass", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_refused_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["mixture", *arguments])
    assert message in capsys.readouterr().err

"""How a label job ends early."""

from __future__ import annotations

from typing import Any


class LabelError(RuntimeError):
    """The job cannot go on. One line: what was met, and what to do. The answers are in the ledger."""


class Unfinished(RuntimeError):
    """Nothing is wrong, but not all is labelled: the budget is reached, or batches are still being worked on.

    Attributes:
        report: counts, tokens and cost so far, as `run` returns them.
    """

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report

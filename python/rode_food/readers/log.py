"""The log of a reader: what it left out and why, and what it kept with a doubt, with file and line."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rode_food.records import RecordError

MEANINGS = {
    "broken": "damaged, or of another form than the layout's: not used",
    "left out": "sound, but without what a record needs, such as a picture: not used",
    "noted": "used, with a doubt",
}
"""The words under which entries of a source are counted, as `inspect` explains them."""


def meanings(left_out: bool, noted: bool) -> str:
    """A line that explains the words "left out", which holds what is broken here, and "noted"; empty where neither is used."""
    said = ["left out means not used: broken, or without what a record needs, such as a picture"] * left_out
    return "; ".join(said + [f"noted means {MEANINGS['noted']}"] * noted)


@dataclass(frozen=True)
class Problem:
    """One thing that could not be used.

    Attributes:
        reason: what it lacks, in words that fit after "with": "no picture", "invalid UTF-8".
        file: where it stands, or None if it is a file that is missing.
        line: from 1; None where the file has no lines.
        detail: what was met, at most a line.
    """

    reason: str
    file: Path | None = None
    line: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        return ": ".join(filter(None, (where, self.reason, self.detail)))


@dataclass
class ReadLog:
    """Counts what a reader leaves out or has doubts about, by reason, and keeps the first `keep` of each reason.

    Attributes:
        strict: raise RecordError at the first broken entry instead of leaving it out.
        keep: examples kept of each reason; counting goes on.
    """

    strict: bool = False
    keep: int = 20
    counts: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    noted: list[Problem] = field(default_factory=list)

    def note(
        self, reason: str, *, file: Path | None = None, line: int | None = None, detail: str = ""
    ) -> None:
        """For an entry that is kept although something about it is odd. Never raises."""
        self.notes[reason] += 1
        if self.notes[reason] <= self.keep:
            self.noted.append(Problem(reason, file, line, detail))

    def leave_out(
        self, reason: str, *, file: Path | None = None, line: int | None = None, detail: str = ""
    ) -> None:
        """For an entry that is sound but of no use here: no picture, no mass. Never raises."""
        self.counts[reason] += 1
        if self.counts[reason] <= self.keep:
            self.problems.append(Problem(reason, file, line, detail))

    def leave_out_broken(
        self, reason: str, *, file: Path | None = None, line: int | None = None, detail: str = ""
    ) -> None:
        """For an entry that is damaged: no JSON, a field of the wrong type, an id that stands twice.

        Raises:
            RecordError: if `strict`, naming file and line.
        """
        if self.strict:
            raise RecordError(str(Problem(reason, file, line, detail)))
        self.broken[reason] += 1
        self.leave_out(reason, file=file, line=line, detail=detail)

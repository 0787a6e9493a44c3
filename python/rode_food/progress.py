"""How far work is: a bar in a terminal, and elsewhere (a log file, a scheduler) a plain line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

_BETWEEN = 30.0  # seconds between lines
_BEFORE = 5.0  # the first one: short work says nothing


class Progress(tqdm):  # type: ignore[type-arg]  # its types are generic, it is not
    """`tqdm` with `show` in place of `disable`: a bar where standard error is a terminal or a notebook, else lines.

    Args:
        iterable: what to go through; None for `update`. show: False says nothing. options: tqdm's.
    """

    def __init__(self, iterable: Iterable[T] | None = None, *, show: bool = True, **options: Any) -> None:
        in_notebook = any(base.__name__ == "tqdm_notebook" for base in type(self).__mro__)
        self.in_lines = not in_notebook and not sys.stderr.isatty()
        self.said = 0
        if self.in_lines:
            options |= {
                "mininterval": _BETWEEN,
                "maxinterval": _BETWEEN,
                "delay": _BEFORE,
                "dynamic_ncols": False,
            }
            of = (
                "{n_fmt} of {total_fmt}"
                if options.get("total") or hasattr(iterable, "__len__")
                else "{n_fmt}"
            )
            options["bar_format"] = "{desc}: " + of + "{unit} in {elapsed}, {rate_fmt}{postfix}"
            options["unit"] = f" {options.get('unit', 'it')}"
        super().__init__(iterable, disable=not show, **options)

    def display(self, msg: str | None = None, pos: int | None = None, **kwargs: Any) -> Any:
        """tqdm's; a line of its own where there is no terminal."""
        if not self.in_lines:
            return super().display(msg, pos, **kwargs)
        self.said += 1
        print(str(self) if msg is None else msg, file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """tqdm's; the last line where there was one before."""
        if not self.in_lines or self.disable:
            super().close()
            return
        if self.said:
            self.display()
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]  # tqdm's own

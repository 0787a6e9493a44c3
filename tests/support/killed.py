"""Kill a piece of work at every point where it makes something last, and let it go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from forked import forked


def killed_at(work: Callable[[], object], commit: int) -> bool:
    """Runs `work` in a forked process that is killed (SIGKILL) just before, for odd `commit` just after, its
    `commit // 2`-th rename of a file.

    Returns:
        True if it was killed, False if it ended before it came so far.

    Raises:
        AssertionError: it failed of itself; its traceback is on stderr.
    """

    def to_be_killed() -> None:
        rename, left = os.replace, [commit // 2]

        def replace(*args: object, **kwargs: object) -> None:
            if left[0] == 0:
                if commit % 2:
                    rename(*args, **kwargs)  # type: ignore[arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            rename(*args, **kwargs)  # type: ignore[arg-type]

        os.replace = replace  # type: ignore[assignment]
        work()

    code = forked(to_be_killed)
    assert code in (0, -signal.SIGKILL), f"the work failed with {code}; see stderr"
    return code != 0


def kill_everywhere(
    work: Callable[[], object], fresh: Callable[[], object], check: Callable[[], object]
) -> int:
    """For every rename that `work` makes: from a fresh state, kill it there, let it run again to its end, check.

    Returns:
        How many points there were.
    """
    commit = 0
    while True:
        fresh()
        if not killed_at(work, commit):
            return commit
        work()
        check()
        commit += 1

"""A function in a process of its own, without the seconds that imports take."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest


def forked(function: Callable[[], Any]) -> int:
    """Call it in a forked process; its exit code: 0 done, 1 for an exception (printed), minus the signal that ended it."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

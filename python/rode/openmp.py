"""OpenMP's threads beside other processes: they sleep while they wait for each other, and a shared machine is named.

Threads that wait by spinning, as GNU's runtime lets them by default, hold the core that the one they wait for would need. With two
threads on two busy cores a small step takes many times what it takes when they sleep. The runtime reads its settings when it is
loaded, which `import torch` does.
"""

from __future__ import annotations

import logging
import os
import sys
import time

logger = logging.getLogger(__name__)

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user decides it."""


def sleep_while_waiting() -> None:
    """Start this program again with OMP_WAIT_POLICY=passive, unless a user has decided, or torch is loaded already.

    The process stays the same: its number, its files, its terminal. Only where there is `exec`.
    """
    if any(name in os.environ for name in _SETTINGS) or "torch" in sys.modules or os.name != "posix":
        return
    if not sys.executable or len(sys.orig_argv) < 2:  # an embedded interpreter
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def name_a_shared_machine(threads: int) -> None:
    """Logs one line if other processes leave fewer cores than `threads`.

    The load is the average of the last minute, in which this process may have worked, too: its own share of it at most is left out.
    """
    if not hasattr(os, "getloadavg"):
        return
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    load = max(0.0, load - time.process_time() / 60)
    if load + threads > cores + 0.5:
        logger.info(
            "other processes kept %.1f of %d cores busy during the last minute; with %d threads beside them steps take longer",
            load,
            cores,
            threads,
        )

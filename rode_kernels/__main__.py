"""`python -m rode_kernels`: what is available here, and why the rest is not."""

from __future__ import annotations

import platform
import sys

import torch

from rode_kernels import backends


def main() -> None:
    print(
        f"rode_kernels on Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    )
    for status in backends().values():
        serves = ", ".join(status.devices) or "any device"
        print(f"  {status.name:14} {'yes' if status.available else 'no':4} {serves:12} {status.reason}")


if __name__ == "__main__":
    sys.exit(main())

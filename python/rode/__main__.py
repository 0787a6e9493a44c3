"""The `rode` command, also as `python -m rode`, for launchers such as torchrun."""

import sys

from rode.openmp import sleep_while_waiting


def main() -> int:
    """Run the command in a process whose OpenMP threads sleep while they wait; its exit code."""
    sleep_while_waiting()
    from rode.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())

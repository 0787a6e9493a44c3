"""`python -m rode`, for launchers such as torchrun."""

import sys

from rode.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m rode` with DeepSpeed's reductions over gloo: its own for CPUs would be compiled first, for half a minute."""

import sys

import deepspeed.ops

from rode.cli import main

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
sys.exit(main())

#!/bin/sh
# Train on this machine's GPUs, one process each (PROCESSES=N for another number):
#   configs/distributed/torchrun.sh CONFIG [KEY=VALUE ...] [--resume]
# A process that fails ends the others: torchrun stops them, and reports which was first.
exec torchrun --standalone --nproc-per-node "${PROCESSES:-$(nvidia-smi -L | wc -l)}" -m rode train "$@"

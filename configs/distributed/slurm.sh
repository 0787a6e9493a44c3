#!/bin/bash
# Train on several machines under Slurm:
#   sbatch configs/distributed/slurm.sh CONFIG [KEY=VALUE ...] [--resume]
# All machines must see the run's folder. Five minutes before its time is over the job leaves a checkpoint to --resume from.
#SBATCH --job-name=rode
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -eu
PROCESSES=${PROCESSES:-4} # of each machine
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# --kill-on-bad-exit: a machine whose processes failed ends those of the others, which would wait for it
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node "$PROCESSES" \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:${PORT:-29500}" \
  -m rode train "$@"

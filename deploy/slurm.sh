#!/usr/bin/env bash
# Two nodes of four GPUs; the experts of a layer are shared out within a node.
#   sbatch deploy/slurm.sh runs/forty cifar10-resnets --model.num-experts 40 --parallel.ep-size 4
# The same line again goes on with the run. The folder, runs/forty, must be one that all nodes share.
#SBATCH --job-name=gatewright
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

output=${1:?the folder of the run}
recipe=${2:?a recipe, and then its flags}
shift 2

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# Requeued or submitted again, the job goes on with the run; its settings are in the run's folder.
words=("$@" --checkpoint-every-steps 100)
if [[ -f $output/config.yaml ]]; then
    words+=(--resume)
fi
srun --kill-on-bad-exit=1 gatewright train "$recipe" --output "$output" "${words[@]}"

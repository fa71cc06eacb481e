#!/usr/bin/env bash
#SBATCH --job-name=recon
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# sbatch slurm.sh FILE DIR: a workflow on Slurm, over as many time limits as it needs.
# Slurm sends USR1 to every task 300 s before the limit (allow three times the longest step); recon writes a checkpoint and ends
# with 75, and the job goes back into the queue.  Load the site's MPI and the environment with recon (pip install 'recon[cluster]')
# before the srun line; some sites also want srun --mpi=pmix.
set -euo pipefail
workflow=$1 folder=$2

if [ -f "$folder/DONE.json" ]; then
    exit 0
elif [ -f "$folder/config.resolved.yaml" ]; then
    command=(recon resume "$folder")
else
    command=(recon run "$workflow" --out "$folder")
fi

code=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${command[@]}" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

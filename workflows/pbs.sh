#!/usr/bin/env bash
#PBS -N recon
#PBS -l select=1:ncpus=16:mpiprocs=4:ompthreads=4
#PBS -l walltime=01:00:00
#PBS -j oe
#
# qsub -v WORKFLOW=FILE,FOLDER=DIR pbs.sh: a workflow on PBS, over as many time limits as it needs.
# After SECONDS_TO_RUN (the walltime less 300 s; allow three times the longest step) mpiexec passes USR1 to every rank; recon writes
# a checkpoint and ends with 75, and the job is submitted again.  Load the site's MPI and the environment with recon
# (pip install 'recon[cluster]') before the mpiexec line.
set -euo pipefail
cd "${PBS_O_WORKDIR:-.}"
script=${SCRIPT:-workflows/pbs.sh}

if [ -f "$FOLDER/DONE.json" ]; then
    exit 0
elif [ -f "$FOLDER/config.resolved.yaml" ]; then
    command=(recon resume "$FOLDER")
else
    command=(recon run "$WORKFLOW" --out "$FOLDER")
fi

code=0
timeout --foreground --preserve-status --signal=USR1 "${SECONDS_TO_RUN:-3300}" mpiexec -n "${RANKS:-4}" "${command[@]}" || code=$?
if [ "$code" -eq 75 ]; then
    qsub -v "WORKFLOW=$WORKFLOW,FOLDER=$FOLDER,SCRIPT=$script" "$script"
fi
exit "$code"

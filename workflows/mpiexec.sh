#!/usr/bin/env bash
# mpiexec.sh RANKS FILE DIR: a workflow on this machine.  Started again after a stop, it goes on where the run stopped.
# USR1 sent to mpiexec (kill -USR1 PID) or Ctrl-C asks for a checkpoint; the exit code is then 75.
set -euo pipefail
ranks=$1 workflow=$2 folder=$3

if [ -f "$folder/DONE.json" ]; then
    exit 0
elif [ -f "$folder/config.resolved.yaml" ]; then
    exec mpiexec -n "$ranks" recon resume "$folder"
else
    exec mpiexec -n "$ranks" recon run "$workflow" --out "$folder"
fi

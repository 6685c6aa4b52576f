#!/bin/bash
# Submits a whole run: rollouts -> mining and training -> export, evaluation and report.
#
#   CONFIG=configs/my_run.yaml RUN_DIR=runs/mine configs/slurm/chain.sh
#
# Each stage waits until the one before has succeeded; where one fails, those behind it are
# cancelled. Run it from the root of the repository, again whenever a stage has failed: what is
# finished is reused. All stages take the same options, so an option that one verb alone has belongs
# into a file: --config FILE can be given several times.

# Edit these, or set them on the command line.
export PYTHON=${PYTHON:-.venv/bin/python}
export CONFIG=${CONFIG:-configs/quickstart.yaml}
export RUN_DIR=${RUN_DIR:-runs/slurm}
NUM_ROLLOUT_TASKS=${NUM_ROLLOUT_TASKS:-4}
# Options of sbatch for each stage, such as --account or --partition.
ROLLOUT_OPTIONS=${ROLLOUT_OPTIONS:-}
FIT_OPTIONS=${FIT_OPTIONS:-}
EVALUATE_OPTIONS=${EVALUATE_OPTIONS:-}
FIT=${FIT:-fit.sbatch} # or fit_nodes.sbatch

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
mkdir -p "$RUN_DIR/slurm"
submit() { # prints the id of the job alone
  sbatch --parsable --output="$RUN_DIR/slurm/%x-%j.out" --kill-on-invalid-dep=yes "$@" | cut -d ';' -f 1
}

# shellcheck disable=SC2086 # options are several words
{
  rollout=$(submit --array="0-$((NUM_ROLLOUT_TASKS - 1))" $ROLLOUT_OPTIONS "$here/rollout_array.sbatch" "$@")
  echo "rollout   $rollout (tasks 0 to $((NUM_ROLLOUT_TASKS - 1)))"
  fit=$(submit --dependency="afterok:$rollout" $FIT_OPTIONS "$here/$FIT" "$@")
  echo "fit       $fit (after $rollout)"
  evaluate=$(submit --dependency="afterok:$fit" $EVALUATE_OPTIONS "$here/evaluate.sbatch" "$@")
  echo "evaluate  $evaluate (after $fit)"
}
echo "logs: $RUN_DIR/slurm"

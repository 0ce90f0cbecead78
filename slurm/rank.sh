#!/usr/bin/env bash
# Becomes one rank: rank.sh ATTEMPT COMMAND... What it says is kept in ATTEMPT/rank-R.log; the job's
# log has all of rank 0, and the errors of the others.
set -euo pipefail
log=$1/rank-$RANK.log
shift
# What copies the output lives on until its end, also where a launcher kills the rank's session.
if ((RANK == 0)); then
    exec > >(exec setsid tee -a "$log") 2>&1
else
    # shellcheck disable=SC2094 # both only append
    exec >>"$log" 2> >(exec setsid tee -a "$log" >&2)
fi
exec "$@"

#!/usr/bin/env bash
# Becomes one rank: rank.sh ATTEMPT COMMAND... Its output goes to ATTEMPT/rank-R.log; the job's log
# has the output of rank 0, and the errors of the others.
set -euo pipefail
log=$1/rank-$RANK.log
shift
# tee has its own session, so it survives when a launcher kills the rank's session.
if ((RANK == 0)); then
    exec > >(exec setsid tee -a "$log") 2>&1
else
    # shellcheck disable=SC2094 # both only append
    exec >>"$log" 2> >(exec setsid tee -a "$log" >&2)
fi
exec "$@"

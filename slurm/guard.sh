#!/usr/bin/env bash
# A separate step on the job's first node: guard.sh PID WHOM, with the PID of the job's script.
# - SIGUSR1, or a file ATTEMPT/stop, is a stop request. The guard sends SIGUSR1 to the ranks, or to
#   the script if WHOM is `script`, every 5 seconds, since a rank that still starts ignores it.
# - When the job's script dies, SLURM ends the job as failed; this step gets SIGTERM and requeues
#   the job.
set -uo pipefail
root=$AGRPO_ROOT
script=$1 whom=$2
# shellcheck source=slurm/common.sh
. "$root/slurm/common.sh"
attempt=$AGRPO_ATTEMPT
exec >>"$attempt/guard.log" 2>&1 # the step's own output ends with the job's script

trap 'touch "$attempt/stop"' USR1

on_term() {
    if [[ -e $attempt/over ]] || kill -0 "$script" 2>/dev/null; then
        exit 0 # the script itself decides
    fi
    case $([[ ! -s $AGRPO_OUTCOME ]] || cat "$AGRPO_OUTCOME") in
        finished* | stuck* | refused*) exit 0 ;;
        *) requeue "the job's script has died" ;;
    esac
    exit 0
}
trap on_term TERM

while :; do
    sleep 5 &
    wait $!
    if [[ ! -e $attempt/stop || -e $attempt/over ]]; then
        continue
    elif [[ $whom == script ]]; then
        kill -USR1 "$script"
    else
        scancel --signal=USR1 "$job"
    fi
done

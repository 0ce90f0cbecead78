#!/usr/bin/env bash
# Starts the ranks of one node, once per node: node.sh ATTEMPT ARGUMENTS of agrpo...
set -euo pipefail
attempt=$1
shift
# The ranks take these as a wish to stop; what starts them must outlive that. Ignored signals stay
# ignored in what is started, until it says otherwise.
trap '' TERM USR1 USR2
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

is_first=0
((SLURM_NODEID)) || is_first=1
# The signal handlers that either launcher would set by itself end it at a job's SIGTERM.
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT
options=(
    --nnodes="$SLURM_NNODES"
    --nproc-per-node="${AGRPO_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
    --rdzv-backend=c10d
    --rdzv-endpoint="$AGRPO_RENDEZVOUS"
    --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$AGRPO_TRY"
    --rdzv-conf="is_host=$is_first"
    --local-addr="$SLURMD_NODENAME"
    --no-python
)
ranks=(bash "$AGRPO_ROOT/slurm/rank.sh" "$attempt" "$AGRPO_PYTHON" -m agrpo_megatron "$@")
if [[ $AGRPO_LAUNCHER == ft_launcher ]]; then
    options+=(--max-restarts="$AGRPO_RESTARTS")
    if [[ $1 == train ]]; then # whose ranks tell it what they do
        mapfile -t limits < <("$AGRPO_PYTHON" -m agrpo_megatron.resilience.nvrx "${@:2}")
        options+=("${limits[@]}")
    fi
    start='from nvidia_resiliency_ext.fault_tolerance.launcher import main; main()'
    exec "$AGRPO_PYTHON" -c "$start" "${options[@]}" "${ranks[@]}"
fi
# Over several nodes torchrun's own restart can meet addresses of the ranks before: a new start does
# not, and the job's script makes one.
options+=(--max-restarts=0 --signals-to-handle="$TORCHELASTIC_SIGNALS_TO_HANDLE")
exec "$AGRPO_PYTHON" -m torch.distributed.run "${options[@]}" "${ranks[@]}"

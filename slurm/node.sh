#!/usr/bin/env bash
# Starts the ranks of one node, once per node: node.sh ATTEMPT ARGUMENTS of agrpo...
set -euo pipefail
attempt=$1
shift
# The ranks take these signals as a stop request; their launcher must survive them. A child process
# inherits ignored signals until it sets its own handlers.
trap '' TERM USR1 USR2
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

is_first=0
((SLURM_NODEID)) || is_first=1
# By default either launcher handles SIGTERM, and would end at the job's SIGTERM.
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
    if [[ $1 == train ]]; then # its ranks report their sections
        mapfile -t limits < <("$AGRPO_PYTHON" -m agrpo_megatron.resilience.nvrx "${@:2}")
        options+=("${limits[@]}")
    fi
    start='from nvidia_resiliency_ext.fault_tolerance.launcher import main; main()'
    exec "$AGRPO_PYTHON" -c "$start" "${options[@]}" "${ranks[@]}"
fi
# On several nodes, torchrun's own restart can connect to addresses of the ranks before; the job's
# script starts torchrun again instead.
options+=(--max-restarts=0 --signals-to-handle="$TORCHELASTIC_SIGNALS_TO_HANDLE")
exec "$AGRPO_PYTHON" -m torch.distributed.run "${options[@]}" "${ranks[@]}"

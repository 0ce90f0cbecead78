#!/usr/bin/env bash
# Runs on every node before a start: health.sh ATTEMPT. Prints `NODE ok` or `NODE bad REASON`, and
# `NODE warn TEXT` for possible problems.
set -uo pipefail
attempt=$1
node=${SLURMD_NODENAME:-$(hostname -s)}

bad() {
    printf '%s bad %s\n' "$node" "$*"
    exit 0
}

warn() { printf '%s warn %s\n' "$node" "$*"; }

# All nodes must share the run directory. A network file system may show a new file late.
for ((try = 0; try < 100; try++)); do
    [[ ! -s $attempt/canary ]] || break
    sleep 0.2
done
[[ -s $attempt/canary ]] || bad "does not see $attempt: the run directory must be shared by all nodes"
mine=$attempt/canary.$node
{ cp "$attempt/canary" "$mine" && cmp -s "$attempt/canary" "$mine" && rm "$mine"; } 2>/dev/null \
    || bad "cannot write to $attempt"

temporary=${TMPDIR:-/tmp}
free=$(df -Pk "$temporary" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }')
[[ -n $free ]] || bad "has no $temporary"
((free >= AGRPO_HEALTH_DISK)) \
    || bad "has $free MiB free in $temporary, but AGRPO_HEALTH_DISK=$AGRPO_HEALTH_DISK are needed"

output=$("$AGRPO_PYTHON" -c 'import agrpo_megatron' 2>&1) \
    || bad "$AGRPO_PYTHON cannot import agrpo_megatron: ${output##*$'\n'}"

gpus() { # all requested GPUs answer, and no other process uses them
    local wanted=${AGRPO_RANKS_PER_NODE:-$SLURM_GPUS_ON_NODE} answering others
    answering=$(nvidia-smi --query-gpu=index,memory.used,memory.total --format=csv,noheader,nounits) \
        || bad "nvidia-smi failed: ${answering##*$'\n'}"
    (($(wc -l <<<"$answering") >= wanted)) \
        || bad "shows $(wc -l <<<"$answering") GPUs, but $wanted are needed"
    others=$(awk -F', ' '$2 > $3 / 20 { printf " GPU %s (%s MiB)", $1, $2 }' <<<"$answering")
    [[ -z $others ]] || warn "memory is in use before the start:$others"
    others=$(nvidia-smi --query-compute-apps=pid,process_name --format=csv,noheader 2>/dev/null)
    [[ -z $others ]] || warn "other processes compute already: $(tr '\n' ';' <<<"$others")"
}
if ((${SLURM_GPUS_ON_NODE:-0} > 0)) && command -v nvidia-smi >/dev/null; then
    gpus
fi

if [[ -n $AGRPO_HEALTH_COMMAND ]]; then
    output=$(bash -c "$AGRPO_HEALTH_COMMAND" 2>&1) \
        || bad "fails AGRPO_HEALTH_COMMAND: ${output##*$'\n'}"
fi
printf '%s ok\n' "$node"

#!/usr/bin/env bash
# Run on every node before a start: health.sh ATTEMPT. Prints `NODE ok`, or `NODE bad REASON`, and
# `NODE warn TEXT` for what may be wrong.
set -uo pipefail
attempt=$1
node=${SLURMD_NODENAME:-$(hostname -s)}

bad() {
    printf '%s bad %s\n' "$node" "$*"
    exit 0
}

warn() { printf '%s warn %s\n' "$node" "$*"; }

# The run directory must be the same one everywhere. A network file system may show a new file late.
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
    || bad "has $free MiB free in $temporary, and $AGRPO_HEALTH_DISK are needed (AGRPO_HEALTH_DISK)"

said=$("$AGRPO_PYTHON" -c 'import agrpo_megatron' 2>&1) \
    || bad "$AGRPO_PYTHON cannot import agrpo_megatron: ${said##*$'\n'}"

gpus() { # what was asked for answers, and nobody else computes on it
    local wanted=${AGRPO_RANKS_PER_NODE:-$SLURM_GPUS_ON_NODE} answering others
    answering=$(nvidia-smi --query-gpu=index,memory.used,memory.total --format=csv,noheader,nounits) \
        || bad "nvidia-smi failed: ${answering##*$'\n'}"
    (($(wc -l <<<"$answering") >= wanted)) \
        || bad "shows $(wc -l <<<"$answering") GPUs, and $wanted are needed"
    others=$(awk -F', ' '$2 > $3 / 20 { printf " GPU %s (%s MiB)", $1, $2 }' <<<"$answering")
    [[ -z $others ]] || warn "memory is in use before the start:$others"
    others=$(nvidia-smi --query-compute-apps=pid,process_name --format=csv,noheader 2>/dev/null)
    [[ -z $others ]] || warn "computing already: $(tr '\n' ';' <<<"$others")"
}
if ((${SLURM_GPUS_ON_NODE:-0} > 0)) && command -v nvidia-smi >/dev/null; then
    gpus
fi

if [[ -n $AGRPO_HEALTH_COMMAND ]]; then
    said=$(bash -c "$AGRPO_HEALTH_COMMAND" 2>&1) \
        || bad "fails AGRPO_HEALTH_COMMAND: ${said##*$'\n'}"
fi
printf '%s ok\n' "$node"

# shellcheck shell=bash
# Functions of the job scripts. Reads env.sh; `root` is the directory that holds slurm/.
# Each job script calls one of the functions at the end.

: "${root:?}"
# shellcheck source=slurm/env.sh
. "$root/slurm/env.sh"
export AGRPO_ROOT=$root AGRPO_PYTHON

# ARRAY_MEMBER, since the last member of an array has the job number of the array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:?a job script: submit it with sbatch}}
restarts=${SLURM_RESTART_COUNT:-0}
STUCK=93 REFUSED=2

say() { printf 'agrpo: %s\n' "$*"; }

die() { # STATUS TEXT
    say "$2" >&2
    exit "$1"
}

job_fact() { # NAME: one field of this job in SLURM; empty while SLURM does not answer
    local all
    all=$(SLURM_TIME_FORMAT=standard scontrol show job "$job" 2>/dev/null) || return 0
    sed -nE "/(^| )$1=/ { s/^(.* )?$1=([^ ]*).*/\2/p; q }" <<<"$all"
}

absolute() { # PATH, which need not exist
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) printf '%s/%s\n' "$PWD" "$1" ;;
    esac
}

# --- Steps ----------------------------------------------------------------------------------------

container() { # sets `options` of srun, and `inside`: words before a command
    options=(--export=ALL --cpu-bind=none --overlap "${AGRPO_SRUN[@]}")
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    inside=()
    [[ -n $AGRPO_CONTAINER ]] || return 0
    local mounts="$root:$root,$PWD:$PWD" mount
    [[ -z ${AGRPO_RUN_DIR:-} ]] || mounts+=",$AGRPO_RUN_DIR:$AGRPO_RUN_DIR"
    mounts+=${AGRPO_CONTAINER_MOUNTS:+,$AGRPO_CONTAINER_MOUNTS}
    case $AGRPO_CONTAINER_TOOL in
        pyxis)
            options+=(--container-image="$AGRPO_CONTAINER" --container-mounts="$mounts")
            options+=(--container-workdir="$PWD" --no-container-mount-home)
            ;;
        apptainer)
            inside=(apptainer exec --nv --pwd "$PWD")
            while read -r -d , mount; do inside+=(--bind "$mount"); done <<<"$mounts,"
            inside+=("$AGRPO_CONTAINER")
            ;;
        *) die $REFUSED "AGRPO_CONTAINER_TOOL=$AGRPO_CONTAINER_TOOL is neither pyxis nor apptainer" ;;
    esac
}

# Prefix of commands other than the ranks: a stop signal reaches all steps, and would kill these
# commands. The guard handles the signal.
deaf=(bash -c 'trap "" USR1 USR2; exec "$@"' deaf)

on_first_node() { # COMMAND...: run it once, in the environment of the ranks
    srun "${options[@]}" --nodes=1 --ntasks=1 --quiet "${deaf[@]}" "${inside[@]}" "$@"
}

await() { # PID: wait for a process despite signals; returns its status
    local status again
    while :; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if ((status > 128)); then # perhaps of a signal, and the process has ended since
        again=0
        wait "$1" 2>/dev/null || again=$?
        ((again == 127)) || status=$again
    fi
    return "$status"
}

# --- The end of an attempt ------------------------------------------------------------------------

is_over() { # whether a later attempt runs or is queued: this attempt must not interfere
    local now
    now=$(job_fact Restarts)
    [[ -n $now && $now != "$restarts" ]]
}

is_out_of_time() {
    [[ $(job_fact Reason) == TimeLimit ]] \
        || { [[ -n ${AGRPO_JOB_END:-} ]] && (($(date +%s) >= AGRPO_JOB_END)); }
}

is_cancelled() { # waits until SLURM's controller answers
    local state tries
    [[ -n $terminated ]] || return 1
    for ((tries = 0; tries < 20; tries++)); do
        state=$(job_fact JobState)
        [[ -z $state ]] || break
        sleep 5
    done
    # COMPLETING until the job's processes have ended, then CANCELLED.
    [[ -n $state && $state != RUNNING ]] && ! is_out_of_time
}

requeue() { # REASON: requeue the job, unless something forbids that
    if is_over; then
        say "SLURM has already requeued the job"
        exit 0
    fi
    if [[ $(job_fact Requeue) == 0 ]]; then
        say "not requeued, since the job has Requeue=0; the same command resumes the run: $1"
        exit 0
    fi
    if ((restarts >= AGRPO_MAX_REQUEUES)); then
        die $STUCK "not requeued, AGRPO_MAX_REQUEUES=$AGRPO_MAX_REQUEUES is reached: $1"
    fi
    if is_cancelled; then
        say "cancelled; the same command resumes the run"
        exit 0
    fi
    say "requeued: $1"
    local tries
    for ((tries = 0; tries < 20; tries++)); do # SLURM's controller may be restarting
        scontrol requeue "$job" && return
        sleep 5
    done
    die 1 "scontrol requeue failed; submit the job again to resume the run"
}

terminated=
on_term() { # SLURM ends the job: cancelled, requeued by a user, or out of time
    terminated=1
    if ! is_over && is_out_of_time; then
        requeue "out of time"
    fi
}

conclude() { # STATUS of srun: act on the outcome that the ranks reported
    local outcome=
    [[ ! -s $AGRPO_OUTCOME ]] || outcome=$(<"$AGRPO_OUTCOME")
    case $outcome in
        finished*)
            say "finished"
            exit 0
            ;;
        refused*) die $REFUSED "not requeued, the input is wrong: ${outcome#refused }" ;;
        stuck*) die $STUCK "not requeued: ${outcome#stuck }" ;;
        requeue*) requeue "${outcome#requeue }" ;;
        *) requeue "no outcome was reported (srun: $1); $attempt has a log of each rank" ;;
    esac
}

# --- Before the start -----------------------------------------------------------------------------

prepare() { # creates the directory of this attempt below AGRPO_RUN_DIR
    AGRPO_RUN_DIR=$(absolute "$AGRPO_RUN_DIR")
    attempt=$AGRPO_RUN_DIR/launch/$job/attempt-$restarts
    mkdir -p "$attempt" || die $REFUSED "cannot write below $AGRPO_RUN_DIR"
    ln -sfn "attempt-$restarts" "$AGRPO_RUN_DIR/launch/$job/latest"
    export AGRPO_RUN_DIR AGRPO_ATTEMPT=$attempt AGRPO_OUTCOME=$attempt/outcome
    rm -f "$AGRPO_OUTCOME" "$attempt/over" "$attempt/stop"
    printf '%s\n' "$job $restarts" >"$attempt/canary"
    local end
    end=$(job_fact EndTime)
    if [[ $end == [0-9]* ]]; then
        AGRPO_JOB_END=$(date -d "$end" +%s)
        export AGRPO_JOB_END
    fi
    : "${TORCH_FR_DUMP_TEMP_FILE:=$attempt/collectives-}"
    export TORCH_FR_DUMP_TEMP_FILE
    trap on_term TERM
    # Only this script gets the signal; the guard passes it on to the ranks.
    trap 'touch "$attempt/stop"' USR1
    say "job $job, attempt $restarts, on $SLURM_JOB_NODELIST, logs in $attempt"
    container
}

check_nodes() { # exclude nodes that cannot run ranks, and requeue the job without them
    [[ $AGRPO_HEALTH != 0 ]] || return 0
    local found=$attempt/health node verdict reason bad=() nodes
    timeout --kill-after=5 "$((AGRPO_HEALTH_PATIENCE + 15))" \
        srun "${options[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --quiet "${deaf[@]}" \
        "${inside[@]}" timeout "$AGRPO_HEALTH_PATIENCE" bash "$root/slurm/health.sh" "$attempt" \
        >"$found" &
    await $! || true
    if [[ -n $terminated || -e $attempt/stop ]]; then # no verdict on the nodes
        requeue "ended or stopped during the node check"
        exit 0
    fi
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    while read -r node verdict reason; do
        [[ $verdict != warn ]] || say "node $node: $reason"
    done <"$found"
    for node in $nodes; do
        grep -q "^$node ok\$" "$found" && continue
        reason=$(sed -n "s/^$node bad //p" "$found" | head -n 1)
        reason=${reason:-no answer in $AGRPO_HEALTH_PATIENCE seconds}
        say "node $node: $reason"
        printf '%s %s %s %s\n' "$(date -u +%FT%TZ)" "$job" "$node" "$reason" \
            >>"$AGRPO_RUN_DIR/launch/bad_nodes"
        bad+=("$node")
    done
    ((${#bad[@]} == 0)) || exclude_nodes "${bad[@]}"
}

exclude_nodes() { # NODE...: requeue the job without these nodes, and exit
    local excluded most
    if ((SLURM_JOB_NUM_NODES > 1 && $# == SLURM_JOB_NUM_NODES)); then
        die $REFUSED "every node fails the check: the cause is likely not in the nodes"
    fi
    excluded=$(job_fact ExcNodeList)
    [[ $excluded != "(null)" ]] || excluded=
    excluded=$(IFS=,; printf '%s' "${excluded:+$excluded,}$*")
    most=$(comm -23 <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N \
        | sort -u) <(scontrol show hostnames "$excluded" | sort -u) | wc -l)
    if ((most < SLURM_JOB_NUM_NODES)); then
        die $STUCK "without $excluded, partition $SLURM_JOB_PARTITION has too few nodes: $most"
    fi
    requeue "without $excluded"
    local tries
    for ((tries = 0; tries < 40; tries++)); do # only a pending job can be changed
        scontrol update JobId="$job" ExcNodeList="$excluded" 2>/dev/null && exit 0
        sleep 0.25
    done
    die 1 "nodes $excluded could not be excluded"
}

# --- Jobs -----------------------------------------------------------------------------------------

choose_launcher() { # sets AGRPO_LAUNCHER
    if [[ ${AGRPO_LAUNCHER:-auto} == auto ]]; then
        AGRPO_LAUNCHER=$(on_first_node "$AGRPO_PYTHON" -c 'from importlib.util import find_spec
print("ft_launcher" if find_spec("nvidia_resiliency_ext") else "torchrun")') || {
            requeue_if_ended
            die 1 "no launcher could be chosen"
        }
    fi
    export AGRPO_LAUNCHER
}

# The guard is a step that outlives this script, and requeues the job if the script dies.
start_guard() { # WHOM to signal on a stop request: ranks, or script
    srun --overlap --nodes=1 --ntasks=1 --quiet bash "$root/slurm/guard.sh" "$$" "$1" 2>/dev/null &
    guard=$!
    trap end_guard EXIT
}

end_guard() {
    touch "$attempt/over"
    kill "$guard" 2>/dev/null || true
    await "$guard" || true
}

run_ranks() { # ARGUMENTS of agrpo: run it on every node; returns the status of srun
    local status first most tries
    export AGRPO_RESTARTS=${AGRPO_RESTARTS:-3} AGRPO_RENDEZVOUS AGRPO_TRY
    most=$AGRPO_RESTARTS
    [[ $AGRPO_LAUNCHER != ft_launcher ]] || most=0 # it restarts ranks itself
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    for ((tries = 0; ; tries++)); do
        # Below the ephemeral ports; each start has its own port, since ranks on a lost node may
        # still be running.
        AGRPO_RENDEZVOUS=$first:$((20000 + (SLURM_JOB_ID * 61 + restarts * 7 + tries) % 12000))
        AGRPO_TRY=$tries status=0
        srun "${options[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 "${inside[@]}" \
            bash "$root/slurm/node.sh" "$attempt" "$@" &
        await $! || status=$?
        ((status && tries < most)) && is_crashed || return "$status"
        say "no outcome was reported (srun: $status): ranks restart, $((tries + 1)) of $most"
    done
}

is_crashed() { # whether ranks ended without a stop request while the job still runs
    [[ ! -s $AGRPO_OUTCOME && -z $terminated && $(job_fact JobState) == RUNNING ]] && ! is_over
}

train_job() { # FILE [KEY=VALUE ...]
    (($# >= 1)) || die $REFUSED "usage: sbatch [OPTIONS] slurm/train.sbatch FILE [KEY=VALUE ...]"
    local status=0
    container
    if [[ -z ${AGRPO_RUN_DIR:-} ]]; then
        AGRPO_RUN_DIR=$(on_first_node "$AGRPO_PYTHON" -c 'import sys
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
try:
    print(load(Settings, sys.argv[1], sys.argv[2:]).run.dir)
except ValueError as error:
    sys.exit(f"agrpo: error: {error}")' "$@") || die $REFUSED "the settings are wrong"
    fi
    prepare
    start_guard ranks
    check_nodes
    choose_launcher
    export AGRPO_UNATTENDED=1
    run_ranks train "$@" || status=$?
    conclude "$status"
}

sweep_job() { # DIR
    [[ $# == 1 && -n ${SLURM_ARRAY_TASK_ID:-} ]] \
        || die $REFUSED "usage: sbatch --array=0-N [OPTIONS] slurm/sweep.sbatch DIR"
    local words
    AGRPO_RUN_DIR=$(absolute "$1") # mounted into a container
    container
    mapfile -d '' -t words < <(on_first_node "$AGRPO_PYTHON" -m agrpo_megatron.launch \
        "$AGRPO_RUN_DIR" "$SLURM_ARRAY_TASK_ID")
    ((${#words[@]})) || die $REFUSED "$1 has no member $SLURM_ARRAY_TASK_ID"
    unset AGRPO_RUN_DIR # each member sets its own run.dir
    train_job "${words[@]}"
}

evaluate_job() { # TARGET [ARGUMENTS ...]
    (($# >= 1)) || die $REFUSED "usage: sbatch [OPTIONS] slurm/evaluate.sbatch TARGET [...]"
    local status=0
    if [[ -z ${AGRPO_RUN_DIR:-} ]]; then
        AGRPO_RUN_DIR=$PWD # the logs of a run's evaluation are in its run directory
        [[ ! -e $1/config.yaml ]] || AGRPO_RUN_DIR=$1
    fi
    prepare
    # An evaluation saves each finished batch, so it needs no stop signal.
    trap 'requeue "asked to stop, or the time is nearly up"; exit 0' USR1
    start_guard script
    check_nodes
    choose_launcher
    run_ranks evaluate "$@" || status=$?
    ((status == 0)) || requeue_if_ended
    [[ ! -s $AGRPO_OUTCOME ]] || conclude "$status"
    exit "$status"
}

convert_job() { # ARGUMENTS of agrpo convert
    (($# >= 1)) || die $REFUSED "usage: sbatch [OPTIONS] slurm/convert.sbatch to-megatron|to-hf ..."
    local status=0
    : "${AGRPO_RUN_DIR:=${TMPDIR:-/tmp}/agrpo-$UID}" # on one node; no ranks, no rank logs
    prepare
    trap 'requeue "asked to stop, or the time is nearly up"; exit 0' USR1
    start_guard script
    on_first_node "$AGRPO_PYTHON" -m agrpo_megatron convert "$@" &
    await $! || status=$?
    ((status == 0)) || requeue_if_ended
    exit "$status"
}

requeue_if_ended() { # requeue if SLURM ends the job: its work can resume later
    [[ -n $terminated ]] || return 0
    requeue "ended by SLURM"
    exit 0
}

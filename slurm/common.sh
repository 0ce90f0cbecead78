# shellcheck shell=bash
# What the job scripts share. Reads env.sh; `root` is the directory that holds slurm/.
# Each job script calls one of the functions at the end.

: "${root:?}"
# shellcheck source=slurm/env.sh
. "$root/slurm/env.sh"
export AGRPO_ROOT=$root AGRPO_PYTHON

# Members of an array are named so, since the number of its last member is also that of the array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:?a job script: submit it with sbatch}}
restarts=${SLURM_RESTART_COUNT:-0}
STUCK=93 REFUSED=2

say() { printf 'agrpo: %s\n' "$*"; }

die() { # STATUS TEXT
    say "$2" >&2
    exit "$1"
}

job_fact() { # NAME: one value of what SLURM knows of this job; nothing while it does not answer
    local all
    all=$(SLURM_TIME_FORMAT=standard scontrol show job "$job" 2>/dev/null) || return 0
    sed -nE "/(^| )$1=/ { s/^(.* )?$1=([^ ]*).*/\2/p; q }" <<<"$all"
}

absolute() { # PATH, that need not exist
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

# Words before what runs ahead of the ranks, or in their place: a wish to stop that is sent to all
# steps is not for it, and would kill it. The guard hears it.
deaf=(bash -c 'trap "" USR1 USR2; exec "$@"' deaf)

on_first_node() { # COMMAND...: run it where ranks run, once
    srun "${options[@]}" --nodes=1 --ntasks=1 --quiet "${deaf[@]}" "${inside[@]}" "$@"
}

await() { # PID: wait for a process, through signals; returns its status
    local status again
    while :; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || break
    done
    if ((status > 128)); then # perhaps that of a signal, and the process has ended since
        again=0
        wait "$1" 2>/dev/null || again=$?
        ((again == 127)) || status=$again
    fi
    return "$status"
}

# --- The end of an attempt ------------------------------------------------------------------------

is_over() { # says whether a later attempt has begun, or is queued: this one must not interfere
    local now
    now=$(job_fact Restarts)
    [[ -n $now && $now != "$restarts" ]]
}

is_out_of_time() {
    [[ $(job_fact Reason) == TimeLimit ]] \
        || { [[ -n ${AGRPO_JOB_END:-} ]] && (($(date +%s) >= AGRPO_JOB_END)); }
}

is_cancelled() { # waits for SLURM's controller, whose silence says nothing
    local state tries
    [[ -n $terminated ]] || return 1
    for ((tries = 0; tries < 20; tries++)); do
        state=$(job_fact JobState)
        [[ -z $state ]] || break
        sleep 5
    done
    # COMPLETING until the job's processes have ended, and CANCELLED only then.
    [[ -n $state && $state != RUNNING ]] && ! is_out_of_time
}

queue_again() { # REASON: put the job back into the queue, as far as it may be
    if is_over; then
        say "SLURM has queued the job again already"
        exit 0
    fi
    if [[ $(job_fact Requeue) == 0 ]]; then
        say "not queued again, as the job was told (Requeue=0); the same command goes on: $1"
        exit 0
    fi
    if ((restarts >= AGRPO_MAX_REQUEUES)); then
        die $STUCK "not queued again, AGRPO_MAX_REQUEUES=$AGRPO_MAX_REQUEUES is reached: $1"
    fi
    if is_cancelled; then
        say "cancelled; the same command goes on"
        exit 0
    fi
    say "queued again: $1"
    local tries
    for ((tries = 0; tries < 20; tries++)); do # SLURM's controller may be starting anew
        scontrol requeue "$job" && return
        sleep 5
    done
    die 1 "scontrol requeue failed; submit the job again to go on"
}

terminated=
on_term() { # the job is being ended: cancelled, queued again from outside, or out of time
    terminated=1
    if ! is_over && is_out_of_time; then
        queue_again "out of time"
    fi
}

conclude() { # STATUS of srun: do what the ranks asked for
    local outcome=
    [[ ! -s $AGRPO_OUTCOME ]] || outcome=$(<"$AGRPO_OUTCOME")
    case $outcome in
        finished*)
            say "finished"
            exit 0
            ;;
        refused*) die $REFUSED "not queued again, the input is wrong: ${outcome#refused }" ;;
        stuck*) die $STUCK "not queued again: ${outcome#stuck }" ;;
        requeue*) queue_again "${outcome#requeue }" ;;
        *) queue_again "ended without a word (srun: $1); $attempt has a log of each rank" ;;
    esac
}

# --- Before the start -----------------------------------------------------------------------------

prepare() { # sets and makes the directory of this attempt; AGRPO_RUN_DIR is set
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
    # A signal for this script alone: the ranks have to hear it, and the guard tells them.
    trap 'touch "$attempt/stop"' USR1
    say "job $job, attempt $restarts, on $SLURM_JOB_NODELIST, logs in $attempt"
    container
}

check_nodes() { # leave out nodes that cannot run ranks, and queue the job again without them
    [[ $AGRPO_HEALTH != 0 ]] || return 0
    local found=$attempt/health node verdict reason bad=() nodes
    timeout --kill-after=5 "$((AGRPO_HEALTH_PATIENCE + 15))" \
        srun "${options[@]}" --ntasks-per-node=1 --kill-on-bad-exit=0 --quiet "${deaf[@]}" \
        "${inside[@]}" timeout "$AGRPO_HEALTH_PATIENCE" bash "$root/slurm/health.sh" "$attempt" \
        >"$found" &
    await $! || true
    if [[ -n $terminated || -e $attempt/stop ]]; then # which says nothing of the nodes
        queue_again "ended or stopped while nodes were checked"
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
    ((${#bad[@]} == 0)) || leave_out "${bad[@]}"
}

leave_out() { # NODE...: queue the job again without these nodes, and end
    local excluded most
    if ((SLURM_JOB_NUM_NODES > 1 && $# == SLURM_JOB_NUM_NODES)); then
        die $REFUSED "no node can run this job: that is not for the nodes to mend"
    fi
    excluded=$(job_fact ExcNodeList)
    [[ $excluded != "(null)" ]] || excluded=
    excluded=$(IFS=,; printf '%s' "${excluded:+$excluded,}$*")
    most=$(comm -23 <(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N \
        | sort -u) <(scontrol show hostnames "$excluded" | sort -u) | wc -l)
    if ((most < SLURM_JOB_NUM_NODES)); then
        die $STUCK "without $excluded, partition $SLURM_JOB_PARTITION has too few nodes: $most"
    fi
    queue_again "without $excluded"
    local tries
    for ((tries = 0; tries < 40; tries++)); do # only a job that waits can be changed
        scontrol update JobId="$job" ExcNodeList="$excluded" 2>/dev/null && exit 0
        sleep 0.25
    done
    die 1 "nodes $excluded could not be left out"
}

# --- Jobs -----------------------------------------------------------------------------------------

choose_launcher() { # sets AGRPO_LAUNCHER
    if [[ ${AGRPO_LAUNCHER:-auto} == auto ]]; then
        AGRPO_LAUNCHER=$(on_first_node "$AGRPO_PYTHON" -c 'from importlib.util import find_spec
print("ft_launcher" if find_spec("nvidia_resiliency_ext") else "torchrun")') || {
            queue_if_ended
            die 1 "no launcher could be chosen"
        }
    fi
    export AGRPO_LAUNCHER
}

# A step that outlives this script, and puts the job back into the queue then.
start_guard() { # WHOM a wish to stop is passed on to: ranks, or script
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
    [[ $AGRPO_LAUNCHER != ft_launcher ]] || most=0 # it starts ranks anew by itself
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    for ((tries = 0; ; tries++)); do
        # Below the ports that are handed out for connections; each start has its own, since ranks
        # of a node that was given up may still be running.
        AGRPO_RENDEZVOUS=$first:$((20000 + (SLURM_JOB_ID * 61 + restarts * 7 + tries) % 12000))
        AGRPO_TRY=$tries status=0
        srun "${options[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1 "${inside[@]}" \
            bash "$root/slurm/node.sh" "$attempt" "$@" &
        await $! || status=$?
        ((status && tries < most)) && is_crashed || return "$status"
        say "ended without a word (srun: $status): ranks are started anew, $((tries + 1)) of $most"
    done
}

is_crashed() { # says whether ranks ended, though nobody asked, and the job goes on
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
    unset AGRPO_RUN_DIR # each member has its own, as its settings say
    train_job "${words[@]}"
}

evaluate_job() { # TARGET [ARGUMENTS ...]
    (($# >= 1)) || die $REFUSED "usage: sbatch [OPTIONS] slurm/evaluate.sbatch TARGET [...]"
    local status=0
    if [[ -z ${AGRPO_RUN_DIR:-} ]]; then
        AGRPO_RUN_DIR=$PWD # logs of an evaluation of a run are with the run
        [[ ! -e $1/config.yaml ]] || AGRPO_RUN_DIR=$1
    fi
    prepare
    # An evaluation keeps what is done at any moment: it need not be asked to stop.
    trap 'queue_again "asked to stop, or the time is nearly up"; exit 0' USR1
    start_guard script
    check_nodes
    choose_launcher
    run_ranks evaluate "$@" || status=$?
    ((status == 0)) || queue_if_ended
    [[ ! -s $AGRPO_OUTCOME ]] || conclude "$status"
    exit "$status"
}

convert_job() { # ARGUMENTS of agrpo convert
    (($# >= 1)) || die $REFUSED "usage: sbatch [OPTIONS] slurm/convert.sbatch to-megatron|to-hf ..."
    local status=0
    : "${AGRPO_RUN_DIR:=${TMPDIR:-/tmp}/agrpo-$UID}" # notes of one node; no ranks, no logs of them
    prepare
    trap 'queue_again "asked to stop, or the time is nearly up"; exit 0' USR1
    start_guard script
    on_first_node "$AGRPO_PYTHON" -m agrpo_megatron convert "$@" &
    await $! || status=$?
    ((status == 0)) || queue_if_ended
    exit "$status"
}

queue_if_ended() { # the job is being ended from outside, and what it does can go on later
    [[ -n $terminated ]] || return 0
    queue_again "ended from outside"
    exit 0
}

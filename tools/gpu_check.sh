#!/usr/bin/env bash
# Verify this working tree on one GPU, in under 8 minutes: install what the machine lacks from
# wheels, time rollouts and updates at LLaDA-8B's layer shapes, run the tests that need a GPU, and
# write one JSON file and one table. Needs no network.
#
#   tools/gpu_check.sh [--wheels DIR] [--out DIR] [--commit TEXT]
#   tools/gpu_check.sh --collect [--wheels DIR]      with network: fetch the wheels that are missing
#   tools/gpu_check.sh --rehearse [--wheels DIR] [--out DIR]     without a GPU: the same code, tiny
#
# DIR of wheels is .gpu/wheels, which git ignores: Transformer Engine's wheels, and those that
# --collect fetches. Without it, what is installed is used. What is missing is listed with the
# command that gets it. DIR of results is gpu_check: it gets gpu_check.json, gpu_check.md,
# gpu_check.log, tests.log and tests.jsonl. PYTHON names a Python with torch; otherwise python3,
# then .venv/bin/python.
#
# Exit status, of these the first that applies:
#   2  it could not start: a wrong argument, no GPU, or a package is missing
#   1  wrong: a test or a measurement failed, or rollout and training differ by too much
#   4  not reached: nothing is wrong, but the time was too short for something, or a target could
#      not be measured here, for instance without Transformer Engine
#   3  slow: everything ran and is right, and only a target of speed is missed
#   0  everything ran, is right, and is fast enough
# gpu_check.md begins with the status and its reasons.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOTAL=470         # seconds for everything
TESTS=150         # of them, at most, for the tests; the rest is for the timing, which comes first
CLOSING=5         # of them, for the table
LEAST=20          # pytest is not started with less
STARTS=4          # of pytest: a test that takes its process down does not take the others along

name=gpu_check
command="tools/gpu_check.sh $*"
# shellcheck source=tools/gpu_setup.sh
. tools/gpu_setup.sh

# Run the tests; tests.jsonl has one line for each as it begins, and as it ends.
run_tests() {
  local start limit status deadline=$((SECONDS + TESTS))
  ((deadline < TOTAL - CLOSING)) || deadline=$((TOTAL - CLOSING))
  export AGRPO_GPU_RESULTS="$out/tests.jsonl"
  for ((start = 1; start <= STARTS; start++)); do
    limit=$((deadline - SECONDS))
    ((limit >= LEAST)) || break
    status=0
    timeout --kill-after=5 "$limit" "$python" -m pytest -q -rs -m gpu -p no:cacheprovider tests/gpu \
      2>&1 | tee -a "$out/tests.log" || status=$?
    if ((SECONDS >= deadline)); then
      echo '{"event": "cut"}' >>"$AGRPO_GPU_RESULTS"
      break
    fi
    # 0: passed; 1: some failed; 5: all ran before; 2, 4: interrupted, or they do not even load.
    # Others, such as a lost context of the GPU (3, tests/gpu/conftest.py): go on after that test.
    case $status in
      0 | 1 | 5) break ;;
      2 | 4)
        echo "{\"event\": \"broken\", \"status\": $status}" >>"$AGRPO_GPU_RESULTS"
        break
        ;;
    esac
  done
}

read_arguments "$@"
if [ -n "$collect" ]; then
  collect_wheels
  exit 0
fi
set_up
rm -f "$out"/tests.{log,jsonl}
extra=()
if [ -n "$rehearse" ]; then
  export AGRPO_REHEARSE_GPU=1
  extra=(--rehearse)
  TOTAL=5400 TESTS=3600 # a CPU takes its time, and it measures nothing
fi

"$python" tools/gpu_check.py --out "$out" --seconds "$((TOTAL - SECONDS - TESTS - CLOSING))" \
  --commit "$commit" --command "$command" "${extra[@]}" >/dev/null ||
  fail "the timing did not start; see above"
run_tests
status=0
"$python" tools/gpu_check.py --out "$out" --suite "$out/tests.jsonl" || status=$?
echo "$name: $SECONDS s; exit status $status; $out/gpu_check.json, $out/gpu_check.md"
exit "$status"

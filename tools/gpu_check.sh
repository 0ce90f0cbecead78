#!/usr/bin/env bash
# Verify this working tree on one GPU, in under 8 minutes: install what the machine lacks from
# wheels, run the tests that need a GPU, time rollouts and updates at LLaDA-8B's layer shapes, and
# write one JSON file and one table. Needs no network.
#
#   tools/gpu_check.sh [--wheels DIR] [--out DIR] [--commit TEXT]
#   tools/gpu_check.sh --collect [--wheels DIR]      with network: fetch the wheels that are missing
#   tools/gpu_check.sh --rehearse [--wheels DIR] [--out DIR]     without a GPU: the same code, tiny
#
# DIR of wheels is .gpu/wheels, which git ignores: Transformer Engine's wheels, and those that
# --collect fetches. Without it, what is installed is used. DIR of results is gpu_check: it gets
# gpu_check.json, gpu_check.md, gpu_check.log, tests.log and tests.jsonl. PYTHON names a Python with
# torch; otherwise python3, then .venv/bin/python.
#
# Exit status: 0 all tests passed; 1 a test failed or was not reached; 2 it could not start.
# Speed decides nothing: targets are told as met or missed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOTAL=470         # seconds for everything
TESTS=215         # of them, at most, for the tests
LEAST=20          # a stage with less than this is left out
STARTS=4          # of pytest: a test that takes its process down does not take the others along
# What a machine with torch, transformers and pytest lacks beside them; pinned in constraints.txt.
NEEDED=(megatron-core)

wheels=.gpu/wheels given='' out=gpu_check commit='' collect='' rehearse=''
command="tools/gpu_check.sh $*"

fail() {
  echo "gpu_check: error: $1" >&2
  exit 2
}

usage() {
  sed -n '2,/^set -/s/^# \{0,1\}//p' tools/gpu_check.sh
}

# Leave in `python` a Python that has torch.
find_python() {
  for python in "${PYTHON:-}" python3 .venv/bin/python; do
    [ -n "$python" ] || continue
    if "$python" -c 'import torch' 2>/dev/null; then
      return
    fi
  done
  fail "no Python with torch: set PYTHON=/path/to/python"
}

# Fetch what is missing, for Python 3.12 on x86-64, and note which commit the tree is at.
collect_wheels() {
  mkdir -p "$wheels"
  local name pin
  for name in "${NEEDED[@]}"; do
    pin=$(grep -E "^${name}==" constraints.txt) || fail "constraints.txt does not pin $name"
    if compgen -G "$wheels/${name//-/_}-*.whl" >/dev/null; then
      continue
    fi
    python3 -m pip download --quiet --disable-pip-version-check --no-deps \
      --only-binary=:all: --python-version 3.12 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 --platform any --dest "$wheels" "$pin"
  done
  git describe --always --dirty --abbrev=40 >"$(dirname "$wheels")/commit"
  du -ch "$wheels"/*.whl
  compgen -G "$wheels/transformer_engine_torch-*.whl" >/dev/null ||
    echo "gpu_check: Transformer Engine's wheels are not in $wheels: put them there" >&2
}

# Install the wheels into a folder that only this check sees.
install_wheels() {
  compgen -G "$wheels/*.whl" >/dev/null || return 0
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl ||
    fail "the wheels in $wheels do not install; see above"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
  if [ -d /usr/local/cuda/include ]; then
    export NVTE_CUDA_INCLUDE_DIR="${NVTE_CUDA_INCLUDE_DIR:-/usr/local/cuda/include}"
  fi
}

left() {
  echo $((TOTAL - SECONDS))
}

# Run the tests; tests.jsonl has one line for each as it begins, and as it ends.
run_tests() {
  local start limit status
  export AGRPO_GPU_RESULTS="$out/tests.jsonl"
  for ((start = 1; start <= STARTS; start++)); do
    limit=$((TESTS - SECONDS))
    ((limit >= LEAST)) || break
    status=0
    timeout --kill-after=5 "$limit" "$python" -m pytest -q -rs -m gpu -p no:cacheprovider tests/gpu \
      2>&1 | tee -a "$out/tests.log" || status=$?
    # 0: passed; 1: some failed; 2, 4: interrupted, or they do not even load; 5: all ran before.
    # Others, such as a lost context of the GPU (3, tests/gpu/conftest.py): go on after that test.
    case $status in
      0 | 1 | 2 | 4 | 5) break ;;
    esac
  done
}

while (($#)); do
  case $1 in
    --wheels) wheels=${2:?--wheels wants a folder} given=1 && shift 2 ;;
    --out) out=${2:?--out wants a folder} && shift 2 ;;
    --commit) commit=${2:?--commit wants a text} && shift 2 ;;
    --collect) collect=1 && shift ;;
    --rehearse) rehearse=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail "unknown argument $1; see tools/gpu_check.sh --help" ;;
  esac
done

if [ -n "$collect" ]; then
  collect_wheels
  exit 0
fi

find_python
mkdir -p "$out"
out=$(realpath "$out")
rm -f "$out"/{gpu_check.json,gpu_check.md,gpu_check.log,tests.log,tests.jsonl}
extra=()
if [ -n "$rehearse" ]; then
  export AGRPO_REHEARSE_GPU=1
  extra=(--rehearse)
  [ -z "$given" ] || install_wheels # those of .gpu/wheels may be for another torch
else
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
    fail "nvidia-smi finds no GPU; --rehearse runs the same code on a CPU"
  install_wheels
  "$python" -c 'import torch; assert torch.cuda.is_available()' ||
    fail "torch sees no GPU: $("$python" -c 'import torch; print(torch.__version__)')"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

run_tests
"$python" tools/gpu_check.py --out "$out" --seconds "$(left)" --suite "$out/tests.jsonl" \
  --commit "$commit" --command "$command" "${extra[@]}" || echo "gpu_check: the timing failed" >&2
echo "gpu_check: $SECONDS s; $out/gpu_check.json, $out/gpu_check.md"
"$python" - "$out/gpu_check.json" <<'END'
import json
import sys

suite = json.load(open(sys.argv[1]))["suite"]
bad = len(suite["failed"]) + suite.get("not_reached", 0)
sys.exit(0 if suite["ran"] and suite["passed"] and not bad else 1)
END

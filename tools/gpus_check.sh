#!/usr/bin/env bash
# Verify layouts of this working tree on 2 to 8 GPUs of one machine, in under 8 minutes: tensor,
# sequence, pipeline, context and data parallelism over NCCL against one GPU, a checkpoint resumed
# at another layout, the bandwidth of resharding, and how far each layout's sampler and trainer
# are apart. Writes one JSON file and one table. Needs no network. Run tools/gpu_check.sh first.
#
#   tools/gpus_check.sh [--wheels DIR] [--out DIR] [--commit TEXT] [--gpus N]
#   tools/gpus_check.sh --collect [--wheels DIR]     with network: fetch the wheels that are missing
#   tools/gpus_check.sh --rehearse [--wheels DIR] [--out DIR] [--gpus N]
#                                  without a GPU: the same code, tiny, on N CPU ranks (2) over gloo
#
# DIR of wheels is .gpu/wheels, as for tools/gpu_check.sh. DIR of results is gpus_check: it gets
# gpus_check.json, gpus_check.md and gpus_check.log. N is the number of GPUs to use; all of them.
# Layouts that need more are reported as such. PYTHON names a Python with torch; otherwise
# python3, then .venv/bin/python.
#
# Exit status, of these the first that applies:
#   2  it could not start: a wrong argument, fewer than 2 GPUs, or a package is missing
#   1  wrong: a layout failed or hangs, or differs from one GPU, or its sampler from its trainer
#   4  not reached: nothing is wrong, but the time was too short for a layout, or it cannot run here
#   0  every layout that fits on the GPUs ran and is right
# There is no target of speed, so 3 (slow, of tools/gpu_check.sh) does not occur. gpus_check.md
# begins with the status and its reasons.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOTAL=470   # seconds for everything
CLOSING=5   # of them, to end processes

name=gpus_check
command="tools/gpus_check.sh $*"
# shellcheck source=tools/gpu_setup.sh
. tools/gpu_setup.sh

read_arguments "$@"
if [ -n "$collect" ]; then
  collect_wheels
  exit 0
fi
set_up
extra=()
if [ -n "$rehearse" ]; then
  gpus=${gpus:-2} extra=(--rehearse)
  TOTAL=5400 # a CPU takes its time, and it measures nothing
else
  there=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  gpus=${gpus:-$there}
  ((gpus <= there)) || fail "--gpus $gpus: torch sees $there; ask for at most as many"
fi
((gpus >= 2)) || fail "layouts need 2 GPUs or more, here is $gpus; tools/gpu_check.sh checks one"

status=0
"$python" tools/gpus_check.py --out "$out" --gpus "$gpus" --seconds "$((TOTAL - SECONDS - CLOSING))" \
  --commit "$commit" --command "$command" "${extra[@]}" || status=$?
echo "$name: $SECONDS s; exit status $status; $out/gpus_check.json, $out/gpus_check.md"
exit "$status"

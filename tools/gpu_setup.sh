# shellcheck shell=bash disable=SC2034,SC2154 # shared with gpu_check.sh and gpus_check.sh
# Find a Python, install what it lacks from wheels, and read the arguments of both checks.

wheels=.gpu/wheels given='' out='' commit='' collect='' rehearse='' gpus='' python=''

fail() {
  echo "$name: error: $1" >&2
  exit 2
}

# Print the comment at the top of the script.
usage() {
  sed -n '2,/^set -/s/^# \{0,1\}//p' "tools/$name.sh"
}

# Read the arguments of either check.
read_arguments() {
  while (($#)); do
    case $1 in
      --collect) collect=1 ;;
      --rehearse) rehearse=1 ;;
      -h | --help) usage && exit 0 ;;
      *)
        (($# >= 2)) || fail "unknown argument $1, or its value is missing; see tools/$name.sh --help"
        read_option "$1" "$2"
        shift
        ;;
    esac
    shift
  done
}

read_option() {
  case $name$1 in
    *_check--wheels) wheels=$2 given=1 ;;
    *_check--out) out=$2 ;;
    *_check--commit) commit=$2 ;;
    gpus_check--gpus)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--gpus $2 is not a number"
      gpus=$2
      ;;
    *) fail "unknown argument $1; see tools/$name.sh --help" ;;
  esac
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
  local pin
  for pin in $(python3 tools/gpu_needs.py --collect "$wheels"); do
    python3 -m pip download --quiet --disable-pip-version-check --no-deps \
      --only-binary=:all: --python-version 3.12 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 --platform any --dest "$wheels" "$pin"
  done
  git describe --always --dirty --abbrev=40 >"$(dirname "$wheels")/commit"
  du -ch "$wheels"/*.whl
  compgen -G "$wheels/transformer_engine_torch-*.whl" >/dev/null ||
    python3 tools/gpu_needs.py --te "$wheels" >&2
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

# Prepare a check: a Python with everything, a GPU or a rehearsal, and an empty folder of results.
set_up() {
  find_python
  out=${out:-$name}
  mkdir -p "$out"
  out=$(realpath "$out")
  rm -f "$out/$name".{json,md,log}
  if [ -z "$rehearse" ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ||
      fail "nvidia-smi finds no GPU; --rehearse runs the same code on a CPU"
    install_wheels
  elif [ -n "$given" ]; then
    install_wheels # those of .gpu/wheels may be for another torch
  fi
  "$python" tools/gpu_needs.py "$name" "$wheels" || exit 2
  if [ -z "$rehearse" ]; then
    "$python" -c 'import torch; assert torch.cuda.is_available()' ||
      fail "torch sees no GPU: $("$python" -c 'import torch; print(torch.__version__)')"
  fi
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
}

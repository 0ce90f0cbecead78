# shellcheck shell=bash disable=SC2034,SC2154 # shared with the script that reads this
# The only file that a site edits. Every job script reads it on the job's first node; its exports
# reach every rank. `: "${X:=value}"` keeps an earlier value, so each value can also be set in the
# environment: AGRPO_CONTAINER=image.sqsh agrpo launch ...

# --- Software -------------------------------------------------------------------------------------
# Modules, if the cluster has them. A module may touch unset variables: set +u; ...; set -u.
# module load cuda/12.8 nccl/2.27

# The Python with agrpo_megatron installed; `agrpo launch` passes its own Python.
if [[ -z ${AGRPO_PYTHON:-} ]]; then
    AGRPO_PYTHON=python3
    [[ ! -x $root/.venv/bin/python ]] || AGRPO_PYTHON=$root/.venv/bin/python
fi

# A container for every rank: an image as `srun --container-image` takes it (pyxis), or a file for
# apptainer. Empty: none. AGRPO_CONTAINER_MOUNTS adds mounts, as pyxis writes them:
# /from:/to,/data:/data. The project and the run directory are always mounted.
: "${AGRPO_CONTAINER:=}"
: "${AGRPO_CONTAINER_PYTHON:=python3}" # of the image; replaces AGRPO_PYTHON
[[ -z $AGRPO_CONTAINER ]] || AGRPO_PYTHON=$AGRPO_CONTAINER_PYTHON
: "${AGRPO_CONTAINER_TOOL:=pyxis}" # or apptainer
: "${AGRPO_CONTAINER_MOUNTS:=}"

# Further options of every srun, such as --mpi=pmix or --network=...
AGRPO_SRUN=()

# --- Processes ------------------------------------------------------------------------------------
# `agrpo launch` sets CUDA_DEVICE_MAX_CONNECTIONS=1 for tensor or context parallelism without a
# pipeline, whose messages overlap with computation only then. Not needed from Blackwell on:
# unset CUDA_DEVICE_MAX_CONNECTIONS
# Lengths differ between batches; expandable segments reduce fragmentation of GPU memory.
: "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"
# A crash in native code prints Python's stack.
: "${PYTHONFAULTHANDLER:=1}"
# Output reaches the log even if the process dies.
: "${PYTHONUNBUFFERED:=1}"
# Seconds for ranks to end after another rank failed; without it they cannot save.
: "${PET_SHUTDOWN_TIMEOUT:=10}"
# `run.threads` sets the threads of a rank; OMP_NUM_THREADS would only duplicate it.
export PYTORCH_CUDA_ALLOC_CONF PYTHONFAULTHANDLER PYTHONUNBUFFERED
export PET_SHUTDOWN_TIMEOUT

# Connections and data files are open files: hundreds of ranks need more than the usual 1024.
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

# --- Network --------------------------------------------------------------------------------------
# WARN prints NCCL's fallbacks; INFO also prints the network that it uses.
: "${NCCL_DEBUG:=WARN}"
# A collective that fails ends its process instead of hanging.
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=1}"
# Writes the last collectives of each rank when one hangs: shows which rank is missing.
: "${TORCH_FR_BUFFER_SIZE:=2000}"
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"
export NCCL_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT
# If nodes have several networks, and NCCL uses the wrong one:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# If an older NCCL fails to allocate multicast memory:
# export NCCL_NVLS_ENABLE=0

# --- Without internet -----------------------------------------------------------------------------
# Compute nodes often have none; then a download fails only after minutes.
# export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
# Tokenizers and data sets from a file system that all nodes share:
# export HF_HOME=/shared/huggingface

# --- Checks and bounds ----------------------------------------------------------------------------
# Nodes are checked before each start; 0 disables the check.
: "${AGRPO_HEALTH:=1}"
# Seconds for the check; raise it if a container image must be fetched first.
: "${AGRPO_HEALTH_PATIENCE:=60}"
# Minimum free space of TMPDIR on every node, in MiB.
: "${AGRPO_HEALTH_DISK:=1024}"
# The site's own check, run by bash on every node; if it fails, the node is excluded.
: "${AGRPO_HEALTH_COMMAND:=}"
# Maximum number of requeues of a job.
: "${AGRPO_MAX_REQUEUES:=100}"
export AGRPO_HEALTH_DISK AGRPO_HEALTH_COMMAND

# shellcheck shell=bash disable=SC2034,SC2154 # shared with the script that reads this
# The one file that a site edits. Every job script reads it on the job's first node; what it exports
# reaches every rank. `: "${X:=value}"` keeps what was set before, so that each value can also be
# given from outside: AGRPO_CONTAINER=image.sqsh agrpo launch ...

# --- Software -------------------------------------------------------------------------------------
# Modules, where the cluster has them. A module may touch unset variables: set +u; ...; set -u.
# module load cuda/12.8 nccl/2.27

# The Python that holds agrpo_megatron; `agrpo launch` names its own.
if [[ -z ${AGRPO_PYTHON:-} ]]; then
    AGRPO_PYTHON=python3
    [[ ! -x $root/.venv/bin/python ]] || AGRPO_PYTHON=$root/.venv/bin/python
fi

# A container for every rank: an image as `srun --container-image` takes it (pyxis), or a file for
# apptainer. Empty: none. The project and the run directory are mounted besides what is named here,
# as pyxis writes it: /from:/to,/data:/data
: "${AGRPO_CONTAINER:=}"
: "${AGRPO_CONTAINER_PYTHON:=python3}" # of the image; takes the place of AGRPO_PYTHON
[[ -z $AGRPO_CONTAINER ]] || AGRPO_PYTHON=$AGRPO_CONTAINER_PYTHON
: "${AGRPO_CONTAINER_TOOL:=pyxis}" # or apptainer
: "${AGRPO_CONTAINER_MOUNTS:=}"

# Further options of every srun, such as --mpi=pmix or --network=...
AGRPO_SRUN=()

# --- Processes ------------------------------------------------------------------------------------
# Kernels of one stream keep their order, which overlapped tensor parallelism needs before Blackwell.
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"
# Lengths differ from batch to batch; segments that grow leave fewer gaps in the GPU's memory.
: "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"
# A crash in native code prints Python's stack.
: "${PYTHONFAULTHANDLER:=1}"
# Output is in the log when the process dies.
: "${PYTHONUNBUFFERED:=1}"
# Seconds that ranks get to end after another one failed; nothing can be saved without it.
: "${PET_SHUTDOWN_TIMEOUT:=10}"
# Threads of a rank are `run.threads`; OMP_NUM_THREADS would only be a second place to say it.
export CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_CUDA_ALLOC_CONF PYTHONFAULTHANDLER PYTHONUNBUFFERED
export PET_SHUTDOWN_TIMEOUT

# Connections and data files are open files: hundreds of ranks need more than the usual 1024.
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true

# --- Network --------------------------------------------------------------------------------------
# Says what NCCL falls back to; INFO tells which network it takes.
: "${NCCL_DEBUG:=WARN}"
# A collective that fails ends its process instead of hanging.
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=1}"
# The last collectives of each rank are written down when one hangs: shows which rank is missing.
: "${TORCH_FR_BUFFER_SIZE:=2000}"
: "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"
export NCCL_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT
# Where nodes have several networks, and the wrong one is taken:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# Where an older NCCL fails to allocate multicast memory:
# export NCCL_NVLS_ENABLE=0

# --- Without internet -----------------------------------------------------------------------------
# Compute nodes often have none; then a look-up costs minutes before it fails.
# export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
# Tokenizers and data sets from a file system that all nodes share:
# export HF_HOME=/shared/huggingface

# --- Checks and bounds ----------------------------------------------------------------------------
# Nodes are checked before each start; 0 leaves that out.
: "${AGRPO_HEALTH:=1}"
# Seconds for the check; more where a container's image has to be fetched first.
: "${AGRPO_HEALTH_PATIENCE:=60}"
# MiB that TMPDIR must have free on every node.
: "${AGRPO_HEALTH_DISK:=1024}"
# A command of the site, run by bash on every node; where it fails, the node is left out.
: "${AGRPO_HEALTH_COMMAND:=}"
# Times that a job is queued again at most.
: "${AGRPO_MAX_REQUEUES:=100}"
export AGRPO_HEALTH_DISK AGRPO_HEALTH_COMMAND

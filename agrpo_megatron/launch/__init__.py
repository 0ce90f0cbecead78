"""SLURM jobs: plan a run, check it against the cluster, submit it; also sweeps."""

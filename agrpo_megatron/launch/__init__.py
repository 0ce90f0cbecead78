"""Jobs of a SLURM cluster: what they would run, what the cluster would refuse, sweeps."""

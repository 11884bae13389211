"""Where and how a merge runs: the merge as one call, executors, clusters, SLURM, logs."""

"""A study's workers as batch jobs of a cluster: of SLURM through submitit, of others by a template."""

"""Tools that read logs, run sources, and compile for GPUs that are not here."""

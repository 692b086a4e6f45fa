"""MLflow: the store, the run in it, and what it is told."""

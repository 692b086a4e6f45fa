"""MLflow: the store, the run in it, and what is logged to it."""

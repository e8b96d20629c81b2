"""Models in MLflow: addresses, verified copies, the MLmodel file and promotion."""

"""MLflow plugins: deployment target and run context."""

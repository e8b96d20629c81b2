"""What MLflow finds by entry point."""

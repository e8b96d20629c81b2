"""Entry point of the function: events in, predictions out. Imports neither MLflow nor PyTorch."""

from mlflow_pt_deploy.serving.aws_lambda import handler

__all__ = ["handler"]

"""Micro-batching: requests, queue, admission, execution. Imports neither MLflow nor HTTP."""

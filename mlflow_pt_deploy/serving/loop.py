"""Old name of `uvicorn_loop`, for ``UVICORN_LOOP`` variables that are set already; one release."""

from mlflow_pt_deploy.serving.uvicorn_loop import new_loop

__all__ = ["new_loop"]

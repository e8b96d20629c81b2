"""Whether MLflow's tracking server can be reached, before hours are spent on results for it."""

from __future__ import annotations

import mlflow
from mlflow import MlflowClient

from mlflow_pt_deploy import database
from mlflow_pt_deploy.environment import environment
from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.unexpected import one_line


def check_tracking() -> None:
    """Make sure that results can be written, before hours are spent on them.

    Raises:
        TrackingError: The tracking server does not answer; names it and the cure.
    """
    uri = mlflow.get_tracking_uri()
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    try:
        with environment(**short):
            for store in dict.fromkeys((uri, mlflow.get_registry_uri())):
                database.prepare(store)
            MlflowClient().search_experiments(max_results=1)
    except ModuleNotFoundError as error:  # a database's driver
        raise TrackingError(
            f"the MLflow tracking server {without_password(uri)} needs the Python package "
            f"{error.name}. Install it: pip install {error.name}. Nothing was trained."
        ) from error
    except TrackingError:
        raise
    except Exception as error:  # requests, SQLAlchemy or MLflow, as the scheme has it
        raise _refused(uri, error) from error


def without_password(uri: str) -> str:
    """The address of a tracking store without user and password; a file has none."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.startswith(("sqlite", "file")):
        return uri
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _refused(uri: str, error: Exception) -> TrackingError:
    if uri.startswith(("http:", "https:")):
        return TrackingError(
            f"the MLflow tracking server {without_password(uri)} does not answer "
            f"({type(error).__name__}). Start it, or set MLFLOW_TRACKING_URI; nothing was trained."
        )
    said = one_line(error).replace(uri, without_password(uri))
    return TrackingError(
        f"MLflow's store {without_password(uri)} cannot be used ({said}). Check it, or set "
        "MLFLOW_TRACKING_URI; nothing was trained."
    )

"""Check that the MLflow tracking server is reachable before work starts."""

from __future__ import annotations

import mlflow
from mlflow import MlflowClient

from mlflow_pt_deploy import tracking_database as database
from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.system.environment import environment
from mlflow_pt_deploy.system.unexpected_errors import one_line


def check_tracking() -> None:
    """Check that the tracking server and the registry are usable, with short timeouts.

    Raises:
        TrackingError: The tracking server does not answer; the message names it and the remedy.
    """
    uri = mlflow.get_tracking_uri()
    timeouts = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    try:
        with environment(**timeouts):
            for store in dict.fromkeys((uri, mlflow.get_registry_uri())):
                database.prepare(store)
            MlflowClient().search_experiments(max_results=1)
    except ModuleNotFoundError as error:  # the driver of a database
        raise TrackingError(
            f"the MLflow tracking server {redact_uri(uri)} needs the Python package "
            f"{error.name}. Install it: pip install {error.name}. Nothing was trained."
        ) from error
    except TrackingError:
        raise
    except Exception as error:  # of requests, SQLAlchemy or MLflow, depending on the scheme
        raise _explain(uri, error) from error


def redact_uri(uri: str) -> str:
    """Return the address of a tracking store without user and password."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.startswith(("sqlite", "file")):
        return uri
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _explain(uri: str, error: Exception) -> TrackingError:
    if uri.startswith(("http:", "https:")):
        return TrackingError(
            f"the MLflow tracking server {redact_uri(uri)} does not answer "
            f"({type(error).__name__}). Start it, or set MLFLOW_TRACKING_URI; nothing was trained."
        )
    reason = one_line(error).replace(uri, redact_uri(uri))
    return TrackingError(
        f"MLflow's store {redact_uri(uri)} cannot be used ({reason}). Check it, or set "
        "MLFLOW_TRACKING_URI; nothing was trained."
    )

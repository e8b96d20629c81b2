"""Python imports this in every child process of the tests: it may load the tiny model.

`pt-deploy serve` loads what this package's own loader reads, and nothing else.
"""

from contextlib import suppress

with suppress(ImportError):  # an interpreter of another environment
    from mlflow_pt_deploy.registry import mlmodel

    mlmodel.LOADERS["tiny.serving"] = "tiny.serving"

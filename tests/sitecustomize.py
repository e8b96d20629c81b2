"""Python imports this in every child process of the tests: it may load the tiny model.

`pt-deploy serve` loads what this package's own loader reads, and nothing else. With
``TINY_DEVICE_PROCESS`` workers share models on the CPU too, as they do those on a GPU.
"""

import os
from contextlib import suppress

with suppress(ImportError):  # an interpreter of another environment
    from mlflow_pt_deploy.registry import mlmodel

    mlmodel.LOADERS["tiny.serving"] = "tiny.serving"

if "TINY_DEVICE_PROCESS" in os.environ:
    from mlflow_pt_deploy.serving.device import placement

    placement.needs_device_process = lambda device, workers: workers > 1

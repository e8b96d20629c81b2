"""MLflow run context: tags every run with the machine it ran on.

MLflow imports this module at the start of each run, so it imports nothing heavy.
"""

from __future__ import annotations

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlflow_pt_deploy.system.hardware import hardware_tags


class HardwareContext(RunContextProvider):
    """Run context provider, entry point ``mlflow.run_context_provider``."""

    def in_context(self) -> bool:
        """Always true: a measurement is only comparable on the same machine."""
        return True

    def tags(self) -> dict[str, str]:
        """``hardware.cpu``, ``hardware.cores``, ``hardware.torch``, ..."""
        return hardware_tags()

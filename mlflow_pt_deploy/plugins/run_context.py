"""Tags every run with the machine it ran on, so that figures can be compared.

MLflow imports this at each start of a run, so it imports nothing heavy.
"""

from __future__ import annotations

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlflow_pt_deploy.system.hardware import hardware_tags


class HardwareContext(RunContextProvider):
    """MLflow's run-context provider, entry point ``mlflow.run_context_provider``."""

    def in_context(self) -> bool:
        """Always: where a number was measured is part of the number."""
        return True

    def tags(self) -> dict[str, str]:
        """``hardware.cpu``, ``hardware.cores``, ``hardware.torch``, ..."""
        return hardware_tags()

"""What serves under each name, told by a replica and opened first by one that starts again.

What is named in the registry by then may be what all have refused. Only the parent asks; no route
leads here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from mlflow_pt_deploy.registry.addresses import Address, Served, Target
from mlflow_pt_deploy.serving.heard import SERVED
from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot


def with_served(own: Callable[[str], Answer], slots: Mapping[str, Slot]) -> Callable[[str], Answer]:
    """What `own` answers to a path, and to `SERVED` what serves in each slot that is not empty.

    Its status is that of ``/livez``.
    """

    def tell(path: str) -> Answer:
        if path != SERVED:
            return own(path)
        versions = {name: slot.current for name, slot in slots.items()}
        told = {
            name: {"target": asdict(version.target), "address": asdict(version.address)}
            for name, version in versions.items()
            if version
        }
        return Answer(own("/livez").status, json.dumps(told).encode())

    return tell


def read_served(told: Mapping[str, Any]) -> dict[str, Served]:
    """What was told, by the names of the slots."""
    return {
        name: Served(Target(**each["target"]), Address(**each["address"]))
        for name, each in told.items()
    }

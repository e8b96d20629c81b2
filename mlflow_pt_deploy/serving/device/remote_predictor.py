"""A `Predict` whose model is in the memory of device processes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from mlflow_pt_deploy.errors import DeviceLostError
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.serving.device.device_link import DeviceLink

CALLS_PER_DEVICE = 3
"""Batches of a worker in flight for each device: two in computation, one that waits."""


class RemotePredictor:
    """Sends each batch to the device with the fewest rows in flight.

    Args:
        links: One for each device; they are open, and closed with the last reference to this.

    Attributes:
        pads: See `pads_rows`.
        remote_calls: See `runtimes.base.remote_calls`.
    """

    def __init__(self, links: Sequence[DeviceLink]) -> None:
        self._links = tuple(links)
        self._lock = threading.Lock()
        self.pads = any(link.pads for link in links)
        self.remote_calls = CALLS_PER_DEVICE * len(links)
        weakref.finalize(self, close_all, self._links)

    @property
    def ready(self) -> bool:
        """Whether at least one device has the model."""
        return any(link.ready for link in self._links)

    def __call__(self, inputs: Inputs) -> Logits:
        rows = len(next(iter(inputs.values())))
        with self._lock:
            link = least_busy(self._links)
            link.rows += rows
        try:
            return link.predict(inputs)
        finally:
            with self._lock:
                link.rows -= rows

    def warm_up_buckets(self, max_rows: int, max_tokens: int, longest: int) -> None:
        """Let each model prepare itself for batches of up to these sizes, if it can."""
        for link in self._links:
            link.warm_up([max_rows, max_tokens, longest])

    def status(self) -> list[dict[str, Any]]:
        """Its part of ``/model``."""
        return [link.status() for link in self._links]


def least_busy(links: Sequence[DeviceLink]) -> DeviceLink:
    """The link that is ready and has the fewest rows in flight.

    Raises:
        DeviceLostError: None is ready.
    """
    ready = [link for link in links if link.ready]
    if not ready:
        raise DeviceLostError(f"{links[0].problem}; retry later")
    return min(ready, key=lambda link: link.rows)


def close_all(links: Sequence[DeviceLink]) -> None:
    """Close the links; their processes free the model."""
    for link in links:
        link.close()

"""One version of a model in memory: loaded, checked and warmed up, with its status."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.errors import DeviceMemoryError
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion, logged_metrics
from mlflow_pt_deploy.registry.fetch import Fetched, fetch, fetch_mlmodel
from mlflow_pt_deploy.runtimes.base import remote_calls
from mlflow_pt_deploy.runtimes.device_memory import DeviceMemory, memory_of, was_out_of_memory
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc
from mlflow_pt_deploy.system.background import at_low_priority
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.hardware import library_versions

_logger = logging.getLogger(__name__)

_OBSERVED = 2048


class LoadedModel:
    """A model version that is ready to serve.

    Args:
        pyfunc: The loaded variant.
        resolved: The version, resolved from a URI.
        spec: The specification it was loaded for.
        tags: Its tags in the registry.

    Attributes:
        label: Version number in the registry, or the first 12 digits of the digest.
        seconds: Durations of the last responses.
        tags: Tags in the registry when it was loaded.
        root: Its files, as they were fetched; None if it was not fetched.
        copied_at: When the local copy was made that it was loaded from; empty: it was fetched.
    """

    def __init__(
        self,
        pyfunc: PtDeployPyFunc,
        resolved: ResolvedVersion,
        spec: ModelSpec | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        self.pyfunc = pyfunc
        self.resolved = resolved
        self.spec = spec or ModelSpec(resolved.uri)
        self.label = resolved.version or pyfunc.loaded.manifest.digest[:12]
        self.since = now()
        self.seconds: deque[float] = deque(maxlen=_OBSERVED)
        self.tags = tags or {}
        self.root: Path | None = None
        self.copied_at = ""

    @property
    def name(self) -> str:
        """The variant's name, e.g. ``student-openvino-fp32``."""
        return self.pyfunc.loaded.manifest.name

    @property
    def device_memory(self) -> DeviceMemory | None:
        """How its calls fared in the memory of a device; None on the CPU."""
        return memory_of(self.pyfunc.loaded.predict)

    def matches(self, resolved: ResolvedVersion, spec: ModelSpec) -> bool:
        """Whether this is the version and configuration given."""
        return self.resolved == resolved and self.spec.model_config == spec.model_config

    def compare_libraries(self) -> None:
        """Log libraries whose versions differ from those that the model was exported with."""
        then, here = self.pyfunc.loaded.running.libraries, library_versions()
        different = [
            f"{name} {then[name]} (here {here[name]})"
            for name in sorted(then.keys() & here.keys())
            if then[name] != here[name]
        ]
        if different:
            _logger.warning("%s was exported with %s", self.name, ", ".join(different))

    def status(self) -> dict[str, Any]:
        """Its part of ``/model``; times in milliseconds."""
        manifest, memory = self.pyfunc.loaded.manifest, self.device_memory
        facts = {key: getattr(manifest, key) for key in ("name", "digest", "runtime", "precision")}
        return facts | {
            "device": self.pyfunc.loaded.device,
            "registered_model": self.resolved.name,
            "version": self.label,
            "since": self.since,
            "model_config": dict(self.spec.model_config),
            "logged": logged_metrics(self.tags),
            "observed": _percentiles(list(self.seconds)),
            "served_from_copy": self.copied_at or None,
            "device_processes": self._device_processes(),
            "device_memory": memory._asdict() if memory else None,
            "cache": self.pyfunc.service.cache.status() if self.pyfunc.service.cache else None,
        }

    def _device_processes(self) -> list[dict[str, Any]] | None:
        """Where the model is loaded, if that is not this process."""
        predict: Any = self.pyfunc.loaded.predict
        return predict.status() if remote_calls(predict) else None


def load_version(
    resolved: ResolvedVersion,
    spec: ModelSpec,
    fetch: Callable[[ResolvedVersion, Path], Fetched] = fetch,
) -> LoadedModel:
    """Load a version, check it and warm it up; an error leaves no files.

    The MLmodel file and the digest of the promotion are checked before the model is loaded; the
    flavor checks the digests of the files and the golden rows.

    Args:
        resolved: The version.
        spec: The specification it is loaded for.
        fetch: Puts its files into a private folder and verifies them.

    Raises:
        PtDeployError: The model is damaged, its predictions differ from those at export, its digest
            is not trusted, or it cannot run here.
        DeviceMemoryError: The device has no memory for it.
        MlflowException: It cannot be fetched.
    """
    folder = tempfile.mkdtemp(prefix="pt-deploy-serve-")
    try:
        fetched = at_low_priority(partial(fetch, resolved, Path(folder)))
        pyfunc = fetched.load(spec.model_config)
        version = LoadedModel(pyfunc, resolved, spec, dict(fetched.tags))
        version.root = fetched.root
        version.compare_libraries()
        version.pyfunc.warm_up()
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if was_out_of_memory(error) and not isinstance(error, DeviceMemoryError):
            raise DeviceMemoryError(
                f"version {resolved.version or resolved.uri} needs more memory for its warm-up "
                "than is free on the device; free some, or choose a smaller variant"
            ) from error
        raise
    weakref.finalize(version, shutil.rmtree, folder, ignore_errors=True)
    weakref.finalize(version, pyfunc.service.batcher.release)
    return version


def check_exists(resolved: ResolvedVersion) -> None:
    """Fetch and check the MLmodel file of a version, without its other files.

    Raises:
        PtDeployError: It is damaged or needs code.
        MlflowException: It does not exist.
    """
    with tempfile.TemporaryDirectory(prefix="pt-deploy-serve-") as folder:
        fetch_mlmodel(resolved.uri, Path(folder))


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {"answers": 0}
    p50, p95, p99 = (np.percentile(seconds, [50, 95, 99]) * 1000).round(3).tolist()
    return {
        "answers": len(seconds),
        "latency_p50_ms": p50,
        "latency_p95_ms": p95,
        "latency_p99_ms": p99,
    }

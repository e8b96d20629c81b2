"""One version of a model in memory: loaded, checked, warmed up, and described.

Does not know when it is loaded, nor what becomes of the version before it.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.hardware import library_versions
from mlflow_pt_deploy.serving.fetch import fetch, fetch_mlmodel
from mlflow_pt_deploy.serving.pyfunc import PyFunc
from mlflow_pt_deploy.serving.registry import Address, Target

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

_logger = logging.getLogger(__name__)

_OBSERVED = 2048
_LOGGED = ("accuracy", "latency_p50_ms", "speedup")


class Version:
    """A model that is ready to answer.

    Args:
        model: A pyfunc of the `pt_deploy` flavor.
        address: Where it came from.
        target: What was asked for.
        tags: What the registry says of it.

    Attributes:
        label: Its number in the registry, else the first 12 digits of its digest.
        header: The response header that names it.
        seconds: How long the last answers took.

    Raises:
        ModelError: The model is of another flavor.
    """

    def __init__(
        self,
        model: PyFuncModel,
        address: Address,
        target: Target | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        inner = model._model_impl
        if not isinstance(inner, PyFunc):
            raise ModelError(
                "this model is not of the pt_deploy flavor. Serve it with mlflow models serve, or "
                "build one with pt-deploy optimize."
            )
        self.pyfunc = inner
        self.address = address
        self.target = target or Target(address.uri)
        self.inputs = model.metadata.signature and model.metadata.signature.inputs
        self.label = address.version or inner.loaded.manifest.digest[:12]
        self.header = (b"x-model-version", self.label.encode())
        self.since = now()
        self.seconds: deque[float] = deque(maxlen=_OBSERVED)
        self._tags = tags or {}

    @property
    def name(self) -> str:
        """The variant's name, e.g. ``student-openvino-fp32``."""
        return self.pyfunc.loaded.manifest.name

    def serves(self, address: Address, target: Target) -> bool:
        """Whether this is what is wanted."""
        return self.address == address and self.target.model_config == target.model_config

    def compare_libraries(self) -> None:
        """Say in the log which libraries are not those that the model was exported with."""
        then, here = self.pyfunc.loaded.manifest.libraries, library_versions()
        odd = [
            f"{name} {then[name]} (here {here[name]})"
            for name in sorted(then.keys() & here.keys())
            if then[name] != here[name]
        ]
        if odd:
            _logger.warning("%s was exported with %s", self.name, ", ".join(odd))

    def about(self) -> dict[str, Any]:
        """What ``/model`` says of it; times in milliseconds."""
        manifest = self.pyfunc.loaded.manifest
        facts = {key: getattr(manifest, key) for key in ("name", "digest", "runtime", "precision")}
        return facts | {
            "registered_model": self.address.name,
            "version": self.label,
            "since": self.since,
            "model_config": dict(self.target.model_config),
            "logged": {key: float(self._tags[key]) for key in _LOGGED if key in self._tags},
            "observed": _percentiles(list(self.seconds)),
        }


def load_version(address: Address, target: Target) -> Version:
    """Load a version, check it and warm it up; on every failure nothing stays behind.

    The MLmodel and the digest of the promotion are checked before anything is loaded, the digests
    of the files and the golden rows by the flavor.

    Raises:
        PtDeployError: The model is damaged, answers otherwise than where it was exported, is not
            vouched for, or cannot run here.
        MlflowException: It cannot be fetched.
    """
    folder = tempfile.mkdtemp(prefix="pt-deploy-serve-")
    try:
        fetched = fetch(address, Path(folder))
        model = fetched.load(target.model_config)
        version = Version(model, address, target, dict(fetched.tags))
        version.compare_libraries()
        version.pyfunc.warm_up()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(version, shutil.rmtree, folder, ignore_errors=True)
    return version


def check_there(address: Address) -> None:
    """Read and check a version's MLmodel file, and nothing else of it.

    Raises:
        PtDeployError: It is damaged or asks for code.
        MlflowException: There is none.
    """
    with tempfile.TemporaryDirectory(prefix="pt-deploy-serve-") as folder:
        fetch_mlmodel(address.uri, Path(folder))


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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

"""The MLmodel file: parsed as data and validated against what `flavor.save_model` writes.

MLflow executes the instructions of an MLmodel file: it imports the module that the file names, adds
a folder of the artifact to the import path, and passes the options of the artifact to the loader.
This module validates the file first and rejects any other content before MLflow reads it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import ArtifactError, ModelError, ServingError, UntrustedError
from mlflow_pt_deploy.model_config import MODEL_CONFIG, ServingOptions
from mlflow_pt_deploy.system.regular_files import parse_yaml, read_regular

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc

FLAVOR_NAME = "pt_deploy"
LOADER = "mlflow_pt_deploy.flavor"
LOADERS = {LOADER: "mlflow_pt_deploy.serving.model.loader"}
"""Loaders that an MLmodel file may name, and the module whose `load_checked` is called instead:
the flavor imports MLflow, which takes a second. The tests add their own."""

FILE = "MLmodel"
FOLDER = "variant"
MANIFEST = f"{FOLDER}/manifest.json"
MAX_BYTES = 256 * 2**10
_DIGEST_PREFIX = "v2:"

_PYFUNC = "python_function"
_CONFIG_ENV = "MLFLOW_PYFUNC_INFERENCE_CONFIG"
_ENVIRONMENT = {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
_TOP_LEVEL_KEYS = frozenset(
    {
        "artifact_path",
        "flavors",
        "is_signature_from_type_hint",
        "metadata",
        "mlflow_version",
        "model_id",
        "model_size_bytes",
        "model_uuid",
        "prompts",
        "run_id",
        "saved_input_example_info",
        "signature",
        "type_hint_from_example",
        "utc_time_created",
    }
)
# what MLflow 3.17 writes; for another key, MLflow is asked
_FLAVOR_KEYS = ("version", "variant", "runtime", "precision", "digest")
_ONNX = {
    "data": f"{FOLDER}/model.onnx",
    "providers": ["CPUExecutionProvider"],
    "onnx_session_options": None,
}


@dataclass(frozen=True)
class MLmodel:
    """A validated MLmodel file.

    Attributes:
        loader: A member of `LOADERS`.
        config: Serving options logged with the model, without `allow_code`.
        asks_for_code: Whether the file has ``allow_code: true``, which only the operator may set.
        logged_digest: SHA-256 of ``variant/manifest.json`` at logging, from the file.
        content: The parsed file.
    """

    loader: str
    config: Mapping[str, Any]
    asks_for_code: bool
    logged_digest: str
    content: Mapping[str, Any]

    def load(self, root: Path, config: Mapping[str, Any]) -> PtDeployPyFunc:
        """Call the loader.

        Args:
            root: Folder of the model.
            config: All serving options.

        Raises:
            PtDeployError: The loader fails.
        """
        loader = importlib.import_module(LOADERS[self.loader])
        loaded: PtDeployPyFunc = loader.load_checked(root, self, dict(config))
        return loaded

    def operator_config(self, model_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the serving options of the artifact, overridden by those of the operator.

        Args:
            model_config: Options of the operator, in addition to
                ``MLFLOW_PYFUNC_INFERENCE_CONFIG``.

        Raises:
            ServingError: An option of the operator is invalid.
        """
        return {**MODEL_CONFIG, **self.config, **inference_config(), **(model_config or {})}

    def check_claim(self, allowed: bool) -> None:
        """Reject an artifact that allows its own code, unless the operator allows it.

        Raises:
            UntrustedError: The file has ``allow_code: true``.
        """
        if self.asks_for_code and not allowed:
            raise UntrustedError(
                "the MLmodel file sets allow_code: true; only the operator can allow code, with -C "
                "allow_code=true or PT_DEPLOY_ALLOW_CODE=1. Log the model again without it."
            )


def inference_config() -> dict[str, Any]:
    """The options in ``MLFLOW_PYFUNC_INFERENCE_CONFIG``.

    Raises:
        ServingError: It is not a JSON object.
    """
    try:
        config = json.loads(os.environ.get(_CONFIG_ENV) or "{}")
        if not isinstance(config, dict):
            raise TypeError(f"it is a {type(config).__name__}")
    except (ValueError, TypeError) as error:
        raise ServingError(
            f"{_CONFIG_ENV} is not a JSON object of serving options: {error}"
        ) from error
    return config


def read_mlmodel(root: Path) -> MLmodel:
    """Read and validate the MLmodel file of a model.

    Args:
        root: Folder of the model.

    Raises:
        ModelError: There is no MLmodel file, or the model has another flavor.
        ArtifactError: The file is damaged or has unexpected content; the message names the key.
    """
    if not (root / FILE).exists():
        raise ModelError(f"{root.name} is not an MLflow model: it has no {FILE} file.")
    content = parse_yaml(read_regular(root / FILE, MAX_BYTES), FILE)
    if not isinstance(content, dict):
        raise ArtifactError(f"{FILE} is not a YAML mapping. {_CURE}")
    flavors = content.get("flavors")
    if not isinstance(flavors, dict) or not flavors:
        raise _invalid("flavors", "is missing")
    if FLAVOR_NAME not in flavors:
        raise ModelError(
            "the model does not have the pt_deploy flavor. Serve it with mlflow models serve, or "
            "build one with pt-deploy optimize."
        )
    if not content.keys() <= _TOP_LEVEL_KEYS:
        _check_keys("", content, _keys_of_mlflow())
    _check_signature(content.get("signature"))
    _check_keys("flavors", flavors, {_PYFUNC, FLAVOR_NAME, "onnx"})
    _check_flavor(flavors[FLAVOR_NAME])
    _check_onnx(flavors.get("onnx"))
    return _check_pyfunc(flavors.get(_PYFUNC), flavors[FLAVOR_NAME]["digest"], content)


def digest(root: Path) -> str:
    """Return the digest stored by a promotion: SHA-256 of MLmodel and the manifest of the variant.

    The manifest contains the SHA-256 of every file of the variant. MLflow returns identical bytes
    of MLmodel for every address of a model (``runs:/``, ``models:/``, a copied version, a proxy).

    Args:
        root: Folder with both files.

    Raises:
        ArtifactError: A file is missing or unreadable.
    """
    total = hashlib.sha256()
    for name in (FILE, MANIFEST):
        total.update(f"{_sha256(root / name)}  {name}\n".encode())
    return _DIGEST_PREFIX + total.hexdigest()


def check_digest(root: Path, promoted: str, tag: str) -> None:
    """Compare a model with the digest stored by its promotion.

    Args:
        root: Folder of the model.
        promoted: Value of the tag. Versions promoted before 0.2 have the SHA-256 of the manifest.
        tag: Key of the tag, for the message.

    Raises:
        ArtifactError: The digests differ.
    """
    actual = digest(root) if promoted.startswith(_DIGEST_PREFIX) else _sha256(root / MANIFEST)
    if actual != promoted:
        raise ArtifactError(
            f"the model differs from the promoted one: its digest does not match the registry "
            f"tag {tag}. Promote it again with pt-deploy promote."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_regular(path, MAX_BYTES * 16)).hexdigest()


def _check_pyfunc(pyfunc: object, logged_digest: str, content: dict[str, Any]) -> MLmodel:
    """Validate the python_function flavor, which MLflow executes."""
    if not isinstance(pyfunc, dict):
        raise _invalid(f"flavors.{_PYFUNC}", "is missing")
    loader = pyfunc.get("loader_module")
    if not isinstance(loader, str) or loader not in LOADERS:
        raise _invalid(f"{_PYFUNC}.loader_module", f"is {_shown(loader)} instead of {LOADER}")
    _check_keys(_PYFUNC, pyfunc, {"loader_module", "python_version", "env", "config"})
    if not isinstance(pyfunc.get("python_version", ""), str):
        raise _invalid(f"{_PYFUNC}.python_version", "is not a string")
    if pyfunc.get("env", _ENVIRONMENT) != _ENVIRONMENT:
        raise _invalid(f"{_PYFUNC}.env", "names other files than conda.yaml and python_env.yaml")
    config = pyfunc.get("config") or {}
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise _invalid(f"{_PYFUNC}.config", "is not a mapping of serving options")
    try:
        ServingOptions.from_config(config)
    except ServingError as error:
        raise _invalid(f"{_PYFUNC}.config", f"is invalid ({str(error)[:200]})") from error
    return MLmodel(
        loader=loader,
        config={key: value for key, value in config.items() if key != "allow_code"},
        asks_for_code=bool(config.get("allow_code")),
        logged_digest=logged_digest,
        content=content,
    )


def _check_flavor(flavor: object) -> None:
    name = f"flavors.{FLAVOR_NAME}"
    if not isinstance(flavor, dict):
        raise _invalid(name, "is not a mapping")
    _check_keys(FLAVOR_NAME, flavor, {*_FLAVOR_KEYS, "data"})
    if flavor.get("data") != FOLDER:
        raise _invalid(
            f"{FLAVOR_NAME}.data", f"is {_shown(flavor.get('data'))} instead of {FOLDER}"
        )
    for key in _FLAVOR_KEYS:
        if not isinstance(flavor.get(key), str):
            raise _invalid(f"{FLAVOR_NAME}.{key}", "is not a string")


def _check_onnx(flavor: object) -> None:
    if flavor is None:
        return
    if not isinstance(flavor, dict):
        raise _invalid("flavors.onnx", "is not a mapping")
    _check_keys("onnx", flavor, {*_ONNX, "onnx_version"})
    for key, value in _ONNX.items():
        if flavor.get(key) != value:
            raise _invalid(
                f"onnx.{key}", f"is {_shown(flavor.get(key))} instead of {_shown(value)}"
            )


def _check_keys(section: str, mapping: Mapping[Any, Any], known: set[str]) -> None:
    """Reject unknown keys, except null and false, which have no effect."""
    for key, value in mapping.items():
        if key not in known and value is not None and value is not False:
            name = f"{section}.{_shown(key)}" if section else _shown(key)
            raise _invalid(name, "is not written by pt-deploy")


def _keys_of_mlflow() -> set[str]:
    """Return the keys that this MLflow version may write beside the flavors."""
    from mlflow.models import Model

    known = {name for name in inspect.signature(Model.__init__).parameters if name != "self"}
    return known | {"is_signature_from_type_hint", "type_hint_from_example", "databricks_runtime"}


def _check_signature(signature: object) -> None:
    """Check the form of the signature: the JSON of inputs, outputs and params as strings."""
    if signature is None:
        return
    if not isinstance(signature, dict):
        raise _invalid("signature", "cannot be read: it is not a mapping")
    for key in ("inputs", "outputs", "params"):
        try:
            json.loads(signature.get(key) or "null")
        except (ValueError, TypeError) as error:
            raise _invalid("signature", f"cannot be read: {key} is not JSON") from error


_CURE = "Do not serve this artifact; log the variant again with pt-deploy optimize."


def _invalid(key: str, problem: str) -> ArtifactError:
    return ArtifactError(f"{FILE}: {key} {problem}. {_CURE}")


def _shown(value: object) -> str:
    """Format a value for a message: short, never a nested structure."""
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, str):
        return value[:80] if value.isprintable() else ascii(value[:80])
    if isinstance(value, list) and all(isinstance(part, str) for part in value[:4]):
        return "[" + ", ".join(part[:40] for part in value[:4]) + "]"
    return f"a {type(value).__name__}"

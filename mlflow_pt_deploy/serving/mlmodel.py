"""The MLmodel file: read as data, and held to what `flavor.save_model` writes.

MLflow obeys an MLmodel. It imports the module that the file names, puts a folder of the artifact
on the import path, and passes the artifact's own options to the loader. This module reads the file
first, so that an artifact that asks for anything else is refused before MLflow sees it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.artifact_files import parse_yaml, read_regular
from mlflow_pt_deploy.errors import ArtifactError, ModelError, ServingError, UntrustedError
from mlflow_pt_deploy.serving.options import MODEL_CONFIG, Options

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import PyFuncModel

FLAVOR_NAME = "pt_deploy"
LOADER = "mlflow_pt_deploy.flavor"
LOADERS = frozenset({LOADER})
"""Modules whose `load_checked` may be called; the tests add one of theirs."""

FILE = "MLmodel"
FOLDER = "variant"
MANIFEST = f"{FOLDER}/manifest.json"
MAX_BYTES = 256 * 2**10
_NEW_FORM = "v2:"

_PYFUNC = "python_function"
_ENVIRONMENT = {"conda": "conda.yaml", "virtualenv": "python_env.yaml"}
_OURS = ("version", "variant", "runtime", "precision", "digest")
_ONNX = {
    "data": f"{FOLDER}/model.onnx",
    "providers": ["CPUExecutionProvider"],
    "onnx_session_options": None,
}


@dataclass(frozen=True)
class MLmodel:
    """An MLmodel file that asks for nothing but our own loader.

    Attributes:
        loader: A member of `LOADERS`.
        config: Serving options that were logged with the model; never with `allow_code`.
        asks_for_code: Whether the file had ``allow_code: true``, which only the operator may say.
        logged_digest: SHA-256 of ``variant/manifest.json`` at logging, as the file has it.
        content: The parsed file.
    """

    loader: str
    config: Mapping[str, Any]
    asks_for_code: bool
    logged_digest: str
    content: Mapping[str, Any]

    def load(self, root: Path, config: Mapping[str, Any]) -> PyFuncModel:
        """Call the loader, as ``mlflow.pyfunc.load_model`` does once it has read the file.

        Args:
            root: The folder that this file was read from.
            config: All serving options.

        Raises:
            PtDeployError: Whatever the loader raises.
        """
        from mlflow.models import Model
        from mlflow.pyfunc import PyFuncModel

        loader = importlib.import_module(self.loader)
        implementation = loader.load_checked(root, self, dict(config))
        meta = Model(flavors=dict(self.content["flavors"]), signature=self.signature())
        return PyFuncModel(model_meta=meta, model_impl=implementation)

    def signature(self) -> ModelSignature | None:
        """The signature, or None.

        Raises:
            ArtifactError: It cannot be read.
        """
        from mlflow.models import ModelSignature

        if (signature := self.content.get("signature")) is None:
            return None
        try:
            read: ModelSignature = ModelSignature.from_dict(signature)
        except Exception as error:  # MLflow's own, and whatever Python raises on a wrong type
            raise _odd("signature", f"cannot be read ({type(error).__name__})") from error
        return read

    def operator_config(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Serving options: those of the artifact, overridden by the operator's.

        Args:
            given: The operator's ``model_config``; ``MLFLOW_PYFUNC_INFERENCE_CONFIG`` counts too.

        Raises:
            ServingError: One of the operator's options is wrong.
        """
        from mlflow.utils.model_utils import _get_overridden_pyfunc_model_config

        try:
            config = _get_overridden_pyfunc_model_config(
                {**MODEL_CONFIG, **self.config}, dict(given or {}), logging.getLogger(__name__)
            )
        except (ValueError, TypeError) as error:
            raise ServingError(
                f"MLFLOW_PYFUNC_INFERENCE_CONFIG is not a JSON object of serving options: {error}"
            ) from error
        return dict(config)

    def check_claim(self, allowed: bool) -> None:
        """Refuse an artifact that allows its own code, unless the operator has allowed it.

        Raises:
            UntrustedError: It says ``allow_code: true`` of itself.
        """
        if self.asks_for_code and not allowed:
            raise UntrustedError(
                "MLmodel says allow_code: true of itself; only the operator can say so, with -C "
                "allow_code=true or PT_DEPLOY_ALLOW_CODE=1. Log the model again without it."
            )


def read_mlmodel(root: Path) -> MLmodel:
    """Read a model's MLmodel file and hold it to what this package writes.

    Args:
        root: The model's folder.

    Raises:
        ModelError: There is no MLmodel file, or the model is of another flavor.
        ArtifactError: The file is damaged or asks for something else; names the key.
    """
    if not (root / FILE).exists():
        raise ModelError(f"{root.name} holds no MLflow model: there is no {FILE} file in it.")
    content = parse_yaml(read_regular(root / FILE, MAX_BYTES), FILE)
    if not isinstance(content, dict):
        raise ArtifactError(f"{FILE} is not a table of keys. {_CURE}")
    flavors = content.get("flavors")
    if not isinstance(flavors, dict) or not flavors:
        raise _odd("flavors", "is missing")
    if FLAVOR_NAME not in flavors:
        raise ModelError(
            "this model is not of the pt_deploy flavor. Serve it with mlflow models serve, or "
            "build one with pt-deploy optimize."
        )
    _check_keys("", content, _top_level())
    _check_keys("flavors", flavors, {_PYFUNC, FLAVOR_NAME, "onnx"})
    _check_flavor(flavors[FLAVOR_NAME])
    _check_onnx(flavors.get("onnx"))
    return _checked(flavors.get(_PYFUNC), flavors[FLAVOR_NAME]["digest"], content)


def digest(root: Path) -> str:
    """What a promotion writes into the registry: SHA-256 of MLmodel and the variant's manifest.

    The manifest holds the SHA-256 of every file of the variant. MLflow hands out the very bytes of
    MLmodel by every address of a model (``runs:/``, ``models:/``, a copied version, a proxy).

    Args:
        root: A folder with both files.

    Raises:
        ArtifactError: One of them is missing or unreadable.
    """
    whole = hashlib.sha256()
    for name in (FILE, MANIFEST):
        whole.update(f"{_sha256(root / name)}  {name}\n".encode())
    return _NEW_FORM + whole.hexdigest()


def check_digest(root: Path, promoted: str, tag: str) -> None:
    """Compare a model with the digest that its promotion wrote.

    Args:
        root: The model's folder.
        promoted: The tag's value. Versions promoted before 0.2 have the SHA-256 of the manifest.
        tag: Its key, for the message.

    Raises:
        ArtifactError: They differ.
    """
    actual = digest(root) if promoted.startswith(_NEW_FORM) else _sha256(root / MANIFEST)
    if actual != promoted:
        raise ArtifactError(
            f"this model is not what was promoted: its digest is not the one in the registry's "
            f"tag {tag}. Promote it again with pt-deploy promote."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_regular(path, MAX_BYTES * 16)).hexdigest()


def _checked(pyfunc: object, logged_digest: str, content: dict[str, Any]) -> MLmodel:
    """The flavor that MLflow obeys, key by key."""
    if not isinstance(pyfunc, dict):
        raise _odd(f"flavors.{_PYFUNC}", "is missing")
    loader = pyfunc.get("loader_module")
    if not isinstance(loader, str) or loader not in LOADERS:
        raise _odd(f"{_PYFUNC}.loader_module", f"is {_shown(loader)} instead of {LOADER}")
    _check_keys(_PYFUNC, pyfunc, {"loader_module", "python_version", "env", "config"})
    if not isinstance(pyfunc.get("python_version", ""), str):
        raise _odd(f"{_PYFUNC}.python_version", "is not a text")
    if pyfunc.get("env", _ENVIRONMENT) != _ENVIRONMENT:
        raise _odd(f"{_PYFUNC}.env", "names other files than conda.yaml and python_env.yaml")
    config = pyfunc.get("config") or {}
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise _odd(f"{_PYFUNC}.config", "is not a table of serving options")
    try:
        Options.from_config(config)
    except ServingError as error:
        raise _odd(f"{_PYFUNC}.config", f"is wrong ({str(error)[:200]})") from error
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
        raise _odd(name, "is not a table")
    _check_keys(FLAVOR_NAME, flavor, {*_OURS, "data"})
    if flavor.get("data") != FOLDER:
        raise _odd(f"{FLAVOR_NAME}.data", f"is {_shown(flavor.get('data'))} instead of {FOLDER}")
    for key in _OURS:
        if not isinstance(flavor.get(key), str):
            raise _odd(f"{FLAVOR_NAME}.{key}", "is not a text")


def _check_onnx(flavor: object) -> None:
    if flavor is None:
        return
    if not isinstance(flavor, dict):
        raise _odd("flavors.onnx", "is not a table")
    _check_keys("onnx", flavor, {*_ONNX, "onnx_version"})
    for key, value in _ONNX.items():
        if flavor.get(key) != value:
            raise _odd(f"onnx.{key}", f"is {_shown(flavor.get(key))} instead of {_shown(value)}")


def _check_keys(place: str, table: Mapping[Any, Any], known: set[str]) -> None:
    """Refuse keys that we do not write; null and false ask for nothing."""
    for key, value in table.items():
        if key not in known and value is not None and value is not False:
            where = f"{place}.{_shown(key)}" if place else _shown(key)
            raise _odd(where, "is not written by pt-deploy")


def _top_level() -> set[str]:
    """The keys that this MLflow writes beside the flavors."""
    from mlflow.models import Model

    known = {name for name in inspect.signature(Model.__init__).parameters if name != "self"}
    return known | {"is_signature_from_type_hint", "type_hint_from_example", "databricks_runtime"}


_CURE = "Do not serve this artifact; log the variant again with pt-deploy optimize."


def _odd(key: str, problem: str) -> ArtifactError:
    return ArtifactError(f"{FILE}: {key} {problem}. {_CURE}")


def _shown(value: object) -> str:
    """A value for a message: short, and never a whole nested table."""
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, str):
        return value[:80] if value.isprintable() else ascii(value[:80])
    if isinstance(value, list) and all(isinstance(part, str) for part in value[:4]):
        return "[" + ", ".join(part[:40] for part in value[:4]) + "]"
    return f"a {type(value).__name__}"

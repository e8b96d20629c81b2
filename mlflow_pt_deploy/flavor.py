"""The MLflow flavor `pt_deploy` for all variants; ONNX variants also have the `onnx` flavor.

A saved model contains the folder of the variant unchanged, under ``variant/``, and the wheel of
this package, from which MLflow builds an environment. Nothing is pickled, and a model is never
loaded with code that it carries: this package must be installed in the environment that loads it.

`load_model` and ``pt-deploy serve`` parse the MLmodel file as data and reject one that asks for any
other loader. ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` execute the MLmodel file
before they call this package, so they are only as safe as the artifact store.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
from mlflow import pyfunc
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.utils.environment import _validate_env_arguments
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import _validate_and_prepare_target_save_path

from mlflow_pt_deploy._version import __version__
from mlflow_pt_deploy.artifacts import LoadedVariant, Manifest, read_manifest, verify
from mlflow_pt_deploy.errors import ArtifactError, ServingError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.preprocessing import input_column
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG, resolve
from mlflow_pt_deploy.registry.environment import (
    CONDA_FILE,
    PYTHON_FILE,
    get_default_conda_env,
    get_default_pip_requirements,
    write_environment,
)
from mlflow_pt_deploy.registry.fetch import (
    ALLOW_CODE_ENV,
    environment_allows_code,
    fetch,
    inference_config_allows_code,
)
from mlflow_pt_deploy.registry.mlmodel import (
    FLAVOR_NAME,
    FOLDER,
    LOADER,
    check_digest,
    read_mlmodel,
)
from mlflow_pt_deploy.runtimes.onnxruntime import FILE as ONNX_FILE
from mlflow_pt_deploy.serving.model.loader import load_checked, load_logged_variant
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc, signature
from mlflow_pt_deploy.system.device import CPU, CUDA
from mlflow_pt_deploy.system.regular_files import (
    list_files,
    open_to_readers,
    parse_yaml,
    read_regular,
)

__all__ = [
    "ALLOW_CODE_ENV",
    "FLAVOR_NAME",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "save_model",
]

_META = "registered_model_meta"
_PROVIDERS = {
    CPU: ["CPUExecutionProvider"],
    CUDA: ["CUDAExecutionProvider", "CPUExecutionProvider"],
}


def save_model(
    variant: Path | str,
    path: Path | str,
    *,
    mlflow_model: Model | None = None,
    input_example: Any = None,
    pip_requirements: list[str] | None = None,
    extra_pip_requirements: list[str] | None = None,
    metadata: dict[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    package: str = "",
    **_: Any,
) -> None:
    """Save the folder of a variant as an MLflow model.

    Args:
        variant: Folder written by `artifacts.write_variant`; digests are verified first.
        path: Folder to create; must be empty if it exists.
        mlflow_model: MLmodel to extend; passed by MLflow.
        input_example: Example shown in the UI, e.g. ``["a text"]``.
        pip_requirements: Replaces `get_default_pip_requirements`.
        extra_pip_requirements: Added to `get_default_pip_requirements`.
        metadata: Stored in the MLmodel file.
        model_config: Serving options, see `model_config.ServingOptions`.
        package: Requirement that stands for this package, e.g. a URL of its wheel; empty: the
            model carries the wheel.

    Raises:
        ArtifactError: The folder is incomplete or changed.
        ServingError: `model_config` has an invalid option, or allows code.
    """
    options = asdict(ServingOptions.from_config(model_config))
    if options["allow_code"]:
        raise ServingError(
            "model_config: allow_code cannot be logged with a model; only the operator of a server "
            "can allow code. Promote the model, or serve it with -C allow_code=true."
        )
    folder, root = Path(variant), Path(path)
    existed = root.exists()
    manifest = verify(folder)
    _validate_env_arguments(None, pip_requirements, extra_pip_requirements)
    _validate_and_prepare_target_save_path(str(root))
    shutil.copytree(folder, root / FOLDER)
    model = mlflow_model or Model()
    model.signature = signature()
    model.metadata = metadata
    if input_example is not None:
        _save_example(model, input_example, str(root))
    _add_flavors(model, manifest, options)
    model.model_size_bytes = get_total_file_size(str(root))
    model.save(str(root / MLMODEL_FILE_NAME))
    defaults = get_default_pip_requirements(
        *manifest.runtimes, column=input_column(folder), gpu_runtime=manifest.gpu_runtime
    )
    write_environment(root, defaults, pip_requirements, extra_pip_requirements, package)
    open_to_readers(root)
    if not existed:
        root.chmod(0o755)


def log_model(variant: Path | str, name: str, **options: Any) -> Any:
    """Log the folder of a variant as an MLflow model of the active run.

    Args:
        variant: Folder written by `artifacts.write_variant`.
        name: Name of the logged model, e.g. ``student-openvino-fp32``.
        **options: Arguments of ``mlflow.models.Model.log`` (`params`, `tags`, `step`,
            `registered_model_name`, ...) and of `save_model`.

    Returns:
        MLflow's ``ModelInfo``.
    """
    options.setdefault("validate_serving_input", False)  # validation would load the model
    return Model.log(
        artifact_path=None, name=name, flavor=sys.modules[__name__], variant=variant, **options
    )


def load_model(
    model_uri: str, *, dst_path: str | None = None, **model_config: Any
) -> LoadedVariant:
    """Load a logged variant without the pyfunc wrapper of MLflow.

    Args:
        model_uri: ``models:/NAME@champion``, ``runs:/...``, or a path.
        dst_path: Folder to download to; None uses a temporary folder.
        **model_config: Serving options, e.g. ``num_threads=1``.
    """
    folder = dst_path or tempfile.mkdtemp(prefix="pt-deploy-model-")
    try:
        fetched = fetch(resolve(model_uri), Path(folder))
        options = ServingOptions.from_config(fetched.options(model_config))
        loaded = load_logged_variant(fetched.root, fetched.mlmodel, options)
    except BaseException:
        if dst_path is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if dst_path is None:
        weakref.finalize(loaded, shutil.rmtree, folder, ignore_errors=True)
    return loaded


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> PtDeployPyFunc:
    """Entry point of ``mlflow.pyfunc.load_model``, called after MLflow executed the MLmodel file.

    MLflow merges the options of the artifact with those of the operator. Therefore an
    ``allow_code: true`` in the MLmodel file is accepted only if an environment variable allows code
    too.
    """
    root = Path(path)
    list_files(root)
    mlmodel = read_mlmodel(root)
    config = dict(model_config or {})
    mlmodel.check_claim(environment_allows_code() or inference_config_allows_code())
    config["allow_code"] = (
        bool(config.get("allow_code")) or environment_allows_code() or _is_promoted(root)
    )
    return load_checked(root, mlmodel, config)


def _is_promoted(root: Path) -> bool:
    """Whether the model contains code and a promoted version has exactly this content.

    The version is read from a file that MLflow writes when it fetches ``models:/``; otherwise the
    file comes from the artifact store. A forged file can only name a version with the same digest,
    so the loaded content was promoted in any case.
    """
    if not read_manifest(root / FOLDER).carries_code:
        return False
    try:
        meta = parse_yaml(read_regular(root / _META, 4096), _META)
        version = mlflow.MlflowClient().get_model_version(
            meta["model_name"], str(meta["model_version"])
        )
        check_digest(root, version.tags.get(DIGEST_TAG, ""), DIGEST_TAG)
    except (ArtifactError, KeyError, TypeError, mlflow.MlflowException):
        return False
    return True


def _add_flavors(model: Model, manifest: Manifest, config: dict[str, Any]) -> None:
    if manifest.runtime == "onnxruntime":
        import onnx

        model.add_flavor(
            "onnx",
            onnx_version=onnx.__version__,
            data=f"{FOLDER}/{ONNX_FILE}",
            providers=_PROVIDERS[manifest.device],
            onnx_session_options=None,
        )
    model.add_flavor(
        FLAVOR_NAME,
        version=__version__,
        variant=manifest.name,
        runtime=manifest.runtime,
        precision=manifest.precision,
        digest=manifest.digest,
        data=FOLDER,
    )
    pyfunc.add_to_model(
        model,
        loader_module=LOADER,
        conda_env=CONDA_FILE,
        python_env=PYTHON_FILE,
        model_config=config,
    )

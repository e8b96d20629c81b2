"""The MLflow flavor `pt_deploy`: one for all variants, beside the native flavor where there is one.

An MLmodel holds the variant's folder as it is, under ``variant/``. Nothing is pickled and no code
is shipped: the environment that loads a model has this package installed.

`load_model` and ``pt-deploy serve`` read the MLmodel as data and refuse one that asks for anything
but this module. ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` obey the MLmodel before
this package is asked: they are as safe as the artifact store that they load from.
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
import yaml
from mlflow import pyfunc
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.models.utils import _save_example
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _mlflow_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import _validate_and_prepare_target_save_path

from mlflow_pt_deploy import __version__
from mlflow_pt_deploy.artifact_files import (
    list_files,
    open_to_readers,
    parse_yaml,
    read_regular,
)
from mlflow_pt_deploy.errors import ArtifactError, ServingError
from mlflow_pt_deploy.hardware import library_versions
from mlflow_pt_deploy.serving.fetch import (
    ALLOW_CODE_ENV,
    environment_allows_code,
    fetch,
    inference_config_allows_code,
)
from mlflow_pt_deploy.serving.mlmodel import (
    FLAVOR_NAME,
    FOLDER,
    LOADER,
    MLmodel,
    check_digest,
    read_mlmodel,
)
from mlflow_pt_deploy.serving.options import Options
from mlflow_pt_deploy.serving.pyfunc import PyFunc, signature
from mlflow_pt_deploy.serving.registry import DIGEST_TAG, resolve
from mlflow_pt_deploy.variants import LoadedVariant, Manifest, load_variant, read_manifest, verify
from mlflow_pt_deploy.variants.onnxruntime import FILE as ONNX_FILE

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
_NEEDS = {
    "eager": ("torch", "transformers"),
    "torchscript": ("torch",),
    "aotinductor": ("torch",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "numpy": (),  # what every installation of this package has
}


def get_default_pip_requirements(*runtimes: str) -> list[str]:
    """Pinned requirements of an environment that can serve variants of `runtimes`; empty: eager."""
    versions = library_versions()
    needs = (name for runtime in runtimes or ("eager",) for name in _NEEDS[runtime])
    names = dict.fromkeys(("tokenizers", "pillow", *needs))
    pins = [f"{name}=={versions[name].partition('+')[0]}" for name in names if name in versions]
    return [f"mlflow-pt-deploy=={__version__}", *pins]


def get_default_conda_env(*runtimes: str) -> dict[str, Any]:
    """`get_default_pip_requirements` as a conda environment."""
    env: dict[str, Any] = _mlflow_conda_env(
        additional_pip_deps=get_default_pip_requirements(*runtimes)
    )
    return env


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
    **_: Any,
) -> None:
    """Save a variant's folder as an MLflow model.

    Args:
        variant: A folder that `variants.write_variant` made; its digests are checked first.
        path: Where to save; must not exist or be empty.
        mlflow_model: The MLmodel to extend; MLflow passes it.
        input_example: Kept for the UI, e.g. ``["a text"]``.
        pip_requirements: Replaces `get_default_pip_requirements`.
        extra_pip_requirements: Adds to it.
        metadata: Kept in the MLmodel.
        model_config: Serving options other than their defaults, see `serving.options.Options`.

    Raises:
        ArtifactError: The folder is incomplete or changed.
        ServingError: `model_config` has a wrong option, or allows code.
    """
    options = asdict(Options.from_config(model_config))
    if options["allow_code"]:
        raise ServingError(
            "model_config: allow_code cannot be logged with a model; only whoever serves it can "
            "allow code. Promote the model, or serve it with -C allow_code=true."
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
    defaults = None if pip_requirements else get_default_pip_requirements(*manifest.runtimes)
    _write_environment(root, defaults, pip_requirements, extra_pip_requirements)
    open_to_readers(root)
    if not existed:
        root.chmod(0o755)


def log_model(variant: Path | str, name: str, **options: Any) -> Any:
    """Log a variant's folder as an MLflow model of the active run.

    Args:
        variant: A folder that `variants.write_variant` made.
        name: Name of the logged model, e.g. ``student-openvino-fp32``.
        **options: What ``mlflow.models.Model.log`` takes (`params`, `tags`, `step`,
            `registered_model_name`, ...) and what `save_model` takes.

    Returns:
        MLflow's ``ModelInfo``.
    """
    options.setdefault("validate_serving_input", False)  # it would load the model right here
    return Model.log(
        artifact_path=None, name=name, flavor=sys.modules[__name__], variant=variant, **options
    )


def load_model(
    model_uri: str, *, dst_path: str | None = None, **model_config: Any
) -> LoadedVariant:
    """Load a logged variant as it is, without MLflow's pyfunc around it.

    Args:
        model_uri: ``models:/NAME@champion``, ``runs:/...``, or a path.
        dst_path: Where to download to.
        **model_config: Serving options, e.g. ``num_threads=1``.
    """
    folder = dst_path or tempfile.mkdtemp(prefix="pt-deploy-model-")
    try:
        fetched = fetch(resolve(model_uri), Path(folder))
        options = Options.from_config(fetched.options(model_config))
        loaded = _load(fetched.root, fetched.mlmodel, options)
    except BaseException:
        if dst_path is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if dst_path is None:
        weakref.finalize(loaded, shutil.rmtree, folder, ignore_errors=True)
    return loaded


def load_checked(root: Path, mlmodel: MLmodel, config: Mapping[str, Any]) -> PyFunc:
    """Load a model whose MLmodel was read and checked.

    Args:
        root: The model's folder, which only this user can write to.
        mlmodel: Its MLmodel.
        config: All serving options; `allow_code` is the operator's or the promotion's word.

    Raises:
        PtDeployError: The model is damaged, carries code, or cannot run here.
    """
    options = Options.from_config(config)
    return PyFunc(_load(root, mlmodel, options), config)


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> PyFunc:
    """What ``mlflow.pyfunc.load_model`` calls, after it has obeyed the MLmodel.

    MLflow passes the artifact's own options together with the operator's. An ``allow_code: true``
    in the MLmodel cannot be told from the operator's there, and counts only if an environment
    variable says it too.
    """
    root = Path(path)
    list_files(root)
    mlmodel = read_mlmodel(root)
    config = dict(model_config or {})
    mlmodel.check_claim(environment_allows_code() or inference_config_allows_code())
    config["allow_code"] = (
        bool(config.get("allow_code")) or environment_allows_code() or _registry_vouches(root)
    )
    return load_checked(root, mlmodel, config)


def _load(root: Path, mlmodel: MLmodel, options: Options) -> LoadedVariant:
    folder = root / FOLDER
    manifest = read_manifest(folder)  # its files are checked where they are loaded
    if manifest.digest != mlmodel.logged_digest:
        raise ArtifactError(
            f"{manifest.name}: manifest.json is not the one that was logged (SHA-256 differs). "
            "The artifact is corrupted; log the variant again."
        )
    return load_variant(
        folder,
        device=options.device,
        threads=options.num_threads,
        allow_code=options.allow_code,
    )


def _registry_vouches(root: Path) -> bool:
    """Whether a registered version was promoted with exactly this content; asked for code alone.

    Which version is said by a file that MLflow writes when it fetches ``models:/``, and that in
    other cases comes from the artifact store. A forged one can only name a version whose digest
    is the same, so what is loaded was promoted in any case.
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
            providers=["CPUExecutionProvider"],
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
        conda_env=_CONDA_ENV_FILE_NAME,
        python_env=_PYTHON_ENV_FILE_NAME,
        model_config=config,
    )


def _write_environment(
    root: Path, defaults: list[str] | None, given: list[str] | None, extra: list[str] | None
) -> None:
    conda, requirements, _ = _process_pip_requirements(defaults, given, extra)
    with (root / _CONDA_ENV_FILE_NAME).open("w", encoding="utf8") as file:
        yaml.safe_dump(conda, file, default_flow_style=False)
    (root / _REQUIREMENTS_FILE_NAME).write_text("\n".join(requirements), encoding="utf8")
    _PythonEnv.current().to_yaml(str(root / _PYTHON_ENV_FILE_NAME))

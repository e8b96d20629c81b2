"""Python environment of a saved model: pip requirements, conda.yaml and python_env.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _mlflow_conda_env,
    _process_pip_requirements,
    _PythonEnv,
)

from mlflow_pt_deploy._version import __version__
from mlflow_pt_deploy.system.hardware import library_versions

CONDA_FILE: str = _CONDA_ENV_FILE_NAME
PYTHON_FILE: str = _PYTHON_ENV_FILE_NAME

_RUNTIME_LIBRARIES = {
    "eager": ("torch", "transformers"),
    "torchscript": ("torch",),
    "aotinductor": ("torch",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "numpy": (),  # a dependency of this package
}


def get_default_pip_requirements(*runtimes: str) -> list[str]:
    """Return pinned requirements to serve variants of `runtimes`; without arguments of eager."""
    versions = library_versions()
    needed = (name for runtime in runtimes or ("eager",) for name in _RUNTIME_LIBRARIES[runtime])
    names = dict.fromkeys(("tokenizers", "pillow", *needed))
    pins = [f"{name}=={versions[name].partition('+')[0]}" for name in names if name in versions]
    return [f"mlflow-pt-deploy=={__version__}", *pins]


def get_default_conda_env(*runtimes: str) -> dict[str, Any]:
    """Return `get_default_pip_requirements` as a conda environment."""
    env: dict[str, Any] = _mlflow_conda_env(
        additional_pip_deps=get_default_pip_requirements(*runtimes)
    )
    return env


def write_environment(
    root: Path,
    runtimes: tuple[str, ...],
    requirements: list[str] | None,
    extra_requirements: list[str] | None,
) -> None:
    """Write conda.yaml, python_env.yaml and requirements.txt of a model.

    Args:
        root: Folder of the model.
        runtimes: Runtimes of the variant, which determine the default requirements.
        requirements: Replaces the default requirements.
        extra_requirements: Added to the default requirements.
    """
    defaults = None if requirements else get_default_pip_requirements(*runtimes)
    conda, pins, _ = _process_pip_requirements(defaults, requirements, extra_requirements)
    with (root / CONDA_FILE).open("w", encoding="utf8") as file:
        yaml.safe_dump(conda, file, default_flow_style=False)
    (root / _REQUIREMENTS_FILE_NAME).write_text("\n".join(pins), encoding="utf8")
    _PythonEnv.current().to_yaml(str(root / PYTHON_FILE))

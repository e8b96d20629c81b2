"""Python environment of a saved model: pip requirements, conda.yaml and python_env.yaml.

A model names only what its runtime needs, and carries the wheel of this package: an environment
can be built from the model and a package index, without another source of this package.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
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
from mlflow_pt_deploy.registry.wheel import WHEELS, write_wheel

CONDA_FILE: str = _CONDA_ENV_FILE_NAME
PYTHON_FILE: str = _PYTHON_ENV_FILE_NAME

RUNTIME_LIBRARIES = {
    "eager": ("torch", "transformers"),
    "torchscript": ("torch",),
    "aotinductor": ("torch",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "numpy": (),  # a dependency of this package
    "cudagraphs": ("torch", "transformers"),
    "packed": ("torch", "transformers"),
    "tensorrt": ("onnxruntime",),
    "torchao": ("torch", "transformers", "torchao"),
}
"""Libraries that each runtime needs beside this package's own requirements."""

# Two distributions of one library; they have the same versions, and a machine has one of them.
_ONNX_RUNTIME, _ONNX_RUNTIME_GPU = "onnxruntime", "onnxruntime-gpu"

INPUT_LIBRARIES = {"text": ("tokenizers",), "image": ("pillow",)}
"""Libraries that read each kind of input."""


def get_default_pip_requirements(
    *runtimes: str, column: str = "text", gpu_runtime: str = ""
) -> list[str]:
    """Return pinned requirements to serve variants.

    Args:
        *runtimes: Their runtimes; none: eager.
        column: What they read, ``text`` or ``image``.
        gpu_runtime: The one of them that runs on a GPU, if any. If that is ONNX Runtime, all use
            its distribution for GPUs, which runs on the CPU too.
    """
    needed = [name for runtime in runtimes or ("eager",) for name in RUNTIME_LIBRARIES[runtime]]
    names = dict.fromkeys(("mlflow-skinny", "numpy", *INPUT_LIBRARIES[column], *needed))
    on_gpu = _ONNX_RUNTIME in RUNTIME_LIBRARIES.get(gpu_runtime, ())
    found = (_ONNX_RUNTIME_GPU if on_gpu and name == _ONNX_RUNTIME else name for name in names)
    return [f"mlflow-pt-deploy=={__version__}", *filter(None, map(_pin, found))]


def _pin(name: str) -> str:
    """The installed version of a library as a requirement; empty if it is not installed."""
    same = (_ONNX_RUNTIME, _ONNX_RUNTIME_GPU)
    for installed in (name, *(same if name in same else ())):
        with suppress(PackageNotFoundError):
            return f"{name}=={version(installed).partition('+')[0]}"
    return ""


def get_default_conda_env(*runtimes: str) -> dict[str, Any]:
    """Return `get_default_pip_requirements` as a conda environment."""
    env: dict[str, Any] = _mlflow_conda_env(
        additional_pip_deps=get_default_pip_requirements(*runtimes), install_mlflow=False
    )
    return env


def write_environment(
    root: Path,
    defaults: list[str],
    requirements: list[str] | None,
    extra_requirements: list[str] | None,
    package: str,
) -> None:
    """Write conda.yaml, python_env.yaml and requirements.txt of a model, and the wheel.

    Args:
        root: Folder of the model.
        defaults: See `get_default_pip_requirements`.
        requirements: Replaces the default requirements.
        extra_requirements: Added to the default requirements.
        package: Requirement that stands for this package, e.g. its URL; the model carries no wheel
            then.
    """
    if package:
        defaults = [package, *defaults[1:]]
    _, pins, _ = _process_pip_requirements(
        None if requirements else defaults, requirements, extra_requirements
    )
    if not requirements and not package and write_wheel(root / WHEELS):
        # pip and uv look for it beside requirements.txt, not in the current folder
        pins = [f"--find-links {WHEELS}", *pins]
    conda = _mlflow_conda_env(additional_pip_deps=pins, install_mlflow=False)
    with (root / CONDA_FILE).open("w", encoding="utf8") as file:
        yaml.safe_dump(conda, file, default_flow_style=False)
    (root / _REQUIREMENTS_FILE_NAME).write_text("\n".join(pins), encoding="utf8")
    _PythonEnv.current().to_yaml(str(root / PYTHON_FILE))

"""Write a folder from which an image, Kubernetes objects or a function are built.

Touches no daemon and no cloud. The folder appears whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import string
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from mlflow_pt_deploy._version import __version__
from mlflow_pt_deploy.artifacts import verify
from mlflow_pt_deploy.artifacts.manifest import Manifest, read_manifest
from mlflow_pt_deploy.artifacts.writing import replace_golden_rows
from mlflow_pt_deploy.errors import ArtifactError, ModelError, ServingError
from mlflow_pt_deploy.packaging import TARGETS
from mlflow_pt_deploy.packaging.pins import pin_closure
from mlflow_pt_deploy.packaging.resources import measure_resources
from mlflow_pt_deploy.preprocessing import input_column
from mlflow_pt_deploy.registry.addresses import explain_load_error, resolve
from mlflow_pt_deploy.registry.environment import INPUT_LIBRARIES, RUNTIME_LIBRARIES
from mlflow_pt_deploy.registry.fetch import fetch
from mlflow_pt_deploy.registry.mlmodel import FILE, FLAVOR_NAME, FOLDER
from mlflow_pt_deploy.registry.wheel import WHEELS, write_wheel
from mlflow_pt_deploy.serving.model.inputs import EXAMPLES
from mlflow_pt_deploy.system.hardware import usable_cores
from mlflow_pt_deploy.system.regular_files import open_to_readers

_TEMPLATES = Path(__file__).with_name("templates")
_FILES = {
    "docker": ("Dockerfile", "dockerignore", "README.docker.md"),
    "kubernetes": (
        "Dockerfile",
        "dockerignore",
        "README.kubernetes.md",
        "deployment.yaml",
        "service.yaml",
        "hpa.yaml",
        "pdb.yaml",
        "networkpolicy.yaml",
        "kustomization.yaml",
    ),
    "kserve": ("Dockerfile", "dockerignore", "README.kserve.md", "inferenceservice.yaml"),
    "lambda": ("Dockerfile.lambda", "dockerignore", "README.lambda.md", "handler.py.txt"),
}
_NAMES = {
    "dockerignore": ".dockerignore",
    "Dockerfile.lambda": "Dockerfile",
    "handler.py.txt": "handler.py",
}
# What the handler imports: a function has neither MLflow nor a server, and 250 MB for all.
_LAMBDA = ("numpy", "pyyaml", "safetensors", "threadpoolctl")


class _Template(string.Template):
    """Template with ``%{name}``: shells, Dockerfiles and Kubernetes use the dollar sign."""

    delimiter = "%"


@dataclass(frozen=True)
class Package:
    """A written folder.

    Attributes:
        folder: Where it is.
        target: One of `TARGETS`.
        variant: Name of the variant in it.
        files: Its files beside model and wheels.
        size_mb: Size of the model, 10^6 bytes.
    """

    folder: Path
    target: str
    variant: str
    files: tuple[str, ...]
    size_mb: float


def write_package(
    uri: str, target: str, out: Path, *, image: str = "", keep_golden_rows: bool = True
) -> Package:
    """Write the folder.

    Args:
        uri: ``models:/NAME@champion``, ``runs:/...`` or a folder.
        target: One of `TARGETS`.
        out: Folder to create.
        image: Name of the image in Kubernetes objects; empty: the variant's name.
        keep_golden_rows: False replaces the rows of the user's data that the model carries.

    Raises:
        ServingError: The target is unknown or the folder exists.
        TrackingError: The model cannot be found.
        PtDeployError: The model is not ours, damaged, or cannot run on this machine.
    """
    if target not in TARGETS:
        raise ServingError(f"the target {target!r} is unknown; choose from {', '.join(TARGETS)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ServingError(f"{out} exists and is not empty. Give another --out, or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        package = _write(uri, target, staging, image, keep_golden_rows)
        open_to_readers(staging)
        staging.chmod(0o755)
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Package(out, target, package.name, _written(target), _size_mb(out / "model"))


def _write(uri: str, target: str, folder: Path, image: str, keep_golden_rows: bool) -> Manifest:
    """Write all parts into an empty folder; return the manifest of the variant."""
    try:
        fetched = fetch(resolve(uri), folder)
    except Exception as error:  # artifact stores have no common base class for errors
        raise explain_load_error(error) from error
    allow_code = bool(fetched.options(None)["allow_code"])
    model = folder / "model"
    fetched.root.rename(model)
    manifest = verify(model / FOLDER)
    if not keep_golden_rows:
        manifest = _replace_golden_rows(model, allow_code)
    if manifest.carries_code and not allow_code:
        raise ArtifactError(
            f"{manifest.name} carries executable code. Package a version that was promoted, or "
            "set PT_DEPLOY_ALLOW_CODE=1."
        )
    shutil.rmtree(model / WHEELS, ignore_errors=True)
    wheel = write_wheel(folder / WHEELS)
    if wheel is None:
        raise ModelError("mlflow-pt-deploy is not installed, so its wheel cannot be written.")
    column = input_column(model / FOLDER)
    pins = _requirements(manifest, target, column)
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n", encoding="utf8")
    threads = int(fetched.mlmodel.config.get("num_threads") or 0)
    values = _values(manifest, model, image, target, threads) | {
        "allow_code": "1" if allow_code and manifest.carries_code else "",
        "torch": _TORCH if any(pin.startswith("torch==") for pin in pins) else "",
        "example": EXAMPLES[column],
    }
    for name, shown in zip(_FILES[target], _written(target), strict=True):
        text = _Template((_TEMPLATES / name).read_text(encoding="utf8")).substitute(values)
        (folder / shown).write_text(text, encoding="utf8")
    return manifest


def _replace_golden_rows(model: Path, allow_code: bool) -> Manifest:
    replace_golden_rows(model / FOLDER, allow_code=allow_code)
    manifest, path = read_manifest(model / FOLDER), model / FILE
    content = yaml.safe_load(path.read_text(encoding="utf8"))
    content["flavors"][FLAVOR_NAME]["digest"] = manifest.digest
    path.write_text(yaml.safe_dump(content), encoding="utf8")
    return manifest


def _requirements(manifest: Manifest, target: str, column: str) -> list[str]:
    """Exact versions; those of the libraries that the model was measured with go first."""
    libraries = list(INPUT_LIBRARIES[column])
    libraries += [name for runtime in manifest.runtimes for name in RUNTIME_LIBRARIES[runtime]]
    if target == "lambda":
        pins = pin_closure([*_LAMBDA, *libraries])
        pins = [f"mlflow-pt-deploy=={__version__}", *pins]
    else:
        pins = pin_closure(["mlflow-pt-deploy[serve]", *libraries])
    versions = {name: text.partition("+")[0] for name, text in manifest.libraries.items()}
    return [
        f"{name}=={versions[name]}" if name in versions and name in libraries else pin
        for pin in pins
        for name in [pin.partition("==")[0]]
    ]


def _values(
    manifest: Manifest, model: Path, image: str, target: str, threads: int
) -> dict[str, str]:
    """What the templates may name: the model, the image, and measured resources."""
    name = manifest.name.lower()
    values = {
        "name": name,
        "image": image or f"{name}:latest",
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "version": __version__,
        "variant": manifest.name,
        "digest": manifest.digest,
        "model_mb": f"{_size_mb(model):.0f}",
    }
    if target in ("kubernetes", "kserve"):
        usual = 1 if manifest.runtime == "numpy" else min(2, usable_cores())
        found = measure_resources(model / FOLDER, threads or usual)
        values |= {key: str(round(value)) for key, value in found._asdict().items()}
    return values


_TORCH = """
This model needs PyTorch. For machines without a GPU, take its smaller CPU build:
`--build-arg PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"`.
"""


def _written(target: str) -> tuple[str, ...]:
    return tuple(
        "README.md" if name.startswith("README") else _NAMES.get(name, name)
        for name in _FILES[target]
    )


def _size_mb(folder: Path) -> float:
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return sum(path.stat().st_size for path in paths) / 1e6

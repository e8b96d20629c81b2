"""What the repository says of itself is true: imports, pins, the README's tree, public names."""

import configparser
import importlib.util
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import mlflow_pt_deploy

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlflow_pt_deploy"


def test_public_names() -> None:
    assert mlflow_pt_deploy.__all__ == [
        "VARIANTS",
        "Choice",
        "Measurement",
        "Options",
        "Policy",
        "PtDeployError",
        "Result",
        "Split",
        "Splits",
        "Variant",
        "__version__",
        "choose",
        "compare_models",
        "distill_student",
        "load_data",
        "load_variant",
        "optimize_models",
        "promote_choice",
        "read_history",
        "read_optimized",
        "rollback",
        "run_lifecycle",
        "search_students",
        "serve",
        "train_teacher",
        "verify_model",
        "write_report",
        "write_variant",
    ]
    for name in mlflow_pt_deploy.__all__:
        assert getattr(mlflow_pt_deploy, name) is not None


def _declared() -> dict[str, Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    lines = parser["options"]["install_requires"]
    for extra in ("train", "images", "onnx", "openvino", "serve", "search"):
        lines += extras[extra]
    found = [Requirement(line) for line in lines.splitlines() if line and line[0] not in "#%"]
    return {requirement.name: requirement for requirement in found}


def test_conda_yaml_pins_what_setup_cfg_allows() -> None:
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip[0] == f".[all]  # {mlflow_pt_deploy.__version__}"
    pins = {Requirement(line).name: Requirement(line) for line in pip[1:]}
    declared = _declared()
    assert set(pins) == set(declared)
    for name, pin in pins.items():
        (version,) = [specifier.version for specifier in pin.specifier]
        assert version in declared[name].specifier, f"{name}: setup.cfg does not allow {version}"


def test_the_architecture_page_has_the_tree() -> None:
    spec = importlib.util.spec_from_file_location(
        "generate_reference", ROOT / "docs" / "generate_reference.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.tree_differences() == ([], [])


def test_nothing_points_outside_the_clone() -> None:
    """A stranger has only the clone; tests may look beside it and skip."""
    for path in [*PACKAGE.rglob("*.py"), ROOT / "MLproject", ROOT / "Makefile"]:
        assert "../shared" not in path.read_text(encoding="utf8"), path

"""What the repository says of itself is true: imports, pins, the README's tree, public names."""

import ast
import configparser
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import mlflow_pt_deploy

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mlflow_pt_deploy"
# Left to right: a module imports only from its own room or from those before it.
ROOMS = (
    "errors",
    "artifact_files",
    "columns",
    "environment",
    "hardware",
    "interrupt",
    "home",
    "progress",
    "unexpected",
    "child",
    "cost",
    "sigterm",
    "data",
    "preprocess",
    "models",
    "variants",
    "train",
    "augment",
    "rounding",
    "distill",
    "prune",
    "measure",
    "cascades",
    "policy",
    "remarks",
    "search",
    "chart",
    "report",
    "options",
    "students",
    "rehearsal",
    # below this line MLflow is known
    "serving",
    "flavor",
    "promote",
    "database",
    "reach",
    "tracking",
    "plugins",
    "fitting",
    "trial",
    "optimize",
    "stages",
    "searches",
    "pipeline",
    "flags",
    "cli",
)
FIRST_WITH_MLFLOW = ROOMS.index("serving")


def _imports(path: Path) -> set[str]:
    """Names of modules that a file imports while running, type checking left out."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "mlflow_pt_deploy":
                found |= {f"mlflow_pt_deploy.{alias.name}" for alias in node.names}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    room = ROOMS.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "mlflow_pt_deploy" and len(parts) > 1 and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) <= room, f"{path.name} imports {name} from the right"
        if parts[0] == "mlflow":
            assert room >= FIRST_WITH_MLFLOW, f"{path.name} knows MLflow"


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
        "distill_student",
        "load_data",
        "load_variant",
        "optimize_models",
        "promote_choice",
        "read_optimized",
        "run_lifecycle",
        "search_students",
        "serve",
        "train_teacher",
        "write_variant",
    ]
    for name in mlflow_pt_deploy.__all__:
        assert getattr(mlflow_pt_deploy, name) is not None


def _declared() -> dict[str, Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    lines = parser["options"]["install_requires"]
    for extra in ("train", "onnx", "openvino", "serve", "search"):
        lines += extras[extra]
    found = [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]
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


def test_readme_tree_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf8")
    named = set(re.findall(r"^[│ ]*[├└]── (\S+)", text, re.MULTILINE))
    real = {p.name + ("/" if p.is_dir() else "") for p in PACKAGE.iterdir() if p.suffix == ".py"}
    real |= {f"{p.name}/" for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").exists():
            real |= {p.name for p in folder.glob("*.py") if p.name != "__init__.py"}
    assert real <= named, f"README's tree lacks {sorted(real - named)}"


def test_nothing_points_outside_the_clone() -> None:
    """A stranger has only the clone; tests may look beside it and skip."""
    for path in [*PACKAGE.rglob("*.py"), ROOT / "MLproject", ROOT / "Makefile"]:
        assert "../shared" not in path.read_text(encoding="utf8"), path

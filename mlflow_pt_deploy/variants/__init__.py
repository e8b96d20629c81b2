"""Ways to run a model: one runtime a file, the table of them, and the folder they are kept in."""

from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, Variant
from mlflow_pt_deploy.variants.folder import (
    LoadedVariant,
    load_variant,
    verify,
    write_variant,
)
from mlflow_pt_deploy.variants.manifest import Manifest, read_manifest
from mlflow_pt_deploy.variants.table import (
    ON_REQUEST,
    RUNTIMES,
    STATIC_VARIANTS,
    VARIANTS,
    select,
)

__all__ = [
    "ON_REQUEST",
    "RUNTIMES",
    "STATIC_VARIANTS",
    "VARIANTS",
    "Inputs",
    "LoadedVariant",
    "Logits",
    "Manifest",
    "Predict",
    "Variant",
    "load_variant",
    "read_manifest",
    "select",
    "verify",
    "write_variant",
]

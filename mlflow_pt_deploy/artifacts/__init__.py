"""Variants on disk: format, writing, verification and loading.

<name>/
├── manifest.json        name, runtime, options and the SHA-256 of every other file
├── labels.json          class names, in the order of the logits
├── golden.json          a few rows and the logits of this artifact for them
├── preprocessor.json    for text also tokenizer.json
└── ...                  files of the runtime; of a cascade or portable variant, a folder a stage
"""

from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.artifacts.loading import (
    LoadedVariant,
    load_description,
    load_variant,
    verify,
)
from mlflow_pt_deploy.artifacts.manifest import Manifest, read_manifest
from mlflow_pt_deploy.artifacts.portable_writer import write_portable
from mlflow_pt_deploy.artifacts.writing import write_variant

__all__ = [
    "LoadedVariant",
    "Manifest",
    "load_description",
    "load_variant",
    "read_manifest",
    "verify",
    "write_cascade",
    "write_portable",
    "write_variant",
]

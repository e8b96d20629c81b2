"""Variants on disk: their format, and how they are written, checked and loaded.

<name>/
├── manifest.json        what this is, and the SHA-256 of every other file
├── labels.json          names of the classes
├── golden.json          a few rows and the logits that this artifact gave for them
├── preprocessor.json, for texts tokenizer.json
└── ...                  the runtime's own files
"""

from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.artifacts.loading import LoadedVariant, load_variant, verify
from mlflow_pt_deploy.artifacts.manifest import Manifest, read_manifest
from mlflow_pt_deploy.artifacts.writing import write_variant

__all__ = [
    "LoadedVariant",
    "Manifest",
    "load_variant",
    "read_manifest",
    "verify",
    "write_cascade",
    "write_variant",
]

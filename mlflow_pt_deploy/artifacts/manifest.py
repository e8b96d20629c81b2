"""The manifest of a variant: strict parsing and validation of every key, type and path.

A manifest is untrusted input. Its runtime and options decide which code of this package runs, so
they are validated against the table of variants.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.cascade import Cascade
from mlflow_pt_deploy.runtimes.catalog import (
    GPU_VARIANTS,
    ON_REQUEST,
    RUNTIMES,
    STATIC_VARIANTS,
    VARIANTS,
)
from mlflow_pt_deploy.runtimes.portable import Portable
from mlflow_pt_deploy.system.device import CPU, CUDA
from mlflow_pt_deploy.system.regular_files import parse_json, read_regular

FORMAT = 1
MANIFEST = "manifest.json"
LABELS = "labels.json"

_MAX_BYTES = 4 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][\w.+@=,-]{0,254}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Files that a library might unpickle, import or link, even in a runtime without code.
_CODE_SUFFIXES = (
    ".py",
    ".pyc",
    ".pyd",
    ".so",
    ".dll",
    ".dylib",
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".ckpt",
)
_CODE_PREFIXES = ("pytorch_model", "training_args", "optimizer")


@dataclass(frozen=True)
class Manifest:
    """Description of a variant, as stored in its folder.

    Attributes:
        name: ``<model>-<runtime>-<precision>``.
        model: ``teacher``, ``student`` or ``model``.
        runtime: Key of `RUNTIMES`.
        precision: See `Variant.precision`.
        options: Runtime-specific options of the variant.
        cpu_flags: Instruction sets that the native files require.
        libraries: Library versions at export.
        files: Maps relative path to SHA-256, for every file except the manifest.
        digest: SHA-256 of the manifest; identifies the content of the whole folder.
    """

    name: str
    model: str
    runtime: str
    precision: str
    options: dict[str, Any]
    cpu_flags: tuple[str, ...]
    libraries: dict[str, str]
    files: dict[str, str]
    digest: str = field(default="", compare=False)

    @property
    def device(self) -> str:
        """Kind of device that the variant was built for, see `Variant.device`."""
        return str(self.options.get("device", CPU))

    @property
    def carries_code(self) -> bool:
        """Whether the native files contain code, see `Variant.carries_code`."""
        # Declared for all stages; each is checked again when it is loaded.
        return RUNTIMES[self.runtime].carries_code or bool(self.options.get("trusted"))

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Runtimes that must be installed: its own, or those of its stages."""
        stages = RUNTIMES[self.runtime].stages
        return tuple(self.options[stage].split("-")[1] for stage in stages) or (self.runtime,)

    @property
    def gpu_runtime(self) -> str:
        """The runtime of `runtimes` that runs on a GPU; empty if none does."""
        return self.runtimes[-1] if self.device == CUDA else ""

    def variant(self) -> Variant:
        """Return the variant with the options of this manifest.

        Raises:
            ArtifactError: The precision or an option is unknown or invalid.
        """
        kind = RUNTIMES[self.runtime]
        known = {variant.precision for variant in _ALL_VARIANTS if isinstance(variant, kind)}
        if self.precision not in known:
            raise _invalid(self.name, f"precision {self.precision} is unknown for {self.runtime}")
        defaults = {each.name: each.default for each in fields(kind) if each.name != "precision"}
        for key, value in self.options.items():
            if key not in defaults:
                raise _invalid(self.name, f"{self.runtime} has no option {key[:80]!r}")
            if not _same_type(value, defaults[key]):
                raise _invalid(self.name, f"options.{key} is not a {type(defaults[key]).__name__}")
        options: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()
        }
        variant = kind(precision=self.precision, **options)
        if isinstance(variant, Cascade) and not 0 <= variant.threshold <= 1:
            raise _invalid(self.name, "options.threshold is not between 0 and 1")
        _check_stages(self.name, variant)
        return variant


_ALL_VARIANTS: tuple[Variant, ...] = (
    *VARIANTS,
    *STATIC_VARIANTS,
    *ON_REQUEST,
    *GPU_VARIANTS,
    Cascade(),
    Portable(),
)


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a variant; file digests are not verified here.

    Raises:
        ArtifactError: The manifest is missing, of another format version, or invalid; the message
            names the key.
    """
    try:
        text = read_regular(folder / MANIFEST, _MAX_BYTES)
        content = parse_json(
            text, MANIFEST, parse_constant=_no_constant, object_pairs_hook=_no_duplicates
        )
    except ArtifactError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        prefix = " is not a variant: its" if missing else ":"
        raise ArtifactError(f"{folder.name}{prefix} {error}") from error
    if not isinstance(content, dict):
        raise _invalid(folder.name, "is not a JSON object")
    format_, runtime = content.pop("format", None), content.get("runtime")
    known = isinstance(runtime, str) and runtime in RUNTIMES
    if type(format_) is not int or format_ != FORMAT or not known:
        raise ArtifactError(
            f"{folder.name} was written by another version of mlflow-pt-deploy (this one reads "
            f"format {FORMAT}). Install the version that wrote it, or export again."
        )
    _check(folder.name, content)
    content["cpu_flags"] = tuple(content["cpu_flags"])
    return Manifest(**content, digest=hashlib.sha256(text).hexdigest())


def _check(name: str, content: dict[str, Any]) -> None:
    """Validate keys and types; options are validated when the variant is loaded."""
    expected = {each.name for each in fields(Manifest)} - {"digest"}
    if different := sorted(expected.symmetric_difference(content)):
        raise _invalid(name, f"{different[0][:80]!r} is missing or unknown")
    for key in ("name", "model", "runtime", "precision"):
        if not isinstance(content[key], str) or not _NAME.fullmatch(content[key]):
            raise _invalid(name, f"{key} is not a valid name")
    flags = content["cpu_flags"]
    if not isinstance(flags, list) or not all(_is_name(flag) for flag in flags):
        raise _invalid(name, "cpu_flags is not a list of names")
    for key in ("options", "libraries", "files"):
        if not isinstance(content[key], dict):
            raise _invalid(name, f"{key} is not a JSON object")
    versions = [*content["libraries"], *content["libraries"].values()]  # these are logged
    if not all(isinstance(v, str) and v.isprintable() and len(v) <= 255 for v in versions):
        raise _invalid(name, "libraries contains an invalid version")
    carries_code = RUNTIMES[content["runtime"]].carries_code
    for path, digest in content["files"].items():
        if not _is_inside(path):
            raise _invalid(name, f"files: {_shown(path)} is not a path inside the folder")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _invalid(name, f"files has no SHA-256 for {_shown(path)}")
        # Stages have manifests of their own.
        if not carries_code and "/" not in path and _may_carry_code(path):
            raise _invalid(name, f"files: {content['runtime']} never writes {_shown(path)}")


def _check_stages(name: str, variant: Variant) -> None:
    """Check that the options name a variant without stages for each stage."""
    for stage in variant.stages:
        given = getattr(variant, stage)
        parts = given.split("-")
        if len(parts) < 3 or parts[1] not in RUNTIMES or RUNTIMES[parts[1]].stages:
            raise _invalid(name, f"options contains {_shown(given)}, which is not a variant name")


def _same_type(value: object, default: object) -> bool:
    """Whether a JSON value has the same type as the default of an option."""
    if isinstance(default, tuple):
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 2**63 and math.isfinite(value)  # type: ignore[arg-type]
    if isinstance(default, int) and not isinstance(default, bool):
        return type(value) is int and abs(value) < 2**63
    return type(value) is type(default)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_inside(path: str) -> bool:
    """Whether a path is printable, relative and inside its folder."""
    parts = path.split("/")
    plain = path.isprintable() and "\\" not in path and len(path) <= 1024
    return plain and path != MANIFEST and not {"", ".", ".."} & set(parts)


def _may_carry_code(path: str) -> bool:
    return path.lower().endswith(_CODE_SUFFIXES) or path.startswith(_CODE_PREFIXES)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a duplicate key")
    return found


def _shown(path: str) -> str:
    return ascii(path[:80])


def _invalid(name: str, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{name}: {MANIFEST}: {problem}. The artifact is damaged; download it or export the "
        "variant again."
    )

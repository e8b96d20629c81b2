"""What a variant's folder says of itself, read strictly: every key, every type, every path.

A manifest comes from outside with the rest of an artifact. Its runtime and its options decide
which code of this package runs, so they are held to the table of variants.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.artifact_files import parse_json, read_regular
from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.variants.base import Variant
from mlflow_pt_deploy.variants.cascade import Cascade
from mlflow_pt_deploy.variants.table import ON_REQUEST, RUNTIMES, STATIC_VARIANTS, VARIANTS

FORMAT = 1
MANIFEST = "manifest.json"

_MAX_BYTES = 4 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][\w.+@=,-]{0,254}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Files that a library of a runtime without code might still unpickle, import or link.
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")
_CODE_NAMES = ("pytorch_model", "training_args", "optimizer")


@dataclass(frozen=True)
class Manifest:
    """What a variant's folder says of itself.

    Attributes:
        name: ``<model>-<runtime>-<precision>``.
        model: ``teacher``, ``student`` or ``model``.
        runtime: Key of `RUNTIMES`.
        precision: See `Variant.precision`.
        options: The variant's own options, as given.
        cpu_flags: Instruction sets without which the native files cannot run.
        libraries: Versions that wrote the folder.
        files: Relative path to SHA-256, for every file but the manifest.
        digest: SHA-256 of the manifest itself; it stands for the whole folder.
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
    def carries_code(self) -> bool:
        """Whether the native files hold a program, see `Variant.carries_code`."""
        # A cascade says it of its stages; where that is a lie, its stages refuse to load.
        return RUNTIMES[self.runtime].carries_code or bool(self.options.get("trusted"))

    @property
    def runtimes(self) -> tuple[str, ...]:
        """What must be installed to run it: its own runtime, or those of a cascade's stages."""
        if self.runtime != Cascade.runtime:
            return (self.runtime,)
        return tuple(self.options[stage].split("-")[1] for stage in ("fast", "strong"))

    def variant(self) -> Variant:
        """The variant that wrote the folder.

        Raises:
            ArtifactError: There is no such variant, or an option is not one of its own.
        """
        kind = RUNTIMES[self.runtime]
        known = {variant.precision for variant in _EVERY if isinstance(variant, kind)}
        if self.precision not in known:
            raise _odd(self.name, f"precision {self.precision} is unknown for {self.runtime}")
        defaults = {each.name: each.default for each in fields(kind) if each.name != "precision"}
        for key, value in self.options.items():
            if key not in defaults:
                raise _odd(self.name, f"options.{key[:80]!r} is no option of {self.runtime}")
            if not _same_type(value, defaults[key]):
                raise _odd(self.name, f"options.{key} is not a {type(defaults[key]).__name__}")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()}
        variant = kind(precision=self.precision, **options)
        if isinstance(variant, Cascade):
            _check_cascade(self.name, variant)
        return variant


_EVERY: tuple[Variant, ...] = (*VARIANTS, *STATIC_VARIANTS, *ON_REQUEST, Cascade())


def read_manifest(folder: Path) -> Manifest:
    """Read a variant's manifest; the files that it names are not verified yet.

    Raises:
        ArtifactError: There is none, it is not of a format this version reads, or something in it
            is not what this package writes; names the key.
    """
    try:
        text = read_regular(folder / MANIFEST, _MAX_BYTES)
        content = parse_json(
            text, MANIFEST, parse_constant=_no_constant, object_pairs_hook=_no_duplicates
        )
    except ArtifactError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        relation = " is not a variant: its" if missing else ":"
        raise ArtifactError(f"{folder.name}{relation} {error}") from error
    if not isinstance(content, dict):
        raise _odd(folder.name, "is not a table of keys")
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
    """Hold a manifest's keys to their types; options are held to the variant when it is loaded."""
    wanted = {each.name for each in fields(Manifest)} - {"digest"}
    if odd := sorted(wanted.symmetric_difference(content)):
        raise _odd(name, f"{odd[0][:80]!r} is missing or unknown")
    for key in ("name", "model", "runtime", "precision"):
        if not isinstance(content[key], str) or not _NAME.fullmatch(content[key]):
            raise _odd(name, f"{key} is not a name")
    flags = content["cpu_flags"]
    if not isinstance(flags, list) or not all(_is_name(flag) for flag in flags):
        raise _odd(name, "cpu_flags is not a list of names")
    for key in ("options", "libraries", "files"):
        if not isinstance(content[key], dict):
            raise _odd(name, f"{key} is not a table")
    versions = [*content["libraries"], *content["libraries"].values()]  # these go into the log
    if not all(isinstance(v, str) and v.isprintable() and len(v) <= 255 for v in versions):
        raise _odd(name, "libraries holds something other than versions")
    carries_code = RUNTIMES[content["runtime"]].carries_code
    for path, digest in content["files"].items():
        if not _is_inside(path):
            raise _odd(name, f"files names {_shown(path)}, which is not a path below the folder")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _odd(name, f"files has no SHA-256 for {_shown(path)}")
        # A cascade's stages are read by themselves.
        if not carries_code and "/" not in path and _may_carry_code(path):
            raise _odd(name, f"files names {_shown(path)}, which {content['runtime']} never has")


def _check_cascade(name: str, cascade: Cascade) -> None:
    if not 0 <= cascade.threshold <= 1:
        raise _odd(name, "options.threshold is not between 0 and 1")
    for stage in (cascade.fast, cascade.strong):
        parts = stage.split("-")
        if len(parts) < 3 or parts[1] not in RUNTIMES or parts[1] == Cascade.runtime:
            raise _odd(name, f"options names {_shown(stage)}, which is no variant")


def _same_type(value: object, default: object) -> bool:
    """Whether a JSON value has the type of an option's default."""
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
    """Whether a path is plain, relative and leads to a place below its folder."""
    parts = path.split("/")
    plain = path.isprintable() and "\\" not in path and len(path) <= 1024
    return plain and path != MANIFEST and not {"", ".", ".."} & set(parts)


def _may_carry_code(path: str) -> bool:
    return path.lower().endswith(_CODE) or path.startswith(_CODE_NAMES)


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def _shown(path: str) -> str:
    return ascii(path[:80])


def _odd(name: str, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{name}: {MANIFEST}: {problem}. The artifact is damaged; download it or export the "
        "variant again."
    )

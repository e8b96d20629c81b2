"""Open, list, copy, link and hash the files of an artifact, regular files only.

An artifact is untrusted. A symbolic link can lead out of its folder, opening a FIFO blocks, and
reading a device may never end. Files are therefore opened with ``O_NOFOLLOW`` and ``O_NONBLOCK``,
and their type is checked on the open descriptor.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import ArtifactError

MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file that is read, in bytes."""

_CURE = "The artifact is damaged; download or export it again."
_MAX_FILES = 10_000
_MAX_DEPTH = 16
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


def open_regular(path: Path | str, *, folder: int | None = None, label: str = "") -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: Path of the file.
        folder: Descriptor of the folder that `path` is relative to.
        label: Name in error messages; default: the file name.

    Raises:
        ArtifactError: The file is missing, unreadable or not a regular file.
    """
    label = label or Path(path).name
    try:
        descriptor = os.open(path, _FLAGS, dir_fd=folder)
    except OSError as error:
        raise ArtifactError(_unreadable(label, error, path, folder)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArtifactError(_not_regular(label))
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        ArtifactError: See `open_regular`; or the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ArtifactError(f"{path.name} is larger than {limit:,} bytes. {_CURE}")
    return content


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file of an artifact.

    Raises:
        ArtifactError: See `read_regular`; or the file is not JSON in UTF-8.
    """
    return parse_json(read_regular(path, limit), path.name)


def parse_json(content: bytes, label: str, **options: Any) -> Any:
    """Parse JSON.

    Args:
        content: JSON in UTF-8.
        label: Name in error messages.
        **options: Keyword arguments of `json.loads`.

    Raises:
        ArtifactError: The content is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(content.decode("utf8"), **options)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and huge integers
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ArtifactError(f"{label} is not readable JSON: {reason}. {_CURE}") from error


def parse_yaml(content: bytes, label: str) -> Any:
    """Parse YAML of plain values.

    Merge keys are rejected, since a few lines of them can expand to gigabytes; so are duplicate
    keys.

    Raises:
        ArtifactError: The content is not such YAML.
    """
    import yaml

    class Reader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.YAMLError("it has a merge key (<<)")

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            found: dict[Any, Any] = super().construct_mapping(node, deep=deep)
            if len(found) != len(node.value):
                raise yaml.YAMLError("it has a key twice")
            return found

    try:
        return yaml.load(content.decode("utf8"), Reader)
    # the others: invalid numbers and dates, mappings as keys, deep nesting
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(f"{label} is not readable YAML: {reason}. {_CURE}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal.

    Raises:
        ArtifactError: See `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Sorted relative paths of all files below a folder, without opening them.

    Raises:
        ArtifactError: The folder has other entries than regular files and folders, or too many.
    """
    found: list[str] = []
    for root, folders, files, descriptor in _walk(folder):
        inside = Path(root).relative_to(folder)
        if len(inside.parts) > _MAX_DEPTH or len(found) + len(files) + len(folders) > _MAX_FILES:
            raise ArtifactError(
                f"{folder.name} has more than {_MAX_FILES:,} files, or folders nested more than "
                f"{_MAX_DEPTH} deep. It is not a model of pt-deploy."
            )
        for name in (*folders, *files):
            label = (inside / name).as_posix()
            mode = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode
            if stat.S_ISREG(mode):
                found.append(label)
            elif not stat.S_ISDIR(mode):
                raise ArtifactError(_not_regular(label))
    return sorted(found)


def copy_files(source: Path, target: Path) -> None:
    """Copy a folder of regular files to a new folder, without following links.

    Raises:
        ArtifactError: See `list_files` and `open_regular`.
    """
    list_files(source)  # rejects before anything is written
    for root, _, files, descriptor in _walk(source):
        folder = target / Path(root).relative_to(source)
        folder.mkdir()
        for name in files:
            copy_file(name, folder / name, folder=descriptor)


def link_files(source: Path, target: Path) -> None:
    """`copy_files` with hard links where both folders are on one file system that has them.

    Raises:
        ArtifactError: See `copy_files`.
    """
    list_files(source)
    for root, _, files, descriptor in _walk(source):
        folder = target / Path(root).relative_to(source)
        folder.mkdir()
        for name in files:
            try:
                os.link(name, folder / name, src_dir_fd=descriptor, follow_symlinks=False)
            except OSError:
                copy_file(name, folder / name, folder=descriptor)


def copy_file(source: Path | str, target: Path, *, folder: int | None = None) -> None:
    """Copy one regular file, without following a link.

    Args:
        source: The file; `folder` as for `open_regular`.
        target: Path of the copy; an existing file is overwritten.

    Raises:
        ArtifactError: See `open_regular`.
    """
    with open_regular(source, folder=folder) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, 2**20)


def open_to_readers(folder: Path) -> None:
    """Make a folder and its content readable by every user: files 0644, folders 0755.

    safetensors writes 0600 and `tempfile.mkdtemp` creates 0700, whatever the umask is; a server
    often runs as another user than the export.
    """
    for root, folders, files, _ in _walk(folder):
        for names, mode in ((folders, _FOLDER_MODE), (files, _FILE_MODE)):
            for name in names:
                (Path(root) / name).chmod(mode)


def _walk(folder: Path) -> Any:
    """`os.fwalk` without following links; a folder that cannot be listed is an error."""

    def stop(error: OSError) -> None:
        name = Path(error.filename or folder).name
        raise ArtifactError(_unreadable(name, error, folder, None)) from error

    return os.fwalk(folder, follow_symlinks=False, onerror=stop)


def _not_regular(label: str) -> str:
    return (
        f"{label} is not a regular file but a link, a pipe, a socket or a device. A model "
        "consists of regular files; copy it with cp -rL, or download it again."
    )


def _unreadable(label: str, error: OSError, path: Path | str, folder: int | None) -> str:
    try:
        mode = os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode
    except OSError:
        mode = 0
    if isinstance(error, FileNotFoundError):
        return f"{label} is missing. The artifact is incomplete; download or export it again."
    if mode and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return _not_regular(label)
    if isinstance(error, PermissionError):
        return (
            f"{label} may not be read by this user ({error.strerror}). Give the serving user read "
            "permission on the whole model, e.g. with chmod -R a+rX."
        )
    return f"{label} cannot be read: {error.strerror}."

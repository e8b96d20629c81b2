"""Regular files only: how the files of an artifact are opened, listed, copied and written.

An artifact comes from outside. A symbolic link can lead out of its folder, opening a FIFO blocks,
reading a device never ends. Each file is therefore opened without following links and without
waiting, and its kind is checked on the open descriptor.
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
"""Size of the largest JSON file that is read whole."""

_CURE = "The artifact is damaged; download or export it again."
_MAX_FILES = 10_000
_MAX_DEPTH = 16
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


def open_regular(path: Path | str, *, folder: int | None = None, label: str = "") -> BufferedReader:
    """Open a regular file for reading.

    Args:
        path: The file.
        folder: Descriptor of the folder that `path` is relative to.
        label: What messages call the file; default: its name.

    Raises:
        ArtifactError: It is missing, may not be read, or is not a regular file.
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
    """Content of a regular file of at most `limit` bytes.

    Raises:
        ArtifactError: As `open_regular`; or the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ArtifactError(f"{path.name} is larger than {limit:,} bytes. {_CURE}")
    return content


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file of an artifact.

    Raises:
        ArtifactError: As `read_regular`; or it is not JSON in UTF-8.
    """
    return parse_json(read_regular(path, limit), path.name)


def parse_json(content: bytes, label: str, **options: Any) -> Any:
    """Parse JSON, any failure told in one sentence.

    Args:
        content: JSON in UTF-8.
        label: What the message calls it.
        **options: As `json.loads` takes them.

    Raises:
        ArtifactError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(content.decode("utf8"), **options)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and endless numbers
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ArtifactError(f"{label} is not readable JSON: {reason}. {_CURE}") from error


def parse_yaml(content: bytes, label: str) -> Any:
    """Parse YAML of plain values, any failure told in one sentence.

    Merge keys are refused, since a few lines of them can multiply to gigabytes, and duplicate keys.

    Raises:
        ArtifactError: It is not such YAML.
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
    # The rest: odd numbers and dates, keys that are tables, and a thousand brackets.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(f"{label} is not readable YAML: {reason}. {_CURE}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal.

    Raises:
        ArtifactError: As `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative paths of all files below a folder, in order; nothing is opened.

    Raises:
        ArtifactError: There is something other than regular files and folders, or too much of it.
    """
    found: list[str] = []
    for root, folders, files, descriptor in _walk(folder):
        inside = Path(root).relative_to(folder)
        if len(inside.parts) > _MAX_DEPTH or len(found) + len(files) + len(folders) > _MAX_FILES:
            raise ArtifactError(
                f"{folder.name} holds more than {_MAX_FILES:,} files, or folders in each other "
                f"more than {_MAX_DEPTH} deep. That is no model of pt-deploy."
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
    """Copy a folder of regular files, without following links, into a folder that does not exist.

    Raises:
        ArtifactError: As `list_files` and `open_regular`.
    """
    list_files(source)  # refuses before anything is written
    for root, _, files, descriptor in _walk(source):
        folder = target / Path(root).relative_to(source)
        folder.mkdir()
        for name in files:
            copy_file(name, folder / name, folder=descriptor)


def copy_file(source: Path | str, target: Path, *, folder: int | None = None) -> None:
    """Copy one regular file, without following a link.

    Args:
        source: The file; `folder` as for `open_regular`.
        target: Where to; a file that is there is overwritten.

    Raises:
        ArtifactError: As `open_regular`.
    """
    with open_regular(source, folder=folder) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, 2**20)


def open_to_readers(folder: Path) -> None:
    """Let every user read a folder and all below it: files 0644, folders 0755.

    safetensors writes 0600 and `tempfile.mkdtemp` makes 0700, whatever the umask is; a server
    often runs as another user than the one that exported.
    """
    for root, folders, files, _ in _walk(folder):
        for names, mode in ((folders, _FOLDER_MODE), (files, _FILE_MODE)):
            for name in names:
                (Path(root) / name).chmod(mode)


def _walk(folder: Path) -> Any:
    """`os.fwalk`, which never follows a link; a folder that cannot be listed is an error."""

    def stop(error: OSError) -> None:
        name = Path(error.filename or folder).name
        raise ArtifactError(_unreadable(name, error, folder, None)) from error

    return os.fwalk(folder, follow_symlinks=False, onerror=stop)


def _not_regular(label: str) -> str:
    return (
        f"{label} is not a regular file: it is a link, a pipe, a socket or a device. A model "
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
            f"{label} may not be read by this user ({error.strerror}). Give the user that serves "
            "read permission on all of the model, e.g. with chmod -R a+rX."
        )
    return f"{label} cannot be read: {error.strerror}."

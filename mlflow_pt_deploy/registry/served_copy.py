"""Local copies of the versions that served last, for a start while the registry is down.

    PT_DEPLOY_HOME/served/<model>-<key>/
    ├── lock                    held (flock) while the copy is replaced, read or removed
    ├── in-use                  held (flock, shared) by each process that serves the URI
    ├── copy.json               what is copied, and the name of the folder
    └── <version>-<random>/     the model as it was fetched

There is one for each registry and URI. `copy.json` is replaced by renaming once the new folder is
whole; then the old folder is removed. Of the copies of a registered model, those that a server uses
stay, and the two that were used last. Others are renamed to ``.removed-<random>``, then deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import ArtifactError, TrackingError
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG, ResolvedVersion, without_password
from mlflow_pt_deploy.registry.fetch import Fetched
from mlflow_pt_deploy.registry.mlmodel import check_digest, digest, read_mlmodel
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.paths import home
from mlflow_pt_deploy.system.regular_files import link_files, list_files, read_json

_NOTE, _LOCK, _IN_USE = "copy.json", "lock", "in-use"
_REMOVED = ".removed-"
_NEWEST = 2
_SERVERS = ("http", "databricks", "postgresql", "mysql", "mssql", "uc:")


@dataclass(frozen=True)
class ServedCopy:
    """A copy of a version.

    Attributes:
        place: Folder of the copy and its note.
        folder: Name of the folder with the model.
        version: The version.
        tags: Its registry tags when it was copied.
        digest: Its digest, see `mlmodel.digest`.
        kept_at: When it was copied.
    """

    place: Path
    folder: str
    version: ResolvedVersion
    tags: Mapping[str, str]
    digest: str
    kept_at: str

    def fetch(self, resolved: ResolvedVersion, folder: Path) -> Fetched:
        """Put the copy into a private folder and verify it, as `fetch.fetch` does.

        Raises:
            ArtifactError: It is damaged, or it differs from the promoted content.
            ModelError: It is no model of this package.
            TrackingError: It was replaced meanwhile.
        """
        root = folder / "model"
        with _locked(self.place):
            if _read(self.place) != self:
                raise TrackingError("the copy was replaced by a newer one; start the server again.")
            if not (self.place / self.folder).is_dir():
                raise ArtifactError("the files of the copy are missing.")
            link_files(self.place / self.folder, root)
        list_files(root)
        mlmodel = read_mlmodel(root)
        for label, known in (("of the copy", self.digest), (DIGEST_TAG, self.tags.get(DIGEST_TAG))):
            if known:
                check_digest(root, known, label)
        return Fetched(root, mlmodel, self.tags)

    def discard(self) -> None:
        """Forget a damaged copy, so that it is made again."""
        with suppress(OSError, ArtifactError), _locked(self.place):
            if _read(self.place) == self:
                (self.place / _NOTE).unlink()


class ServedCopies:
    """The copies of this user.

    Args:
        registry: Returns the URI of the registry.
    """

    def __init__(self, registry: Callable[[], str] | None = None) -> None:
        self._registry = registry or _registry_uri
        self._in_use: set[Path] = set()
        self._lock = threading.Lock()

    def find(self, uri: str) -> ServedCopy | None:
        """The copy of what `uri` meant when it was last served; None if there is none.

        Raises:
            ArtifactError: The note of the copy is damaged, or its folder is not private.
        """
        if not needs_copy(uri):
            return None
        place = self._place(uri)
        if not (place / _NOTE).exists():
            return None
        _check_private(place.parent)
        return _read(place)

    def keep(self, uri: str, version: ResolvedVersion, root: Path, tags: Mapping[str, str]) -> None:
        """Copy a version that serves, with hard links where possible.

        Nothing is copied if another worker has done it, or if `uri` is a folder. The copy is in use
        from now on, for as long as this object exists. Old copies of the model are removed.

        Args:
            uri: What it was resolved from.
            version: The version.
            root: Its files, as they were fetched.
            tags: Its registry tags.

        Raises:
            ArtifactError: `root` is damaged, or the folder of the copies is not private.
            OSError: The copy cannot be written.
        """
        if not needs_copy(uri):
            return
        place = self._place(uri)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(place.parent)
        self._use(place)
        found = digest(root)
        copy = ServedCopy(place, _folder_name(version), version, dict(tags), found, now())
        with _locked(place):
            if not _is_kept(copy):
                _copy(copy, root)
            kept = _read(place).folder
            for other in place.iterdir():
                if other.is_dir() and other.name != kept:
                    shutil.rmtree(other, ignore_errors=True)
        _remove_old(place.parent, version.name)

    def _use(self, place: Path) -> None:
        """Hold the shared lock of a place, which is made if it does not exist."""
        with self._lock:
            while place not in self._in_use:
                place.mkdir(mode=0o700, exist_ok=True)
                with suppress(FileNotFoundError):  # it was removed meanwhile
                    held = _open(place / _IN_USE)
                    fcntl.flock(held, fcntl.LOCK_SH)
                    os.utime(held)
                    if _is_at(held, place / _IN_USE):
                        self._in_use.add(place)
                        weakref.finalize(self, os.close, held)
                    else:
                        os.close(held)

    def _place(self, uri: str) -> Path:
        key = hashlib.sha256(f"{self._registry()}\n{uri}".encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "-", uri.partition(":/")[2]).strip("-.")[:60]
        return home() / "served" / f"{name}-{key}"


def needs_copy(uri: str) -> bool:
    """Whether a model is fetched from elsewhere: a folder of this machine is its own copy."""
    return ":/" in uri and not uri.startswith("file:")


def _registry_uri() -> str:
    """The URI of the registry without a password; that of a file with the current folder."""
    import mlflow

    uri = str(mlflow.get_registry_uri())
    if not uri.startswith(_SERVERS):
        uri = f"{uri} in {os.getcwd()}"
    return without_password(uri)


def _folder_name(version: ResolvedVersion) -> str:
    return f"{version.version or 'model'}-{secrets.token_hex(4)}"


def _check_private(folder: Path) -> None:
    """Check that only this user can change a folder: what it holds is served."""
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ArtifactError(
            f"the folder '{folder.name}' in PT_DEPLOY_HOME is not private to this user; remove it "
            "or set its mode to 0700."
        )


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    with (place / _LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_kept(copy: ServedCopy) -> bool:
    """Whether there is such a copy already."""
    try:
        before = _read(copy.place)
        return (before.version, before.digest, before.tags.get(DIGEST_TAG)) == (
            copy.version,
            copy.digest,
            copy.tags.get(DIGEST_TAG),
        ) and digest(before.place / before.folder) == copy.digest
    except ArtifactError:
        return False


def _copy(copy: ServedCopy, root: Path) -> None:
    try:
        link_files(root, copy.place / copy.folder)
        _write(copy)
    except BaseException:
        shutil.rmtree(copy.place / copy.folder, ignore_errors=True)
        raise


def _remove_old(served: Path, name: str | None) -> None:
    """Remove copies of a model that no process uses, except those used last."""
    for removed in served.glob(f"{_REMOVED}*"):  # by a process that ended before it deleted them
        shutil.rmtree(removed, ignore_errors=True)
    found = [
        (used_at, place)
        for place in served.iterdir()
        if (used_at := _used_at(place, name)) is not None
    ]
    for _, place in sorted(found, reverse=True)[_NEWEST:]:
        with suppress(OSError):  # it is in use, or another process has removed it
            _remove(place)


def _used_at(place: Path, name: str | None) -> float | None:
    """When a copy of this model was last used, 0 if it is damaged; None for other models."""
    try:
        if _read(place).version.name != name:
            return None
        return max(each.stat().st_mtime for each in (place / _NOTE, place / _IN_USE))
    except (ArtifactError, OSError):
        return 0.0


def _remove(place: Path) -> None:
    """Remove a copy.

    Raises:
        OSError: A process uses it, or it does not exist.
    """
    with ExitStack() as closing:
        for name in (_IN_USE, _LOCK):
            lock = _open(place / name)
            closing.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed = place.with_name(f"{_REMOVED}{secrets.token_hex(4)}")
        os.rename(place, removed)
        shutil.rmtree(removed, ignore_errors=True)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_at(held: int, path: Path) -> bool:
    """Whether an open file is still at its path; a missing one is not."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(held), path.stat())
    return False


def _write(copy: ServedCopy) -> None:
    document = {**asdict(copy), "place": None}
    temporary = copy.place / f"{_NOTE}.new"
    temporary.write_text(json.dumps(document), encoding="utf8")
    os.replace(temporary, copy.place / _NOTE)


def _read(place: Path) -> ServedCopy:
    document: Any = read_json(place / _NOTE)
    try:
        version = ResolvedVersion(**document["version"])
        copy = ServedCopy(**{**document, "place": place, "version": version})
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{_NOTE} is not the note of a copy; remove it.") from error
    if Path(str(copy.folder)).name != copy.folder:
        raise ArtifactError(f"{_NOTE} names a folder elsewhere; remove it.")
    return copy

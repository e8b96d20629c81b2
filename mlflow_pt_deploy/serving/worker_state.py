"""State that the workers of one server share through files in its run directory.

    RUN_DIR/
    ├── worker-<index>.lock    held (flock) by the worker with this index; free once it has died
    ├── worker-<index>.json    its state: versions, readiness, failure
    ├── counts-<index>-<pid>.json   what it answered, also of workers that have died
    ├── <name>.json            documents of the leader: `publish`
    ├── feedback.db            answers and the labels sent for them, if feedback is on
    ├── leader.lock            held (flock) by the worker that runs the duties of the server
    ├── tmp-<index>/           its model copies; emptied when it starts
    ├── metrics/               prometheus_client's multiprocess files
    ├── registry-changed       its time is that of the last webhook
    ├── draining               exists once readiness is off
    └── stopping               exists once the port is being closed

Files are written under another name and renamed, so a reader never sees an incomplete one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.system.child_process import is_running

_PREFIX = "pt-deploy-run-"


class WorkerStates:
    """State files of a server's workers.

    Args:
        folder: The run directory.
        count: Workers of the server.

    Attributes:
        index: Index of this worker; None in the main process.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self.index: int | None = None
        self._lock: Any = None
        self._leader_lock: Any = None
        self._started = False

    def claim(self) -> int:
        """Take the first free worker index for this process, and empty its scratch folder."""
        for index in range(self.count):
            lock = (self.folder / f"worker-{index}.lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                continue
            self._lock, self.index = lock, index
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(mode=0o700)
            return index
        raise RuntimeError("every worker index is taken")

    def close(self) -> None:
        """Give the index and the lead back; a process that ends need not."""
        for lock in (self._lock, self._leader_lock):
            if lock is not None:
                lock.close()
        self._lock = self._leader_lock = None

    def predecessor(self) -> int | None:
        """Process id of the worker that had this index before, if it wrote its state."""
        assert self.index is not None
        state = self._written().get(self.index)
        return None if state is None else int(state["pid"])

    @property
    def scratch(self) -> Path:
        """Folder for this worker's temporary files."""
        return self.folder / f"tmp-{self.index}"

    @property
    def draining(self) -> bool:
        """Whether the server is about to shut down."""
        return (self.folder / "draining").exists()

    def start_draining(self) -> None:
        """Make every worker's ``/readyz`` fail."""
        (self.folder / "draining").touch()

    @property
    def stopping(self) -> bool:
        """Whether the workers are ending."""
        return (self.folder / "stopping").exists()

    def start_stopping(self) -> None:
        """Let workers end as soon as they answer no request."""
        (self.folder / "stopping").touch()

    def note_registry_change(self) -> None:
        """Let every worker poll the registry."""
        path, now = self.folder / "registry-changed", time.time_ns()
        path.open("a").close()
        os.utime(path, ns=(now, now))  # the kernel's own time has steps of milliseconds

    def registry_changed_at(self) -> int:
        """When a webhook said that the registry has changed, in nanoseconds; 0: never."""
        try:
            return (self.folder / "registry-changed").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def write(self, state: Mapping[str, Any]) -> None:
        """Publish this worker's state."""
        _write(self.folder / f"worker-{self.index}.json", {"pid": os.getpid(), **state})

    def lead(self) -> bool:
        """Whether this worker runs the duties of the server; it becomes the leader if none is."""
        if self._leader_lock is None:
            lock = (self.folder / "leader.lock").open("w")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                return False
            self._leader_lock = lock
        return True

    def write_counts(self, counts: Mapping[str, Any]) -> None:
        """Publish what this worker answered, by model and version."""
        _write(self.folder / f"counts-{self.index}-{os.getpid()}.json", counts)

    def counts(self) -> list[dict[str, Any]]:
        """What each worker answered, by model and version; also of workers that have died."""
        return self.published("counts-*")

    def publish(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a document that the workers share."""
        _write(self.folder / f"{name}.json", document)

    def published(self, pattern: str) -> list[dict[str, Any]]:
        """The documents whose names match."""
        return [
            json.loads(path.read_text(encoding="utf8"))
            for path in sorted(self.folder.glob(f"{pattern}.json"))
        ]

    def document(self, name: str) -> dict[str, Any]:
        """A document that `publish` wrote; empty if none did."""
        return next(iter(self.published(name)), {})

    def read(self) -> dict[int, dict[str, Any]]:
        """The states of all workers that run, by index."""
        return {
            index: state for index, state in self._written().items() if is_running(state["pid"])
        }

    def started(self) -> bool:
        """Whether every worker has been ready.

        From then on the server is ready although a worker has died: the one that replaces it does
        not listen before it is ready.
        """
        if not self._started:
            states = self._written().values()
            ready = [state for state in states if state.get("ready")]
            self._started = len(ready) == self.count
        return self._started

    def served(self) -> dict[str, Any]:
        """The last served version of each model, in any worker; for a worker that restarts."""
        found: dict[str, Any] = {}
        for state in self._written().values():
            found |= state.get("served", {})
        return found

    def of_model(self, name: str) -> list[dict[str, Any]]:
        """State of one model in each running worker."""
        return [
            {"replica": index, "pid": state["pid"], **state.get("models", {}).get(name, {})}
            for index, state in sorted(self.read().items())
        ]

    def failure(self) -> str:
        """Why a worker could not open a model at the first start; empty if none failed."""
        reasons = (state.get("failed") for state in self._written().values())
        return next((str(reason) for reason in reasons if reason), "")

    def _written(self) -> dict[int, dict[str, Any]]:
        """The last state of each worker, by index; also of one that has died."""
        found = {}
        for index in range(self.count):
            with suppress(FileNotFoundError):
                path = self.folder / f"worker-{index}.json"
                found[index] = json.loads(path.read_text(encoding="utf8"))
        return found


def new_run_folder() -> Path:
    """Create a run directory, and remove those of servers that were killed."""
    root = Path(tempfile.gettempdir())
    for old in root.glob(f"{_PREFIX}*"):
        pid = old.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not is_running(int(pid)) and old.stat().st_uid == os.getuid():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON under another name, then rename it."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(document), encoding="utf8")
    os.replace(temporary, path)

"""Servers that outlive the shell that started them, and what is written down to find them again.

    $PT_DEPLOY_HOME/deployments/<name>/
    ├── state.json     the process (its id and when it was born), its address, its settings
    ├── target.json    what it serves; the server reads it again and again, so replacing it updates
    └── log            what it says

Files are written aside and renamed; whoever changes something holds the lock. Knows processes and
files; what MLflow wants of a deployment is `deployment`'s business.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import ModelSpec, registry_variables
from mlflow_pt_deploy.serving.model.loaded_model import now
from mlflow_pt_deploy.system.child_process import command, environment
from mlflow_pt_deploy.system.paths import home

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,62}")
_ADDRESS = re.compile(r" on (https?)://(\S+):(\d+) ")
_POLL_S = 0.05


@dataclass(frozen=True)
class State:
    """A server that somebody started.

    Attributes:
        name: Of the deployment.
        pid: Of its process.
        born: When the kernel started that process; tells it from a later one of the same number.
        created: When it was started, in UTC.
        settings: Its settings, see `serving.settings.Settings`.
        host: Where to reach it from this machine; empty until it is ready.
        port: Its port.
    """

    name: str
    pid: int
    born: str
    created: str
    settings: dict[str, Any]
    host: str = ""
    port: int = 0

    @property
    def url(self) -> str:
        """Its address, from this machine."""
        return f"http://{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # ours, and dead: do not leave a zombie
        return _born(self.pid) == self.born


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """The folder of a deployment, which may not exist, for one process at a time.

    Raises:
        ServingError: The name cannot be one.
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"{name!r} cannot be a deployment's name; take letters, digits, '.', '_' and '-'"
        )
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield root / name


def names() -> list[str]:
    """All deployments that are written down, alive or not."""
    return sorted(path.parent.name for path in _root().glob("*/state.json"))


def read_state(name: str) -> State | None:
    """What is known of a deployment, or None."""
    try:
        return State(**json.loads((_root() / name / "state.json").read_text(encoding="utf8")))
    except FileNotFoundError:
        return None


def read_target(name: str) -> ModelSpec:
    """What a deployment should serve."""
    return ModelSpec(**json.loads((_root() / name / "target.json").read_text(encoding="utf8")))


def write_target(folder: Path, target: ModelSpec) -> None:
    """Change what a deployment should serve; its server sees it at its next look."""
    _write(folder / "target.json", asdict(target))


def start(folder: Path, target: ModelSpec, settings: Mapping[str, Any], ready_s: float) -> State:
    """Start a server and wait until it is ready; where it does not become so, no process is left.

    Raises:
        ServingError: It ended, or was not ready in time; says what it said last.
    """
    fresh = not folder.exists()
    folder.mkdir(exist_ok=True)
    write_target(folder, target)
    words = [f"--{key.replace('_', '-')}" for key, value in settings.items() if value is True]
    for key, value in settings.items():
        if not isinstance(value, bool):
            words.append(f"--{key.replace('_', '-')}={value}")
    log = folder / "log"
    pid = _spawn(["serve", f"{folder.name}=@{folder / 'target.json'}", *words], log)
    state = State(folder.name, pid, _born(pid), now(), dict(settings))
    try:
        _write(folder / "state.json", asdict(state))
        host, port = _await_ready(state, log, ready_s)
        state = State(**{**asdict(state), "host": host, "port": port})
        _write(folder / "state.json", asdict(state))
    except BaseException:
        stop(state, 0)
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return state


def stop(state: State, grace_s: float) -> None:
    """End a server: ask, wait until its requests are answered, then force."""
    for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10)):
        if not state.alive:
            return
        with suppress(ProcessLookupError):
            os.killpg(state.pid, number)
        end = time.monotonic() + seconds
        while state.alive and time.monotonic() < end:
            time.sleep(_POLL_S)


def _spawn(words: list[str], log: Path) -> int:
    """Start ``pt-deploy`` in a session of its own, which ends with nobody else's."""
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    call = command("cli", *words)
    variables = environment(**registry_variables())
    return os.posix_spawn(call[0], call, variables, file_actions=files, setsid=True)


def _await_ready(state: State, log: Path, ready_s: float) -> tuple[str, int]:
    end = time.monotonic() + ready_s
    alive = True
    while alive and time.monotonic() < end:
        alive = state.alive
        if found := _ADDRESS.search(_text(log)):
            host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(found[2], found[2])
            return host, int(found[3])
        time.sleep(_POLL_S)
    what = f"was not ready within {ready_s:g} s (ready_s)" if alive else "ended"
    raise ServingError(
        f"the server {what}; it said: {(_text(log).splitlines() or ['nothing'])[-1]}"
    )


def _text(log: Path) -> str:
    return log.read_text(encoding="utf8", errors="replace") if log.exists() else ""


def _born(pid: int) -> str:
    """When a process was started, as its system tells it; empty: there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        if Path("/proc/self").exists():
            return ""
    run = ["ps", "-o", "lstart=", "-p", str(pid)]  # systems without /proc
    return subprocess.run(run, capture_output=True, text=True, check=False).stdout.strip()


def _root() -> Path:
    return home() / "deployments"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(json.dumps(content, indent=1), encoding="utf8")
    os.replace(aside, path)

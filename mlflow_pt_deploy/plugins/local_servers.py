"""Server processes that outlive the shell that started them, and the files that describe them.

    $PT_DEPLOY_HOME/deployments/<name>/
    ├── state.json     process (id and start time), address, settings
    ├── target.json    what it serves; the server polls this file, so replacing it is an update
    └── log            output of the server

Files are replaced atomically; a process that changes them holds the deployment's lock.
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
from mlflow_pt_deploy.system.child_process import command, environment
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.paths import home

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,62}")
_ADDRESS = re.compile(r" on (https?)://(\S+):(\d+) ")
_POLL_S = 0.05


@dataclass(frozen=True)
class State:
    """A server process.

    Attributes:
        name: Name of the deployment.
        pid: Process id.
        born: Start time of the process as the kernel reports it; a reused pid has another one.
        created: Time of the start, in UTC.
        settings: See `ServerSettings`.
        host: Address from this machine; empty until the server is ready.
        port: TCP port.
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
        """Address from this machine."""
        return f"http://{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether this process, not a later one with its pid, still runs."""
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)  # reap our own child
        return _start_time(self.pid) == self.born


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Lock a deployment for this process; yields its folder, which may not exist.

    Raises:
        ServingError: The name is invalid.
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"{name!r} is not a valid deployment name; use letters, digits, '.', '_' and '-'"
        )
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield root / name


def names() -> list[str]:
    """Names of all deployments, alive or not."""
    return sorted(path.parent.name for path in _root().glob("*/state.json"))


def read_state(name: str) -> State | None:
    """Read the state of a deployment; None if it does not exist."""
    try:
        return State(**json.loads((_root() / name / "state.json").read_text(encoding="utf8")))
    except FileNotFoundError:
        return None


def read_target(name: str) -> ModelSpec:
    """Read the model and options that a deployment should serve."""
    return ModelSpec(**json.loads((_root() / name / "target.json").read_text(encoding="utf8")))


def write_target(folder: Path, target: ModelSpec) -> None:
    """Change what a deployment should serve; its server sees it at its next poll."""
    _write(folder / "target.json", asdict(target))


def start(folder: Path, target: ModelSpec, settings: Mapping[str, Any], ready_s: float) -> State:
    """Start a server and wait until it is ready; on failure no process is left.

    Raises:
        ServingError: It exited, or was not ready in time; the message has its last log line.
    """
    fresh = not folder.exists()
    folder.mkdir(exist_ok=True)
    write_target(folder, target)
    flags = [f"--{key.replace('_', '-')}" for key, value in settings.items() if value is True]
    for key, value in settings.items():
        if not isinstance(value, bool):
            flags.append(f"--{key.replace('_', '-')}={value}")
    log = folder / "log"
    pid = _spawn(["serve", f"{folder.name}=@{folder / 'target.json'}", *flags], log)
    state = State(folder.name, pid, _start_time(pid), now(), dict(settings))
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
    """Stop a server: SIGTERM, wait up to `grace_s` seconds for its requests, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10)):
        if not state.alive:
            return
        with suppress(ProcessLookupError):
            os.killpg(state.pid, number)
        end = time.monotonic() + seconds
        while state.alive and time.monotonic() < end:
            time.sleep(_POLL_S)


def _spawn(arguments: list[str], log: Path) -> int:
    """Start ``pt-deploy`` in its own session, so that it outlives this one; returns its pid."""
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    call = command("cli", *arguments)
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
    what = f"was not ready within {ready_s:g} s (ready_s)" if alive else "exited"
    raise ServingError(
        f"the server {what}; last log line: {(_text(log).splitlines() or ['none'])[-1]}"
    )


def _text(log: Path) -> str:
    return log.read_text(encoding="utf8", errors="replace") if log.exists() else ""


def _start_time(pid: int) -> str:
    """Start time of a process as the system reports it; empty if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        if Path("/proc/self").exists():
            return ""
    ps = ["ps", "-o", "lstart=", "-p", str(pid)]  # systems without /proc
    return subprocess.run(ps, capture_output=True, text=True, check=False).stdout.strip()


def _root() -> Path:
    return home() / "deployments"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf8")
    os.replace(temporary, path)

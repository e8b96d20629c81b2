"""A real `mlflow server`, on SQLite or on PostgreSQL, with or without basic auth."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests

START_S = 180
ADMIN, PASSWORD = "admin", "a long password of tests"

Command = subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def mlflow_server(
    folder: Path, store: str, *, port: int = 0, auth: str = ""
) -> Iterator[tuple[str, Command]]:
    """Run `mlflow server` with proxied artifacts until the block ends.

    Args:
        folder: Artifacts and log.
        store: Backend store URI.
        port: Its port; 0: a free one.
        auth: Database URI of basic auth; empty: none.

    Yields:
        The URL, and the process, which is the leader of a process group.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", store]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    variables = {"MLFLOW_TRACKING_URI": "", "MLFLOW_REGISTRY_URI": ""}
    if auth:
        config = folder / "auth.ini"
        config.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = {auth}\nadmin_username = {ADMIN}\nadmin_password = {PASSWORD}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command += ["--app-name", "basic-auth"]
        variables |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of tests",
        }
    variables = {key: value for key, value in (os.environ | variables).items() if value}
    url = f"http://127.0.0.1:{port}"
    with (folder / "mlflow-server.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=variables, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(url, process, folder / "mlflow-server.log")
            yield url, process
        finally:
            end(process)


def end(process: Command) -> None:
    """Kill a server and its workers."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def _wait(url: str, process: Command, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if requests.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass
        time.sleep(0.1)
    raise AssertionError(f"mlflow server did not start: {log.read_text()[-3000:]}")


def postgres_programs() -> Path | None:
    """Folder of PostgreSQL's programs, or None."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Run PostgreSQL on a free port until the block ends; yields the URI of its server.

    It refuses to run as root, so root runs it as the user `postgres`.
    """
    programs = postgres_programs()
    assert programs is not None
    port, data = free_port(), folder / "data"
    as_user: list[str] = []
    folder.mkdir()
    if os.geteuid() == 0:
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)

    def run(*words: str) -> None:
        done = subprocess.run(
            [*as_user, str(programs / words[0]), *words[1:]],
            check=False,
            capture_output=True,
            text=True,
            cwd="/",
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("initdb", "-D", str(data), "-U", "tests", "--auth=trust", "--no-sync", "-E", "UTF8")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
    run("pg_ctl", "-D", str(data), "-o", settings, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql://tests@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "stop")


def create_database(server: str, name: str) -> str:
    """Create a database; return its URI."""
    import psycopg

    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
    return f"{server}/{name}"

"""The parent of replicas: holds the port, starts them, starts them again, ends them.

Each is asked once a second what it serves. One whose event loop stands still would keep its
connections and get new ones: it is killed when it has not answered for long. One that starts again
opens what was served last.

A replica's standard input is its life line: when it ends, because the parent closed it or because
somebody killed the parent, the replica ends what it began and goes. Loads no model and imports
neither MLflow nor uvicorn, so that it stays small.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import ServingError, exit_in_words
from mlflow_pt_deploy.registry.addresses import registry_variables
from mlflow_pt_deploy.serving.heard import PATIENCE_S, SERVED, ask_replica, socket_of
from mlflow_pt_deploy.serving.observability.server_log import Say, our_log
from mlflow_pt_deploy.serving.port import hold_port
from mlflow_pt_deploy.serving.settings import Settings
from mlflow_pt_deploy.serving.shares import Share
from mlflow_pt_deploy.system.child_process import command, environment
from mlflow_pt_deploy.system.hardware import CORES_ENV, THREAD_VARIABLES

PAUSE_S, PAUSE_MOST_S = 1.0, 60.0
# Beyond `grace_s`: for threads and libraries to end.
END_S = 5.0
# Between two questions; no shorter than a replica has to answer.
_BEAT_S = PATIENCE_S

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a replica is told.

    Attributes:
        models: Words of the command line.
        model_config: Serving options of all models.
        settings: See `Settings`; the port is a real one.
        folder: Where the replicas' sockets are.
        index: Which of them it is, from 0.
        count: How many there are.
        pinned: Numbers of the cores that it stays on; empty: any.
        late: The others serve already: load first, listen then.
        served: What the replicas were last heard to answer with, see `served`.
    """

    models: Sequence[str]
    model_config: Mapping[str, Any]
    settings: Mapping[str, Any]
    folder: str
    index: int
    count: int
    pinned: Sequence[int]
    late: bool = False
    served: Mapping[str, Any] = field(default_factory=dict)


def serve_replicas(
    models: Sequence[str],
    model_config: Mapping[str, Any] | None,
    settings: Settings,
    shares: Sequence[Share],
    say: Say,
) -> None:
    """Serve in several processes until told to stop.

    Args:
        models: Words of the command line.
        model_config: Serving options of all of them.
        settings: Where and how to listen.
        shares: What each replica has.
        say: Told the first words when all replicas are ready.

    Raises:
        ServingError: The port is taken, or a replica could not open a model at the first start.
    """
    with our_log(), ExitStack() as stack:
        held = hold_port(settings.host, settings.port)
        for each in held:
            stack.callback(each.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pt-deploy-")))
        theirs = replace(
            settings,
            port=held[0].getsockname()[1],
            max_connections=ceil(settings.max_connections / len(shares)),
        )
        config = dict(model_config or {})
        jobs = [
            Job(models, config, asdict(theirs), str(folder), index, len(shares), share.pinned)
            for index, share in enumerate(shares)
        ]
        parent = _Parent(jobs, shares, settings, say)
        asyncio.run(parent.run())
    if parent.failure:
        raise ServingError(parent.failure)


class _Parent:
    """Keeps a process alive for each job.

    Attributes:
        failure: Why the server ended at its first start; empty where it did not.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        shares: Sequence[Share],
        settings: Settings,
        say: Say,
    ) -> None:
        self.failure = ""
        self._jobs = jobs
        self._shares = shares
        self._settings = settings
        self._say = say
        self._processes: dict[int, Process] = {}
        self._words: dict[int, list[str]] = {}  # first words, of those that became ready
        self._served: dict[str, Any] = {}
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Return when told to stop and all processes have ended."""
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, self._stop.set)
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
        keepers = [asyncio.create_task(self._keep(job)) for job in self._jobs]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([stopped, *keepers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            self._end()
            _, slow = await asyncio.wait(keepers, timeout=self._settings.grace_s + 2 * END_S)
            if slow:
                self._kill()
            await asyncio.gather(*keepers)

    def _interrupt(self) -> None:
        """Ctrl-C: the first asks to end, the second forces it."""
        if self._stop.is_set():
            self._kill()
        self._stop.set()

    def _end(self) -> None:
        self._stop.set()
        for process in self._processes.values():
            _hang_up(process)

    def _kill(self) -> None:
        for process in self._processes.values():
            _kill(process)

    async def _keep(self, job: Job) -> None:
        """Start a replica, and again whenever it ends."""
        pause_s = PAUSE_S
        while not self._stop.is_set():
            start = time.monotonic()
            reason = await self._live(job)
            if self._stop.is_set():
                return
            if job.index not in self._words:
                self.failure = reason
                self._stop.set()
                return
            if time.monotonic() - start > PAUSE_MOST_S:
                pause_s = PAUSE_S
            _logger.error("%s; started again in %g s, the others go on", reason, pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stop.wait()
            pause_s = min(2 * pause_s, PAUSE_MOST_S)

    async def _live(self, job: Job) -> str:
        """Start a replica and wait for its end; why it ended, in words."""
        late, name = len(self._words) == job.count, f"replica {job.index}"
        start = time.monotonic()
        try:
            job = replace(job, late=late, served=self._served)
            process = await _start(job, self._shares[job.index])
        except OSError as error:
            return f"{name} cannot be started ({error.strerror})"
        self._processes[job.index] = process
        if self._stop.is_set():
            _hang_up(process)
        assert process.stdout is not None
        watch = asyncio.create_task(self._watch(job, process))
        line = await process.stdout.readline()
        told = json.loads(line) if line.endswith(b"\n") else {}
        if "ready" in told:
            self._ready(job, told["ready"], time.monotonic() - start)
        await process.wait()
        if not watch.cancel():
            return f"{name} {await watch}"
        if "failed" in told:
            return f"{name}: {told['failed']}" if late else str(told["failed"])
        killed = "; if nobody did, memory ran out: give fewer replicas"
        return f"{name} {exit_in_words(process.returncode or 0, killed)}"

    async def _watch(self, job: Job, process: Process) -> str:
        """Note what a replica serves, until it or its model stands still; kill it, and say why.

        Before it has answered once it is not there yet. Questions without an answer are counted
        instead of seconds: if we stood still together, say because the machine slept, it goes on.
        """
        at, hang_s = socket_of(Path(job.folder), job.index), self._settings.hang_s
        missed, begun = 0, False
        while not hang_s or missed * _BEAT_S < hang_s:
            heard, _ = await asyncio.gather(ask_replica(at, SERVED), asyncio.sleep(_BEAT_S))
            if heard and heard.status != 200:
                _kill(process)
                return f"was killed: its model computed one batch for {hang_s:g} s"
            if heard:
                begun, missed = True, 0
                with suppress(ValueError):  # the connection broke
                    self._served |= json.loads(heard.body)
            elif begun and not self._stop.is_set():
                missed += 1
        _kill(process)
        return f"gave no sign of life for {hang_s:g} s and was killed"

    def _ready(self, job: Job, words: list[str], seconds: float) -> None:
        again = job.index in self._words
        self._words[job.index] = words
        if again:
            _logger.info("replica %d is back after %.1f s", job.index, seconds)
        elif len(self._words) == job.count:
            self._say(self._words[0])


async def _start(job: Job, share: Share) -> Process:
    """A fresh process; what its predecessor left behind goes."""
    scratch = Path(job.folder) / f"tmp-{job.index}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    process = await asyncio.create_subprocess_exec(
        *command("serving.replica"),
        stdin=PIPE,
        stdout=PIPE,
        env=_environment(share, scratch),
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
    return process


def _hang_up(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _kill(process: Process) -> None:
    if process.returncode is None:
        process.kill()


def _environment(share: Share, scratch: Path) -> dict[str, str]:
    """Ours; with the registry that we talk to, and a part of the cores."""
    threads = {name: str(share.cores) for name in THREAD_VARIABLES if name not in os.environ}
    own = {CORES_ENV: str(share.cores), "TMPDIR": str(scratch)}
    return environment(**threads, **own, **registry_variables())

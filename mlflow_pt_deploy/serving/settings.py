"""Where and how a server listens: names, defaults, checks. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.lifecycle.eviction import MemoryBudget


@dataclass(frozen=True)
class Settings:
    """Where and how a server listens.

    Attributes:
        host: ResolvedVersion to listen on; only this machine by default.
        port: TCP port; 0 takes a free one.
        poll_s: Seconds between looks at the registry; 0: serve what was found at the start.
        grace_s: Seconds that requests in flight have to finish after the server was told to stop.
        access_log: Write a line of JSON for each request to standard error.
        insecure: Listen beyond this machine though no token is set.
        tls_cert: A PEM file with the certificate and its chain; with `tls_key`, the server speaks
            HTTPS and nothing else.
        tls_key: A PEM file with its key.
        max_body_mb: Longest request body.
        max_connections: Most connections at a time; more are answered with 503. Replicas have an
            equal share of it each.
        max_models: Most models in memory, see `serving.room.Room`; the least recently used goes.
        max_memory_mb: Resident memory of a process above which models go, likewise.
        replicas: Processes that answer at the port, each with the model in its own memory; 0: as
            many as suit the cores, see `shares`.
        hang_s: Seconds without a sign of life, or for one batch of the model, after which a replica
            is killed and started again, and a server alone says so at ``/livez``; 0: never.
            Loading a model, in a thread of its own, does not count.
        pin: Pin each replica to its own CPU cores.
        keep_alive_s: An idle connection, or one that sends no complete headers, is closed after
            this many seconds.
        drain_s: On SIGTERM, seconds between ``/readyz`` failing and the port closing.
        log_format: ``text`` or ``json``.
    """

    host: str = "127.0.0.1"
    port: int = 5000
    poll_s: float = 5.0
    grace_s: int = 30
    access_log: bool = False
    insecure: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    max_body_mb: float = 4.0
    max_connections: int = 1024
    max_models: int = 0
    max_memory_mb: float = 0.0
    replicas: int = 0
    hang_s: float = 30.0
    pin: bool = False
    keep_alive_s: float = 75.0
    drain_s: float = 0.0
    log_format: str = "text"

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ServingError("tls_cert and tls_key belong together; give both, or neither")
        for path in filter(None, (self.tls_cert, self.tls_key)):
            if not os.access(path, os.R_OK):
                raise ServingError(f"{path} cannot be read; give a PEM file")
        for name in ("poll_s", "grace_s", "hang_s", "keep_alive_s", "drain_s"):
            if not getattr(self, name) >= 0:
                raise ServingError(f"{name} is {getattr(self, name)}; give seconds from 0 on")
        if self.max_body_mb <= 0 or self.max_connections < 1:
            raise ServingError("max_body_mb and max_connections must be above 0")
        MemoryBudget(self.max_models, self.max_memory_mb)  # checks them
        if self.replicas < 0:
            raise ServingError(
                f"replicas is {self.replicas}; give how many, or 0 to let the cores decide"
            )
        if self.replicas > 1 and not hasattr(socket, "SO_REUSEPORT"):
            raise ServingError("replicas: this system has no SO_REUSEPORT; give 1")
        if self.pin and not hasattr(os, "sched_setaffinity"):
            raise ServingError("pin: this system cannot bind a process to cores; leave it out")

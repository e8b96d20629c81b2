"""Where and how a server listens: names, defaults, checks. Imports nothing heavy."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.room import Room

_LONGEST_S = 1e9
_LARGEST_MB = 4096
_MOST_REPLICAS = 256


@dataclass(frozen=True)
class Settings:
    """Where and how a server listens.

    Attributes:
        host: Address to listen on; only this machine by default.
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
        pin: Give each replica cores of its own, which it never leaves.
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

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ServingError(f"port is {self.port}; give 1 to 65535, or 0 for any free one")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ServingError("tls_cert and tls_key belong together; give both, or neither")
        if self.tls_cert:
            _check_tls(self.tls_cert, self.tls_key)
        for name in ("poll_s", "grace_s", "hang_s"):
            if not 0 <= getattr(self, name) <= _LONGEST_S:
                raise ServingError(
                    f"{name} is {getattr(self, name):g}; give seconds from 0 to {_LONGEST_S:g}"
                )
        if not 0 < self.max_body_mb <= _LARGEST_MB:
            raise ServingError(
                f"max_body_mb is {self.max_body_mb:g}; give more than 0 and at most {_LARGEST_MB}"
            )
        if self.max_connections < 1:
            raise ServingError(f"max_connections is {self.max_connections}; give 1 or more")
        Room(self.max_models, self.max_memory_mb)  # checks them
        if not 0 <= self.replicas <= _MOST_REPLICAS:
            raise ServingError(
                f"replicas is {self.replicas}; give how many (at most {_MOST_REPLICAS}), or 0 to "
                "let the cores decide"
            )
        if self.replicas > 1 and not hasattr(socket, "SO_REUSEPORT"):
            raise ServingError("replicas: this system has no SO_REUSEPORT; give 1")
        if self.pin and not hasattr(os, "sched_setaffinity"):
            raise ServingError("pin: this system cannot bind a process to cores; leave it out")


def _check_tls(cert: str, key: str) -> None:
    """Load a certificate and its key once, so that what is wrong is said before anything starts."""
    import ssl

    for path in (cert, key):
        if not os.path.isfile(path):
            raise ServingError(f"{path} is no file; give a PEM file")
        if not os.access(path, os.R_OK):
            raise ServingError(f"{path} cannot be read: permission denied; give a PEM file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # an encrypted key would ask for its password on the terminal
        context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ServingError(
                f"{key} is not the key of the certificate {cert}; give the two that belong together"
            ) from error
        raise ServingError(
            f"{cert} and {key} are not a PEM certificate and its key, without a password "
            f"({error.reason or 'unreadable'}); give those files"
        ) from error
    except (OSError, ValueError) as error:
        raise ServingError(f"{cert} and {key} cannot be used for TLS: {error}") from error

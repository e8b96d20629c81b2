"""Server settings of ``pt-deploy serve``, each declared once with default and help text.

Imports nothing heavy.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.option_fields import check_choices, option
from mlflow_pt_deploy.serving.lifecycle.eviction import MemoryBudget
from mlflow_pt_deploy.serving.rollout.canary.limits import Limits
from mlflow_pt_deploy.serving.rollout.version_share import (
    parse_option,
    parse_share,
)
from mlflow_pt_deploy.system.hardware import memory_bytes

_MAX_SECONDS = 1e9
_MAX_BODY_MB = 4096
_MAX_REPLICAS = 256
_MAX_MEMORY_MB = 1e9
_MAX_FEEDBACK_ROWS = 10**8


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server process and its workers.

    Raises:
        ServingError: A setting is invalid; the message names it.
    """

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(5000, "TCP port; 0: any free port")
    grpc_port: int = option(0, "TCP port of the Open Inference Protocol over gRPC; 0: off")
    poll_s: float = option(
        5.0, "seconds between polls of the registry; 0: keep the versions found at the start"
    )
    no_copy: bool = option(
        False,
        "keep no local copy of the served version; without one a start fails while the registry is "
        "down",
    )
    grace_s: int = option(30, "seconds that requests in flight have to finish after SIGTERM")
    access_log: bool = option(
        False, "write a line of JSON per request to standard error, without client data"
    )
    insecure: bool = option(False, "listen beyond this machine without PT_DEPLOY_TOKEN")
    tls_cert: str = option("", "PEM file with the certificate chain; serves HTTPS only")
    tls_key: str = option("", "PEM file with the private key of the certificate")
    max_body_mb: float = option(4.0, "largest request body in MB (2^20 bytes)")
    max_connections: int = option(
        1024, "most concurrent connections, divided evenly between the replicas; further ones wait"
    )
    max_models: int = option(
        0,
        "most models in memory; others are loaded on demand and the least recently used one is "
        "evicted; 0: no limit",
    )
    max_memory_mb: float = option(
        0.0,
        "resident memory of a process in MB (10^6 bytes) above which models are evicted; "
        "0: no limit",
    )
    cache_mb: float = option(
        0.0,
        "MB (10^6 bytes) of predictions that a replica keeps for each model, for rows that come "
        "again; 0: none",
    )
    replicas: int = option(
        0,
        "worker processes; on the CPU each has its own copy of a model, on a GPU all share one; "
        "0: one per 4 CPU cores, at most 8",
    )
    hang_s: float = option(
        30.0,
        "restart a replica after this many seconds without progress, also within one batch; "
        "0: never",
    )
    pin: bool = option(False, "pin each replica to its own CPU cores")
    keep_alive_s: float = option(
        75.0, "close a connection that is idle or sends no complete headers for this many seconds"
    )
    drain_s: float = option(
        0.0, "seconds between /readyz failing and the port closing after SIGTERM"
    )
    shadow: str = option(
        "",
        "version that scores answered requests too and is compared: models:/NAME@challenger, or "
        "models:/NAME@challenger=20% for a share of the requests; several: separated by commas; "
        "the tag pt_deploy.shadow of the registered model overrides it",
    )
    shadow_teacher: str = option(
        "",
        "share of the requests, e.g. 1%, that the baseline of the promotion scores too; shows the "
        "agreement with the teacher",
    )
    shadow_memory_mb: float = option(
        2000.0,
        "resident memory of the process of all shadows in MB (10^6 bytes) above which it is "
        "restarted",
    )
    shadow_priority: str = option(
        "idle",
        "CPU time of the process of all shadows; idle: only what nothing else on the machine wants",
        choices=("idle", "normal"),
    )
    report_s: float = option(
        60.0,
        "seconds between writes of what was served to the registered version in MLflow; 0: never",
    )
    feedback_rows: int = option(
        0, "answered rows that are remembered, so that POST /feedback can judge them; 0: off"
    )
    log_format: str = option("text", "format of log messages", choices=("text", "json"))
    canary: str = option(
        "",
        "a second version and its share of the requests: models:/NAME@challenger=5%; once for each "
        "model. The model's tag pt_deploy.canary goes first",
        repeatable=True,
    )
    canary_p99_ratio: float = option(
        2.0, "end a canary whose p99 latency is more than this many times its champion's; 0: never"
    )
    canary_disagreement: float = option(
        0.1, "end a canary that gives more than this share of rows another label; 0: never"
    )
    canary_label_shift: float = option(
        0.2,
        "end a canary whose label shares differ from its champion's by more than this population "
        "stability index; 0: never",
    )

    @property
    def max_body_bytes(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 2**20)

    @property
    def canary_limits(self) -> Limits:
        """What a canary may do."""
        return Limits(self.canary_p99_ratio, self.canary_disagreement, self.canary_label_shift)

    def __post_init__(self) -> None:
        check_choices(self, ServingError)
        if not 0 <= self.port <= 65535:
            raise ServingError(f"port is {self.port}; give 1 to 65535, or 0 for any free one")
        if not 0 <= self.grpc_port <= 65535:
            raise ServingError(f"grpc_port is {self.grpc_port}; give 1 to 65535, or 0 for no gRPC")
        if self.grpc_port and self.grpc_port == self.port:
            raise ServingError(f"port and grpc_port are both {self.port}; give two ports")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ServingError("tls_cert and tls_key belong together; give both or neither")
        if self.tls_cert:
            _check_tls(self.tls_cert, self.tls_key)
        for name in ("poll_s", "grace_s", "hang_s", "keep_alive_s", "drain_s", "report_s"):
            if not 0 <= getattr(self, name) <= _MAX_SECONDS:
                raise ServingError(
                    f"{name} is {getattr(self, name):g}; give seconds from 0 to {_MAX_SECONDS:g}"
                )
        if not 0 < self.max_body_mb <= _MAX_BODY_MB:
            raise ServingError(
                f"max_body_mb is {self.max_body_mb:g}; give more than 0 and at most {_MAX_BODY_MB}"
            )
        _check_feedback_rows(self.feedback_rows)
        if self.max_connections < 1:
            raise ServingError(f"max_connections is {self.max_connections}; give 1 or more")
        MemoryBudget(self.max_models, self.max_memory_mb)  # checks both
        self._check_cache()
        parse_option("canary", self.canary)
        Limits(self.canary_p99_ratio, self.canary_disagreement, self.canary_label_shift)
        if not 0 <= self.replicas <= _MAX_REPLICAS:
            raise ServingError(
                f"replicas is {self.replicas}; give 1 to {_MAX_REPLICAS}, or 0 to choose by the "
                "number of CPU cores"
            )
        if self.replicas > 1 and not hasattr(socket, "SO_REUSEPORT"):
            raise ServingError("replicas: this system has no SO_REUSEPORT; give 1")
        self._check_shadow()
        if self.pin and not hasattr(os, "sched_setaffinity"):
            raise ServingError("pin: this system has no CPU affinity; leave it out")

    def _check_cache(self) -> None:
        if not 0 <= self.cache_mb < float("inf"):
            raise ServingError(f"cache_mb is {self.cache_mb:g}; give 0 (no cache) or more")
        if self.max_memory_mb and self.cache_mb >= self.max_memory_mb:
            raise ServingError(
                f"cache_mb is {self.cache_mb:g} and max_memory_mb is {self.max_memory_mb:g}; give "
                "a smaller cache, the models need memory too"
            )
        memory_mb = memory_bytes() / 1e6
        if memory_mb and self.cache_mb >= memory_mb:
            raise ServingError(
                f"cache_mb is {self.cache_mb:g} and this machine has {memory_mb:.0f} MB of memory; "
                "give a smaller cache"
            )

    def _check_shadow(self) -> None:
        parse_option("shadow", self.shadow, 1.0)
        if self.shadow_teacher:
            parse_share(self.shadow_teacher, "shadow_teacher")
        if not 0 < self.shadow_memory_mb < _MAX_MEMORY_MB:
            raise ServingError(
                f"shadow_memory_mb is {self.shadow_memory_mb:g}; give more than 0, e.g. 2000"
            )


def _check_feedback_rows(rows: int) -> None:
    if not 0 <= rows <= _MAX_FEEDBACK_ROWS:
        raise ServingError(
            f"feedback_rows is {rows}; give 1 to {_MAX_FEEDBACK_ROWS}, or 0 for no feedback"
        )


def _check_tls(cert: str, key: str) -> None:
    """Load the certificate and its key, so that an error is reported before the server starts."""
    import ssl

    for path in (cert, key):
        if not os.path.isfile(path):
            raise ServingError(f"{path} is not a file; give a PEM file")
        if not os.access(path, os.R_OK):
            raise ServingError(f"{path} cannot be read: permission denied; give a PEM file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # OpenSSL would prompt for the password of an encrypted key
        context.load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ServingError(
                f"{key} is not the private key of the certificate {cert}; give a matching pair"
            ) from error
        raise ServingError(
            f"{cert} and {key} are not a PEM certificate and its private key "
            f"({error.reason or 'unreadable'}); give PEM files without a password"
        ) from error
    except (OSError, ValueError) as error:
        raise ServingError(f"{cert} and {key} cannot be used for TLS: {error}") from error

"""Server settings: an invalid value is named."""

from pathlib import Path
from typing import Any

import pytest
from tiny.certificates import new_certificate

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.settings import ServerSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 99999}, "port is 99999; give 1 to 65535, or 0 for any free one"),
        ({"port": -1, "replicas": 2}, "port is -1; give 1 to 65535"),
        ({"grpc_port": -1}, "grpc_port is -1; give 1 to 65535, or 0 for no gRPC"),
        ({"grpc_port": 70000}, "grpc_port is 70000; give 1 to 65535"),
        ({"port": 5000, "grpc_port": 5000}, "port and grpc_port are both 5000; give two ports"),
        ({"poll_s": -1}, "poll_s is -1; give seconds from 0"),
        ({"hang_s": -1}, "hang_s is -1; give seconds from 0"),
        ({"hang_s": float("inf")}, "hang_s is inf; give seconds from 0"),
        ({"keep_alive_s": float("nan")}, "keep_alive_s is nan"),
        ({"drain_s": -0.5}, "drain_s is -0.5"),
        ({"max_body_mb": 0}, "max_body_mb is 0; give more than 0"),
        ({"max_body_mb": -1}, "max_body_mb is -1; give more than 0"),
        ({"max_body_mb": float("nan")}, "max_body_mb is nan; give more than 0"),
        ({"max_connections": 0}, "max_connections is 0; give 1 or more"),
        ({"max_models": -1}, "max_models is -1; give 0"),
        ({"cache_mb": -1}, "cache_mb is -1; give 0 \\(no cache\\) or more"),
        ({"cache_mb": float("nan")}, "cache_mb is nan; give 0"),
        ({"cache_mb": float("inf")}, "cache_mb is inf; give 0"),
        (
            {"cache_mb": 500, "max_memory_mb": 400},
            "cache_mb is 500 and max_memory_mb is 400",
        ),
        (
            {"cache_mb": 1e9},
            r"this machine has \d+ MB of memory; give a smaller cache",
        ),
        ({"replicas": -1}, "replicas is -1; give 1 to 256, or 0"),
        ({"replicas": 9999}, "replicas is 9999"),
        ({"shadow": "challenger"}, "shadow is 'challenger'; give a version"),
        ({"shadow": "models:/a@x=0%"}, "shadow models:/a@x has the share '0%'"),
        ({"shadow": "models:/a@x,models:/a@y"}, "shadow names two versions of a"),
        ({"shadow_teacher": "101%"}, "shadow_teacher has the share '101%'"),
        ({"shadow_memory_mb": 0}, "shadow_memory_mb is 0; give more than 0, e.g. 2000"),
        ({"shadow_priority": "high"}, "shadow_priority is 'high'; choose from idle, normal"),
        ({"report_s": -1}, "report_s is -1; give seconds from 0"),
        ({"feedback_rows": -1}, "feedback_rows is -1; give 1 to 100000000, or 0 for no feedback"),
        ({"tls_cert": "cert.pem"}, "belong together"),
        ({"tls_key": "key.pem"}, "belong together"),
        ({"tls_cert": "no.pem", "tls_key": "no.pem"}, "no.pem is not a file; give a PEM file"),
        (
            {"tls_cert": __file__, "tls_key": __file__},
            "are not a PEM certificate and its private key",
        ),
    ],
    ids=str,
)
def test_an_invalid_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        ServerSettings(**settings)


def test_a_key_of_another_certificate_is_named(tmp_path: Path) -> None:
    cert, _ = new_certificate(tmp_path)
    (tmp_path / "other").mkdir()
    _, key = new_certificate(tmp_path / "other")
    with pytest.raises(ServingError, match="key.pem is not the private key of the certificate"):
        ServerSettings(tls_cert=str(cert), tls_key=str(key))

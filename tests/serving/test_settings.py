"""Server settings: wrong values are named."""

from pathlib import Path
from typing import Any

import pytest

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.settings import ServerSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "cert.pem"}, "belong together"),
        ({"poll_s": -1}, "poll_s is -1"),
        ({"hang_s": -1}, "hang_s is -1.*from 0 on"),
        ({"keep_alive_s": float("nan")}, "keep_alive_s is nan"),
        ({"drain_s": -0.5}, "drain_s is -0.5"),
        ({"max_body_mb": 0}, "above 0"),
        ({"max_connections": 0}, "above 0"),
        ({"max_models": -1}, "max_models is -1; give 0"),
        ({"replicas": -1}, "replicas is -1"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        ServerSettings(**settings)


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="none.pem cannot be read"):
        ServerSettings(tls_cert=str(tmp_path / "none.pem"), tls_key=str(tmp_path / "none.pem"))

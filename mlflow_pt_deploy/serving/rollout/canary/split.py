"""Which requests a canary answers; pure."""

from __future__ import annotations

from mlflow_pt_deploy.serving.rollout.version_share import place_of

KEY_HEADER = "x-pt-deploy-key"
"""Requests with the same value are answered by the same version."""


def takes(share: float, salt: str, key: str) -> bool:
    """Whether a key is in the canary's share.

    Args:
        share: 0 to 1.
        salt: Of one canary, so that the next one has other keys.
        key: Of the request.
    """
    return place_of(f"{salt}\0{key}") < share

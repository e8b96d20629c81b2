"""Tags of a version with counts of rows: of the validation rows, and of served ones."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.evaluation.profile import Profile

PROFILE_TAG = "pt_deploy.profile"
"""Answers to the validation rows that decided the promotion."""

SERVED_TAG = "pt_deploy.served_profile"
"""Answers of servers, written by them."""


def read_profile(tags: Mapping[str, str], version: str) -> Profile:
    """The profile that a promotion stored.

    Args:
        tags: Tags of the version.
        version: The version in the error's message, e.g. ``shop/3``.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    text = tags.get(PROFILE_TAG)
    if text is None:
        raise ModelError(
            f"{version} has no tag {PROFILE_TAG}: it was promoted by an older release, or by hand. "
            "Measure it again with pt-deploy optimize and promote it."
        )
    return Profile.from_tag(text, f"the tag {PROFILE_TAG} of {version}")

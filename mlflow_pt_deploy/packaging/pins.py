"""Exact requirements of an environment: everything that is installed, from a few names."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlflow_pt_deploy.errors import ModelError


def pin_closure(requirements: Iterable[str]) -> list[str]:
    """Pin requirements and all that they require to the installed versions.

    Args:
        requirements: E.g. ``mlflow-pt-deploy==0.1.0`` or ``openvino``.

    Raises:
        ModelError: One of them is not installed, or in another version.
    """
    waiting = [Requirement(text) for text in requirements]
    found: dict[str, str] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise ModelError(
                f"{requirement} is not installed here, so its version is not known. Install it "
                "and package the model again."
            ) from error
        if not requirement.specifier.contains(installed.version, prereleases=True):
            raise ModelError(
                f"the model needs {requirement}, and {installed.version} is installed. Install "
                "the version that the model was measured with, and package it again."
            )
        if name not in found:
            found[name] = f"{name}=={installed.version.partition('+')[0]}"
            waiting += _required(installed.requires or (), set())
        if requirement.extras:
            waiting += _required(installed.requires or (), requirement.extras)
    return sorted(found.values())


def _required(texts: Iterable[str], extras: set[str]) -> list[Requirement]:
    """Requirements of a distribution that apply here, for these extras only if there are any."""
    needed = []
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        asked = any(marker is not None and marker.evaluate({"extra": each}) for each in extras)
        if (asked and not plain) if extras else plain:
            needed.append(requirement)
    return needed

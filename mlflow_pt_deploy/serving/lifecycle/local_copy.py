"""The local copy of a model: kept while it serves, loaded while the registry is down.

Nothing here raises: what fails is logged, and the server goes on without a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion
from mlflow_pt_deploy.registry.served_copy import ServedCopies, ServedCopy
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, load_version
from mlflow_pt_deploy.system.background import at_low_priority

_logger = logging.getLogger(__name__)


class LocalCopy:
    """The local copy of a model.

    Args:
        name: Name of the model, for the log.
        copies: All copies of this user; None: no copy is kept or loaded.
        explain: The message of an error.
    """

    def __init__(
        self, name: str, copies: ServedCopies | None, explain: Callable[[Exception], str]
    ) -> None:
        self._name = name
        self._copies = copies
        self._explain = explain
        self._kept: tuple[str, ResolvedVersion] | None = None

    def find(self, uri: str) -> ServedCopy | None:
        """The copy of what a URI meant when it last served, if there is one."""
        try:
            return self._copies.find(uri) if self._copies else None
        except Exception as error:  # also of a home folder that does not exist
            _logger.warning(
                "%s: the local copy cannot be used: %s", self._name, self._explain(error)
            )
            return None

    def keep(self, uri: str, version: LoadedModel | None) -> None:
        """Copy a version that serves, once."""
        if self._copies is None or version is None or version.root is None:
            return
        if (uri, version.resolved) == self._kept:
            return
        self._kept = uri, version.resolved
        try:
            copied = uri, version.resolved, version.root, version.tags
            at_low_priority(partial(self._copies.keep, *copied))
        except Exception as error:  # also of a full disk
            _logger.warning(
                "%s: version %s is not copied, so a start without the registry would fail: %s",
                self._name,
                version.label,
                self._explain(error),
            )

    def load(self, spec: ModelSpec) -> LoadedModel | None:
        """Load the copy; None if there is none, or if it cannot serve."""
        copy = self.find(spec.uri)
        if copy is None:
            return None
        try:
            version = load_version(copy.version, spec, copy.fetch)
        except Exception as error:
            _logger.error("%s: the local copy cannot serve: %s", self._name, self._explain(error))
            if isinstance(error, ArtifactError):
                copy.discard()
            return None
        version.copied_at = copy.kept_at
        return version

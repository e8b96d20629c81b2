"""Whether served rows still look like those that decided the promotion of a version.

The counts are a running server's, or those that servers wrote to the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import ModelError, ServingError, TrackingError
from mlflow_pt_deploy.evaluation.drift import LIMIT, MOVED, SAME, TOO_FEW, Shift, compare, overall
from mlflow_pt_deploy.evaluation.profile import Profile
from mlflow_pt_deploy.registry.addresses import resolve, version_tags
from mlflow_pt_deploy.registry.profile_tags import SERVED_TAG, read_profile
from mlflow_pt_deploy.serving.http.auth import ADMIN_ENV, SCORE_ENV, auth_from_environment, bearer
from mlflow_pt_deploy.serving.monitoring.drift import LAST_HOUR, SINCE_START

_TIMEOUT_S = 30
_IN_REGISTRY = "written to the registry"
_SENTENCES = {
    SAME: "what comes still looks like the rows that decided its promotion",
    MOVED: "what comes no longer looks like the rows that decided its promotion",
    TOO_FEW: "there are too few rows to say whether what comes has changed",
}


@dataclass(frozen=True)
class DriftReport:
    """Drift of one version.

    Attributes:
        version: The version, e.g. ``shop/3``.
        windows: Shifts by window, the one that decides first.
    """

    version: str
    windows: Mapping[str, Sequence[Shift]]

    @property
    def window(self) -> str:
        """The window that decides: the first one that can tell, or the first one."""
        able = (name for name, shifts in self.windows.items() if overall(shifts) != TOO_FEW)
        return next(able, next(iter(self.windows)))

    @property
    def verdict(self) -> str:
        """``same``, ``moved`` or ``too few rows``."""
        return overall(self.windows[self.window])

    def text(self) -> str:
        """A sentence, and a table of each window."""
        window, verdict = self.window, self.verdict
        moved = [shift.kind for shift in self.windows[window] if shift.verdict == MOVED]
        found = f"{', '.join(moved)}; {_words(window)}" if moved else _words(window)
        lines = [f"{self.version}: {_SENTENCES[verdict]} ({found})."]
        rows = [
            (
                _words(window),
                shift.kind,
                str(shift.rows),
                f"{shift.psi:.3f}",
                f"{shift.low:.3f} to {shift.high:.3f}",
                shift.verdict,
            )
            for window, shifts in self.windows.items()
            for shift in shifts
        ]
        table = [("window", "kind", "rows", "psi", "95 % interval", "verdict"), *rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table)]
        return "\n".join([*lines, "", f"A kind has moved if its interval is above {LIMIT:g}."])


def _words(window: str) -> str:
    return window.replace("_", " ")


def drift_in_registry(name: str) -> DriftReport:
    """Compare what servers wrote to the registry with the profile of a version.

    Args:
        name: ``NAME`` (its champion), ``NAME@ALIAS`` or ``NAME/VERSION``.

    Raises:
        TrackingError: There is no such version.
        ModelError: It has no profile, or one that is damaged, or nothing was served.
    """
    address = f"models:/{name if '@' in name or '/' in name else f'{name}@champion'}"
    try:
        found = resolve(address)
        tags = version_tags(found)
    except MlflowException as error:
        raise TrackingError(
            f"{address} cannot be found: {error.message} Give NAME, NAME@ALIAS or NAME/VERSION."
        ) from error
    version = f"{found.name}/{found.version}"
    profile = read_profile(tags, version)
    if SERVED_TAG not in tags:
        raise ModelError(
            f"{version} has no tag {SERVED_TAG}: no server wrote what it answered. Ask a running "
            "server: --url http://HOST:PORT"
        )
    served = Profile.from_tag(tags[SERVED_TAG], f"the tag {SERVED_TAG} of {version}")
    return _report(version, {_IN_REGISTRY: compare(profile, served)})


def drift_of_server(name: str, url: str) -> DriftReport:
    """Read the drift of the version that a server answers with now.

    Args:
        name: ``NAME`` or ``NAME/VERSION``; a registered model, or a name of the server.
        url: Address of the server; its token is read from the environment.

    Raises:
        ServingError: The server does not answer, refuses the token, or serves something else.
        ModelError: The version has no profile that can be used, or nothing was served.
    """
    if "@" in name:
        raise ServingError(
            f"{name}: the server decides which version it serves. With --url give NAME or "
            "NAME/VERSION."
        )
    model, _, wanted = name.partition("/")
    served = _served_models(url)
    status = next((each for each in served if model in _names(each)), None)
    if status is None:
        known = ", ".join(sorted({str(each.get("model")) for each in served}))
        raise ServingError(f"{url} does not serve {model}; it serves {known}.")
    version = f"{model}/{status.get('version', 'none')}"
    if wanted and version != name:
        raise ServingError(f"{url} serves {version}, not {name}. Ask for {model} or that version.")
    drift = status.get("drift")
    if drift is None:
        raise ServingError(
            f"{url} holds no version of {model} in memory, or is of an older release. Score a row, "
            "or update the server."
        )
    if drift["reason"]:
        raise ModelError(f"{model} at {url}: {drift['reason']}")
    windows = {
        window: [Shift(**shift) for shift in drift[window]] for window in (LAST_HOUR, SINCE_START)
    }
    return _report(version, windows)


def _report(version: str, windows: Mapping[str, Sequence[Shift]]) -> DriftReport:
    if not any(windows.values()):
        raise ModelError(
            f"{version} has answered no rows, so there is nothing to compare. Ask again later."
        )
    return DriftReport(version, windows)


def _names(status: Mapping[str, Any]) -> set[str]:
    return {str(status.get("model")), str(status.get("registered_model"))}


def _served_models(url: str) -> list[dict[str, Any]]:
    """Get ``/models``, the status of all models of a server."""
    import requests

    auth = auth_from_environment()
    headers = bearer(auth.admin or auth.scoring)
    try:
        answer = requests.get(f"{url.rstrip('/')}/models", headers=headers, timeout=_TIMEOUT_S)
        content = answer.json()
    except requests.RequestException as error:
        raise ServingError(
            f"no pt-deploy server answers at {url} ({type(error).__name__}). Give its address: "
            "--url http://HOST:PORT"
        ) from error
    if answer.status_code == 401:
        raise ServingError(
            f"{url} needs its admin token: set {ADMIN_ENV}, or {SCORE_ENV} if there is no other."
        )
    if answer.status_code != 200 or not isinstance(content, list):
        raise ServingError(
            f"{url} is not a pt-deploy server: /models answered {answer.status_code}. Give its "
            "address: --url http://HOST:PORT"
        )
    return content

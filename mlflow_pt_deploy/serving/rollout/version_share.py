"""A version beside the one that serves, with its share of the requests: option and tag; pure.

The option of the server and the tag of the registered model say the same: the option
``models:/NAME@challenger=5%``, the tag ``challenger:5%``. The tag wins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from mlflow_pt_deploy.errors import ServingError

_OPTION = re.compile(r"(models:/+([^/@:=]+)(?:@[^/@:=]+|/\d+))(?:=(.*))?")
_NEXT = re.compile(r",\s*(?=models:/)")
_TAG = re.compile(r"(?:version:)?([\w.-]+)(?::(.*))?")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_MAX_SHOWN = 60  # characters
_DIGEST_BYTES = 8


class VersionShare(NamedTuple):
    """A version, and the share of the requests that it gets.

    Attributes:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        share: Above 0 and at most 1.
    """

    uri: str
    share: float


def parse_option(role: str, text: str, default: float | None = None) -> dict[str, VersionShare]:
    """Versions of an option by registered model; several are separated by commas.

    Args:
        role: ``canary`` or ``shadow``, the option's name.
        text: Value of the option.
        default: Share where none is given; None: it must be given.

    Raises:
        ServingError: A part is not understood, or a model has two.
    """
    found: dict[str, VersionShare] = {}
    for word in filter(None, _NEXT.split(text.strip())):
        parts = _OPTION.fullmatch(word)
        if parts is None or (parts[3] is None and default is None):
            raise ServingError(
                f"{role} is {word!r}; give a version and its share of the requests, e.g. "
                "models:/NAME@challenger=5%"
            )
        uri, name, share = parts.groups()
        if name in found:
            raise ServingError(
                f"{role} names two versions of {name}, {found[name].uri} and {uri}; give one"
            )
        found[name] = VersionShare(uri, parse_share(share, f"{role} {uri}", default))
    return found


def parse_tag(tag: str, name: str, value: str, default: float | None = None) -> VersionShare | None:
    """The version of a registered model's tag, for example ``challenger:5%`` or ``7:5%``.

    Args:
        tag: Name of the tag.
        name: Name of the registered model.
        value: Value of the tag.
        default: Share where none is given; None: it must be given.

    Returns:
        None if the tag wants none: it is empty or ``off``.

    Raises:
        ServingError: The value is not understood.
    """
    text = value.strip()
    if text.lower() in ("", "off"):
        return None
    parts = _TAG.fullmatch(text)
    if parts is None or (parts[2] is None and default is None):
        raise ServingError(
            f"the tag {tag} is {text[:_MAX_SHOWN]!r}; write an alias or a version and its share, "
            "e.g. challenger:5%, or off"
        )
    target, share = parts.groups()
    mark = "/" if target.isdecimal() else "@"
    uri = f"models:/{name}{mark}{target}"
    return VersionShare(uri, parse_share(share, f"the tag {tag}", default))


def parse_share(text: str | None, subject: str, default: float | None = None) -> float:
    """Parse ``20%`` as a share of the requests.

    Args:
        text: The percentage; None: `default` is meant.
        subject: What it belongs to, for the message.
        default: Share where none is given.

    Raises:
        ServingError: It is not above 0 % and at most 100 %.
    """
    if text is None and default is not None:
        return default
    found = _SHARE.fullmatch((text or "").strip())
    share = float(found[1]) / 100 if found else 0.0
    if not 0 < share <= 1:
        raise ServingError(
            f"{subject} has the share {(text or '')[:_MAX_SHOWN]!r}; give more than 0% and at most "
            "100%, e.g. 5%"
        )
    return share


def check_served(role: str, wanted: Mapping[str, VersionShare], served: set[str]) -> None:
    """Check that an option names served models only.

    Raises:
        ServingError: A version is of another registered model.
    """
    for name in sorted(wanted.keys() - served):
        models = ", ".join(sorted(served)) or "none from the registry"
        raise ServingError(
            f"{role} is {wanted[name].uri}, but this server serves {models}; name a version of a "
            f"served model, or serve models:/{name}@champion"
        )


def place_of(key: str, person: bytes = b"") -> float:
    """Where a key lies, 0 to 1; it belongs to a share if this is below the share.

    It stays there, so a wider share has all keys of a narrower one.

    Args:
        key: The key.
        person: Of one decision, so that others by the same key are independent of it.
    """
    digest = blake2b(key.encode(), digest_size=_DIGEST_BYTES, person=person).digest()
    return int.from_bytes(digest, "big") / 256.0**_DIGEST_BYTES

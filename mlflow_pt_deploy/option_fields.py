"""Dataclass fields that describe an option: default, help text, stages and choices.

Each option is declared once. The command line, ``mlflow deployments help`` and the reference pages
are generated from `option_specs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

_T = TypeVar("_T")

SWITCH = ("no", "yes")
"""Choices of an option that is a flag without a value, or ``yes`` in MLproject."""


@dataclass(frozen=True)
class OptionSpec:
    """One option of a dataclass.

    Attributes:
        name: Field name.
        type: ``str``, ``int``, ``float`` or ``bool``.
        default: Value if the option is not given.
        help: Meaning, in a phrase without a full stop.
        stages: Commands that have the option as a flag.
        choices: Allowed values; empty: any.
        repeatable: Whether the flag may be given several times; its values are joined by commas.
    """

    name: str
    type: type
    default: Any
    help: str
    stages: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    repeatable: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def option(
    default: _T,
    help: str,
    *,
    stages: Sequence[str] = (),
    choices: Sequence[str] = (),
    repeatable: bool = False,
) -> _T:
    """Declare an option as a dataclass field; the arguments are those of `OptionSpec`."""
    metadata = {
        "help": help,
        "stages": tuple(stages),
        "choices": tuple(choices),
        "repeatable": repeatable,
    }
    return field(default=default, metadata=metadata)


def option_specs(kind: type) -> tuple[OptionSpec, ...]:
    """Options of a dataclass whose fields were all declared with `option`, in order."""
    types = get_type_hints(kind)
    return tuple(
        OptionSpec(each.name, types[each.name], each.default, **each.metadata)
        for each in fields(kind)
    )


def check_choices(options: object, error: type[Exception]) -> None:
    """Check that every option with choices has one of them.

    Raises:
        Exception: `error`, which names the option, its value and the choices.
    """
    for spec in option_specs(type(options)):
        value = getattr(options, spec.name)
        if spec.choices and value not in spec.choices:
            raise error(f"{spec.name} is {value!r}; choose from {', '.join(spec.choices)}.")

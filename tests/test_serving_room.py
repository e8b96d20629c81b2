"""Who goes when there is too much in memory: the decision alone."""

import pytest

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.lifecycle.eviction import STAY_S, Loaded, Room, longest_unused


@pytest.mark.parametrize(
    ("room", "models", "resident_mb", "why"),
    [
        (Room(), 1000, 1e9, ""),
        (Room(max_models=2), 2, 1e9, ""),
        (Room(max_models=2), 3, 0, "max_models is 2"),
        (Room(max_memory_mb=500), 9, 500, ""),
        (Room(max_memory_mb=500), 2, 501, "501 MB were resident, max_memory_mb is 500"),
        (Room(max_memory_mb=500), 1, 9000, ""),  # one always stays
        (Room(max_models=1, max_memory_mb=500), 2, 9000, "max_models is 1"),
    ],
)
def test_what_is_too_much(room: Room, models: int, resident_mb: float, why: str) -> None:
    assert room.excess(models, resident_mb) == why


def test_the_longest_unused_goes() -> None:
    loaded = [Loaded("a", 30, 0), Loaded("b", 10, 0), Loaded("c", 20, 0)]
    assert longest_unused(loaded, now=100) == "b"


def test_who_was_just_loaded_stays() -> None:
    old, new = Loaded("old", used=99.0, since=0.0), Loaded("new", used=50.0, since=99.0)
    assert longest_unused([old, new], now=100.0) == "old"
    assert longest_unused([new], now=99.0 + STAY_S - 0.1) is None
    assert longest_unused([new], now=99.0 + STAY_S) == "new"


def test_what_took_long_to_load_stays_as_long() -> None:
    slow = Loaded("slow", used=0.0, since=0.0, took_s=20.0)
    assert longest_unused([slow], now=19.0) is None
    assert longest_unused([slow], now=20.0) == "slow"


@pytest.mark.parametrize("limits", [{"max_models": -1}, {"max_memory_mb": float("nan")}])
def test_a_wrong_limit_is_named(limits: dict[str, float]) -> None:
    with pytest.raises(ServingError, match=f"{next(iter(limits))} is .*give 0"):
        Room(**limits)  # type: ignore[arg-type]

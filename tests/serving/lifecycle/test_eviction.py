"""Which model is evicted when memory is short: the decision alone."""

import pytest

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.lifecycle.eviction import (
    MIN_RESIDENCY_S,
    CacheEntry,
    MemoryBudget,
    least_recently_used,
)


@pytest.mark.parametrize(
    ("budget", "models", "resident_mb", "why"),
    [
        (MemoryBudget(), 1000, 1e9, ""),
        (MemoryBudget(max_models=2), 2, 1e9, ""),
        (MemoryBudget(max_models=2), 3, 0, "max_models is 2"),
        (MemoryBudget(max_memory_mb=500), 9, 500, ""),
        (MemoryBudget(max_memory_mb=500), 2, 501, "501 MB were resident, max_memory_mb is 500"),
        (MemoryBudget(max_memory_mb=500), 1, 9000, ""),  # the last model is never evicted
        (MemoryBudget(max_models=1, max_memory_mb=500), 2, 9000, "max_models is 1"),
    ],
)
def test_excess_over_the_budget(
    budget: MemoryBudget, models: int, resident_mb: float, why: str
) -> None:
    assert budget.excess(models, resident_mb) == why


def test_the_least_recently_used_is_evicted() -> None:
    loaded = [CacheEntry("a", 30, 0), CacheEntry("b", 10, 0), CacheEntry("c", 20, 0)]
    assert least_recently_used(loaded, now=100) == "b"


def test_a_model_that_was_just_loaded_stays() -> None:
    old, new = CacheEntry("old", 99.0, loaded_at=0.0), CacheEntry("new", 50.0, loaded_at=99.0)
    assert least_recently_used([old, new], now=100.0) == "old"
    assert least_recently_used([new], now=99.0 + MIN_RESIDENCY_S - 0.1) is None
    assert least_recently_used([new], now=99.0 + MIN_RESIDENCY_S) == "new"


def test_a_model_that_took_long_to_load_stays_as_long() -> None:
    slow = CacheEntry("slow", 0.0, loaded_at=0.0, load_s=20.0)
    assert least_recently_used([slow], now=19.0) is None
    assert least_recently_used([slow], now=20.0) == "slow"


@pytest.mark.parametrize("limits", [{"max_models": -1}, {"max_memory_mb": float("nan")}])
def test_a_wrong_limit_is_named(limits: dict[str, float]) -> None:
    with pytest.raises(ServingError, match=f"{next(iter(limits))} is .*give 0"):
        MemoryBudget(**limits)  # type: ignore[arg-type]

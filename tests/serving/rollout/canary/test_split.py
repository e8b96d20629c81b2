"""Which requests a canary gets: its share, always the same ones, and more when it is widened."""

from __future__ import annotations

import math

import pytest

from mlflow_pt_deploy.serving.rollout.canary.split import takes

KEYS = 50_000


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("form", ["{}", "user-{:08d}", "1f2e3d4c-{:x}"])
def test_the_share_of_keys_is_binomial(share: float, form: str) -> None:
    taken = sum(takes(share, "m/7", form.format(number)) for number in range(KEYS))
    assert abs(taken - share * KEYS) < 4 * math.sqrt(KEYS * share * (1 - share))


def test_widening_keeps_the_first_keys_and_another_canary_has_others() -> None:
    keys = [f"user-{number}" for number in range(KEYS // 10)]
    narrow, wide = ({key for key in keys if takes(s, "m/7", key)} for s in (0.05, 0.1))
    other = {key for key in keys if takes(0.05, "m/8", key)}
    assert narrow < wide
    assert len(narrow & other) < 0.2 * len(narrow)


def test_all_and_none() -> None:
    assert all(takes(1.0, "m/7", str(number)) for number in range(1000))
    assert not any(takes(0.0, "m/7", str(number)) for number in range(1000))

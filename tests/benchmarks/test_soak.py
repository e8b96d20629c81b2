"""The soak in short: promotions, a canary and killed workers lose no request."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import soak


@pytest.mark.usefixtures("tracking")
def test_a_quarter_of_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "MAX_GROWTH", 1.0)  # too short to judge it
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "PYTHONPATH", "PT_DEPLOY_HOME"):
        monkeypatch.setenv(name, "")
    words = "--minutes 0.25 --swap-s 3 --kill-s 7 --clients 3".split()
    assert soak.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["swaps"] >= 2 and found["kills"] >= 1
    assert found["statuses"]["200"] > 1000
    assert set(found["versions"]) == {"1", "2", "3"}


def test_growth_leaves_out_the_warm_up() -> None:
    samples = [(float(at), 100.0 if at < 10 else 200.0 + at) for at in range(60)]
    found = soak.growth(samples, 60)
    assert (found["warm_mb"], found["end_mb"]) == (214.5, 254.5)
    assert found["growth"] == pytest.approx(40 / 214.5)

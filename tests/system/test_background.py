"""Work on a thread of low priority."""

from __future__ import annotations

import os
import sys

import pytest

from mlflow_pt_deploy.system.background import at_low_priority


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities on Linux only")
def test_only_the_work_has_a_low_priority() -> None:
    before = priority()
    assert at_low_priority(priority) >= 15
    assert priority() == before


def test_an_error_of_the_work_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        at_low_priority(lambda: 1 / 0)

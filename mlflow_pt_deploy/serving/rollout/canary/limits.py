"""What a canary may do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlflow_pt_deploy.errors import ServingError


@dataclass(frozen=True)
class Limits:
    """Limits of a canary; 0 turns one off.

    Attributes:
        p99_ratio: Most times the champion's p99 latency.
        disagreement: Largest share of rows to which both versions give different labels.
        label_shift: Largest population stability index of the canary's labels against the
            champion's.
    """

    p99_ratio: float = 2.0
    disagreement: float = 0.1
    label_shift: float = 0.2

    def __post_init__(self) -> None:
        if not (self.p99_ratio == 0 or 1 <= self.p99_ratio < math.inf):
            raise ServingError(
                f"canary_p99_ratio is {self.p99_ratio:g}; give 1 or more, or 0 for no limit"
            )
        if not 0 <= self.disagreement < 1:
            raise ServingError(
                f"canary_disagreement is {self.disagreement:g}; give a share below 1, or 0 for no "
                "limit"
            )
        if not 0 <= self.label_shift < math.inf:
            raise ServingError(
                f"canary_label_shift is {self.label_shift:g}; give more than 0, or 0 for no limit"
            )

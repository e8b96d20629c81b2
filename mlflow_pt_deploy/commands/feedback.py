"""The command ``feedback``."""

from __future__ import annotations

import argparse
from typing import Any

INCOMPLETE_STATUS = 4
"""Exit status if some labels were not taken."""


def feedback(parsed: argparse.Namespace) -> dict[str, Any]:
    """Send a file of labels to a running server."""
    from mlflow_pt_deploy.pipeline.feedback_upload import send_feedback

    done = send_feedback(parsed.file, parsed.url)
    lines = [f"{parsed.url} took {done.taken:,} of {done.rows:,} labels"]
    if done.unknown:
        lines.append(
            f"{done.unknown:,} are of rows that the server does not remember, or not any more "
            "(--feedback-rows)"
        )
    if done.rejected:
        lines.append(f"{done.rejected:,} were rejected; the first ones:")
        lines += [f"  {fault}" for fault in done.faults]
    print("\n".join(lines))
    return {
        "stage": "feedback",
        "file": parsed.file,
        "rows": done.rows,
        "taken": done.taken,
        "unknown": done.unknown,
        "rejected": done.rejected,
        "exit_status": 0 if done.taken == done.rows else INCOMPLETE_STATUS,
    }

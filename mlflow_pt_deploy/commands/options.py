"""Options of a pipeline command from its parsed arguments."""

from __future__ import annotations

import argparse
import os

from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.option_fields import option_specs


def read_options(parsed: argparse.Namespace) -> Options:
    """Build `Options` from the flags; options without a flag get their default."""
    known = {spec.name for spec in option_specs(Options)}
    given = {key: value for key, value in vars(parsed).items() if key in known}
    if not given.get("storage"):  # an environment variable, since it may hold a password
        given["storage"] = os.environ.get("PT_DEPLOY_STORAGE", "")
    return Options(**given)

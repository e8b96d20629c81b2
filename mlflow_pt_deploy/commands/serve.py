"""The command ``serve``."""

from __future__ import annotations

import argparse
from typing import Any

from mlflow_pt_deploy.option_fields import option_specs
from mlflow_pt_deploy.serving.settings import ServerSettings


def serve(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.model_config import parse_config
    from mlflow_pt_deploy.serving import api

    settings = {spec.name: getattr(parsed, spec.name) for spec in option_specs(ServerSettings)}
    api.serve(parsed.uri, *parsed.more, model_config=parse_config(parsed.config), **settings)
    return {"stage": "serve", "uri": parsed.uri}

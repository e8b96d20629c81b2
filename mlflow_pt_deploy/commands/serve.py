"""The commands ``serve`` and ``package``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.option_fields import option_specs
from mlflow_pt_deploy.serving.settings import ServerSettings


def serve(parsed: argparse.Namespace) -> dict[str, Any]:
    """Serve models; what the command line leaves out comes from the environment."""
    from mlflow_pt_deploy.model_config import parse_config
    from mlflow_pt_deploy.serving import api
    from mlflow_pt_deploy.serving.platform import default_model, settings_from

    given = vars(parsed)
    named = {spec.name for spec in option_specs(ServerSettings)} & given.keys()
    settings = settings_from(os.environ) | {name: given[name] for name in named}
    models = parsed.models or [default_model(os.environ)]
    api.serve(*models, model_config=parse_config(parsed.config), **settings)
    return {"stage": "serve", "uri": models[0]}


def package(parsed: argparse.Namespace) -> dict[str, Any]:
    """Write a folder from which an image, Kubernetes objects or a function are built."""
    from mlflow_pt_deploy.packaging.package import write_package

    out = Path(parsed.out or f"package-{parsed.target}")
    done = write_package(
        parsed.uri,
        parsed.target,
        out,
        image=parsed.image,
        keep_golden_rows=not parsed.without_golden_rows,
    )
    print(f"{out}: {done.variant}, {done.size_mb:.0f} MB, with {', '.join(done.files)}")
    print(f"next: the commands in {out / 'README.md'}")
    return {"stage": "package", "out": str(out), "target": done.target, "variant": done.variant}

"""Processes of our own: with the interpreter, the import path and so the very code of their parent.

A checkout may lie beside an installed package, and is what runs where its parent does.
"""

from __future__ import annotations

import os
import sys


def command(module: str, *arguments: str) -> list[str]:
    """What runs a module of this package.

    A file in the working folder takes no library's place, be it called ``datasets.py``: ``-P``.
    """
    return [sys.executable, "-P", "-m", f"mlflow_pt_deploy.{module}", *arguments]


def environment(**variables: str) -> dict[str, str]:
    """This process's, with its way to import."""
    path = os.pathsep.join(os.fspath(path) or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": path, **variables}

"""Event loop with more threads, for MLflow's own server.

    UVICORN_LOOP=mlflow_pt_deploy.serving.uvicorn_loop:new_loop mlflow models serve -m MODEL

MLflow's server runs each request on a thread of asyncio's default pool. That pool has four threads
more than there are cores, so few requests would share a batch.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

from mlflow_pt_deploy.system.hardware import SWITCH_S

THREADS = 64


def new_loop() -> asyncio.AbstractEventLoop:
    """Create uvicorn's default loop with `THREADS` threads, and set `SWITCH_S`."""
    from uvicorn.loops.auto import auto_loop_factory

    sys.setswitchinterval(SWITCH_S)
    loop = auto_loop_factory()()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="score"))
    return loop

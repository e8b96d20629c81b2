"""More threads for MLflow's own server.

    UVICORN_LOOP=mlflow_pt_deploy.serving.uvicorn_loop:new_loop mlflow models serve -m MODEL

It answers each request in a thread of asyncio's pool, which has four more than there are cores:
requests beyond those never meet in the batcher. Uvicorn takes this loop by its environment.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

THREADS = 64
SWITCH_S = 0.5e-3
"""Python lets a busy thread go on for 5 ms while others wait; a model then waits ten times as long
for its turn as it computes."""


def new_loop() -> asyncio.AbstractEventLoop:
    """The loop that uvicorn would take, with `THREADS` threads and turns of `SWITCH_S` seconds."""
    from uvicorn.loops.auto import auto_loop_factory

    sys.setswitchinterval(SWITCH_S)
    loop = auto_loop_factory()()
    loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="score"))
    return loop

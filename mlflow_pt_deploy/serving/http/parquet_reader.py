"""Reads Parquet bodies in a child process with a memory limit.

A few kilobytes of Parquet can unpack to gigabytes in one call of Arrow, and a damaged file can
crash the process that reads it. Here that ends a child process, and the response is 400.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from multiprocessing import active_children, get_context
from typing import Any

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.serving.model.inputs import check_names

MEMORY_BYTES = 128 * 2**20
"""Memory limit for reading one file, in addition to what Arrow itself needs."""
TIMEOUT_S = 60.0
# A child that hangs is abandoned; the kernel kills it after this much CPU time, in seconds.
_MAX_CPU_S, _MAX_TASKS = 120, 500


class ParquetReader:
    """Owns the child process, which starts with the first Parquet request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._child = 0

    def read(self, body: bytes, column: str, max_rows: int) -> list[Any]:
        """Read the values of a column; blocks until they are read.

        Args:
            body: A Parquet file.
            column: Name of the column.
            max_rows: Most rows.

        Raises:
            RequestError: It is damaged or too large, or the column is missing or nested.
        """
        with self._lock:  # one file at a time, so that the memory limit holds for all of them
            if self._pool is None:
                context = get_context("spawn")
                self._pool = ProcessPoolExecutor(
                    1,
                    mp_context=context,
                    initializer=_limit_process,
                    max_tasks_per_child=_MAX_TASKS,
                )
            try:
                future = self._pool.submit(_read, body, column, max_rows)
                self._child, values = future.result(TIMEOUT_S)
                return values
            except RequestError:
                raise
            except (BrokenProcessPool, TimeoutError, MemoryError) as error:
                self.close()
                raise RequestError(_TOO_LARGE) from error
            except Exception as error:  # Arrow raises many unrelated kinds on a damaged file
                raise RequestError("the body cannot be read as a Parquet file") from error

    def close(self) -> None:
        """End the child process."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        pool.shutdown(wait=False, cancel_futures=True)
        # the interpreter waits for children at its exit, and one over its limit may hang
        for child in active_children():
            if child.pid == self._child:
                child.kill()


_TOO_LARGE = "the Parquet file is damaged or unpacks to too much; send several smaller requests"


def _limit_process() -> None:
    """Limit memory and CPU time of the child; runs in it."""
    import resource

    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # mimalloc reserves 1 GiB, over the limit
    import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401
    from pyarrow import set_cpu_count

    set_cpu_count(1)
    with open("/proc/self/statm", encoding="ascii") as statm:
        data_pages = int(statm.read().split()[5])
    limit = data_pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_S, _MAX_CPU_S))


def _read(body: bytes, column: str, max_rows: int) -> tuple[int, list[Any]]:
    """Read a column; runs in the child."""
    from pyarrow import ArrowMemoryError, types
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(BytesIO(body))
    rows = file.metadata.num_rows
    if rows > max_rows:
        raise RequestError(
            f"the Parquet file has {rows} rows; one request may have {max_rows} (queue_rows). "
            "Send several smaller requests."
        )
    check_names(file.schema_arrow.names, column)
    if column not in file.schema_arrow.names:
        raise RequestError(f"the column '{column}' is missing")
    if types.is_nested(file.schema_arrow.field(column).type):
        raise RequestError(f"the Parquet column '{column}' must be flat, without lists")
    values: list[Any] = []
    max_bytes, seen = 2 * max(len(body), 2 * 2**20), 0
    try:
        for batch in file.iter_batches(16, columns=[column], use_threads=False):
            seen += batch.nbytes
            if seen > max_bytes:
                raise RequestError(_TOO_LARGE)
            values += batch.column(0).to_pylist()
    except ArrowMemoryError as error:
        raise RequestError(_TOO_LARGE) from error
    return os.getpid(), values

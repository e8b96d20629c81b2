"""The request queue: order, and the cost of finding a batch."""

import time

from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.serving.batching.request import (
    BatchRequest,
    RequestContext,
    split_into_chunks,
)
from mlflow_pt_deploy.serving.batching.request_queue import RequestQueue

LIMITS = Limits()


def queued(queue: RequestQueue, length: int, context: RequestContext | None = None) -> BatchRequest:
    """A request of one row at the end of the queue."""
    request = BatchRequest([[1] * length], None, LIMITS, True, context)
    request.chunks = split_into_chunks([length], [0], LIMITS, 2, 16)
    queue.push(request)
    return request


def test_a_deep_queue_is_searched_quickly() -> None:
    queue = RequestQueue()
    for number in range(4000):
        queued(queue, 5 + number % 20)
    start = time.process_time()
    batches = [queue.pop_batch(LIMITS, 2, 16) for _ in range(100)]
    assert time.process_time() - start < 0.25, "0.05 ms a batch; 5 ms if every request is visited"
    assert all(len(batch) == 16 for batch in batches)
    assert queue.rows == 4000 - 1600


def test_abandoned_requests_are_removed_together() -> None:
    queue = RequestQueue()
    gone = RequestContext()
    kept = queued(queue, 5)
    left = [queued(queue, 5, gone), queued(queue, 9, RequestContext(time.monotonic()))]
    gone.disconnected = True
    assert queue.remove_abandoned() == left
    assert queue.rows == 1
    batch = queue.pop_batch(LIMITS, 2, 16)
    assert [ref.request for refs in batch.values() for ref in refs] == [kept]
    assert not queue

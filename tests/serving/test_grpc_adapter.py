"""The Open Inference Protocol over gRPC: what REST answers, its limits, drain and stop."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc", reason="needs the extra `grpc`")
import grpc
import requests
from tiny.certificates import new_certificate
from tiny.server import START_S, free_port, started, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.grpc_adapter import SERVICE
from mlflow_pt_deploy.serving.grpc_server import GrpcServer
from mlflow_pt_deploy.serving.http import open_inference_pb2 as messages
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics
from mlflow_pt_deploy.serving.port import hold_port

TOKEN = "t" * 16
BEARER = (("authorization", f"Bearer {TOKEN}"),)
SECRET = "zanzibar"
VERSION = "0" * 12
LIMIT = 100_000
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Stub:
    """A client of the service with our own messages."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def call(self, method: str, request: Any, **options: Any) -> Any:
        """The response; `options` are those of gRPC's call."""
        return self.future(method, request, **options).result()

    def future(self, method: str, request: Any, **options: Any) -> Any:
        """The call under way."""
        multi = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda each: each if isinstance(each, bytes) else _encoded(each),
            response_deserializer=getattr(messages, f"{method}Response").FromString,
        )
        return multi.future(request, **({"timeout": 60, "wait_for_ready": True} | options))


def _encoded(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded


def request(*texts: str, raw: bool = False, **fields: Any) -> Any:
    """A `ModelInferRequest` with one tensor of texts."""
    found = messages.ModelInferRequest(**({"model_name": "tiny"} | fields))
    elements = [text.encode() for text in texts]
    tensor = found.inputs.add(name="text", datatype="BYTES", shape=[len(texts)])
    if raw:
        found.raw_input_contents.append(packed(*elements))
    else:
        tensor.contents.bytes_contents.extend(elements)
    return found


def packed(*elements: bytes) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + each for each in elements)


@contextmanager
def serving(application: Application) -> Iterator[str]:
    """Run a gRPC server on an event loop in a thread; yields its address."""
    address, loop, stopping = (
        f"127.0.0.1:{free_port()}",
        asyncio.new_event_loop(),
        threading.Event(),
    )
    server = new_server(application, address, stopping.is_set, on_failed=print)
    server.start(loop)
    assert server._task is not None
    thread = threading.Thread(target=loop.run_until_complete, args=(server._task,))
    thread.start()
    try:
        yield address
    finally:
        stopping.set()
        thread.join(20)
        loop.close()


def new_server(
    application: Application,
    address: str,
    stopping: Callable[[], bool],
    on_failed: Callable[[Exception], None],
) -> GrpcServer:
    return GrpcServer(
        application,
        address,
        tls=None,
        max_body_bytes=LIMIT,
        max_calls=100,
        idle_s=60,
        grace_s=5,
        stopping=stopping,
        on_failed=on_failed,
    )


@pytest.fixture(scope="module")
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics()


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory, metrics: PrometheusMetrics) -> Iterator[Stub]:
    folder = save_tiny(tmp_path_factory.mktemp("grpc") / "tiny", predict_s=0.002, slow_s=1)
    model = ServedModel("tiny", source(str(folder)))
    model.open()
    application = Application({"tiny": model}, metrics=metrics, auth=TokenAuth((TOKEN.encode(),)))
    with serving(application) as address, grpc.insecure_channel(address) as channel:
        yield Stub(channel)
    application.stop()


def infer(stub: Stub, given: Any, **options: Any) -> Any:
    return stub.call("ModelInfer", given, **({"metadata": BEARER} | options))


@pytest.mark.parametrize("raw", [False, True])
def test_texts_are_scored(stub: Stub, raw: bool) -> None:
    found = infer(stub, request("red", "blue ü", raw=raw, id="my id"))
    assert (found.model_name, found.model_version, found.id) == ("tiny", VERSION, "my id")
    assert [(each.name, each.datatype, list(each.shape)) for each in found.outputs] == [
        ("label", "BYTES", [2]),
        ("score", "FP64", [2]),
    ]
    labels, scores = found.raw_output_contents
    assert labels == packed(b"red", b"blue")
    assert len(scores) == 16


def test_parameters_outputs_and_versions(stub: Stub) -> None:
    given = request("red", model_version=VERSION)
    given.parameters["top_k"].int64_param = 3
    given.outputs.add(name="label")
    found = infer(stub, given)
    assert [(each.name, list(each.shape)) for each in found.outputs] == [("label", [1, 3])]
    assert list(found.raw_output_contents) == [packed(b"red", b"green", b"blue")]


def test_metadata_carries_the_headers(stub: Stub) -> None:
    call = stub.future("ModelInfer", request("red"), metadata=(*BEARER, ("x-request-id", "my-id")))
    found = dict(call.trailing_metadata())
    assert (found["x-request-id"], found["x-model-version"]) == ("my-id", VERSION)


def test_probes_need_no_token_and_metadata_do(stub: Stub) -> None:
    assert stub.call("ServerLive", messages.ServerLiveRequest()).live
    assert stub.call("ServerReady", messages.ServerReadyRequest()).ready
    assert stub.call("ModelReady", messages.ModelReadyRequest(name="tiny")).ready
    about = messages.ModelMetadataRequest(name="tiny", version=VERSION)
    for method, given in (
        ("ServerMetadata", messages.ServerMetadataRequest()),
        ("ModelMetadata", about),
        ("ModelInfer", request("red")),
    ):
        with pytest.raises(grpc.RpcError) as failed:
            stub.call(method, given)
        assert failed.value.code() == grpc.StatusCode.UNAUTHENTICATED
    found = stub.call("ModelMetadata", about, metadata=BEARER)
    assert (found.inputs[0].name, list(found.inputs[0].shape)) == ("text", [-1])
    server = stub.call("ServerMetadata", messages.ServerMetadataRequest(), metadata=BEARER)
    assert server.name == "pt-deploy"


def wrong() -> Iterator[tuple[Any, grpc.StatusCode, str]]:
    """Requests, the status of their calls, and a part of the message."""
    not_found = grpc.StatusCode.NOT_FOUND
    yield request(SECRET, model_name="unknown"), not_found, "no such model"
    yield request(SECRET, model_name=""), not_found, "no such model"
    yield request(SECRET, model_name=f"tiny/versions/{VERSION}"), not_found, "no such model"
    yield request(SECRET, model_version="7"), not_found, "does not serve"
    yield messages.ModelInferRequest(model_name="tiny"), INVALID, "0 input tensors"
    twice = request(SECRET)
    twice.inputs.add(name="text", datatype="BYTES", shape=[1])
    yield twice, INVALID, "2 input tensors"
    for shape in ([2], [1, 2], [-1], [2**62], []):
        odd = request(SECRET)
        odd.inputs[0].ClearField("shape")
        odd.inputs[0].shape.extend(shape)
        yield odd, INVALID, "queue_rows" if shape == [2**62] else "shape"
    numbers = messages.ModelInferRequest(model_name="tiny")
    numbers.inputs.add(name="text", datatype="INT32", shape=[1]).contents.int_contents.append(7)
    yield numbers, INVALID, "must be BYTES"
    more = request(SECRET, raw=True)
    more.raw_input_contents.append(b"")
    yield more, INVALID, "its data once"
    both = request(SECRET, raw=True)
    both.inputs[0].contents.bytes_contents.append(b"red")
    yield both, INVALID, "its data once"
    torn = request(SECRET, raw=True)
    torn.raw_input_contents[0] = torn.raw_input_contents[0][:-1]
    yield torn, INVALID, "as many elements"
    binary = messages.ModelInferRequest(model_name="tiny", raw_input_contents=[packed(b"\xff")])
    binary.inputs.add(name="text", datatype="BYTES", shape=[1])
    yield binary, INVALID, "'text' row 0 is not UTF-8"
    top = request(SECRET)
    top.parameters["top_k"].string_param = SECRET
    yield top, INVALID, "'top_k'"
    explained = request(SECRET)
    explained.parameters["explain"].bool_param = True
    yield explained, INVALID, "'explain' is not part of this protocol"
    yield request(f"explode {SECRET}"), grpc.StatusCode.INTERNAL, "the server's log"
    yield request("x" * (LIMIT + 1)), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"


@pytest.mark.parametrize(("given", "code", "message"), list(wrong()))
def test_wrong_calls_have_a_status_and_repeat_nothing(
    stub: Stub, given: Any, code: grpc.StatusCode, message: str
) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        infer(stub, given)
    assert failed.value.code() == code
    assert message in failed.value.details()
    assert SECRET not in failed.value.details()


def test_many_rows_are_converted_on_a_thread(stub: Stub) -> None:
    found = infer(stub, request(*["red " + "x" * 50] * 500))
    assert found.raw_output_contents[0] == packed(*[b"red"] * 500)


def test_a_compressed_bomb_is_rejected(stub: Stub) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        infer(stub, request("x" * 50 * LIMIT), compression=grpc.Compression.Gzip)
    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_damaged_messages_harm_nobody(stub: Stub) -> None:
    with pytest.raises(grpc.RpcError):
        infer(stub, b"\xff" * 100)
    with pytest.raises(grpc.RpcError) as failed:
        stub.call("ModelInfer", request("red"), metadata=(*BEARER, ("x-deadline-ms", "0")))
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert infer(stub, request("red")).model_name == "tiny"


def test_a_cancelled_call_is_counted_and_its_rows_are_dropped(
    stub: Stub, metrics: PrometheusMetrics
) -> None:
    call = stub.future("ModelInfer", request("slow"), metadata=BEARER)
    until(lambda: b'in_flight{model="tiny"} 1.0' in (metrics.expose() or b""))
    call.cancel()
    until(lambda: b'status="499",version=""} 1.0' in (metrics.expose() or b""))
    assert infer(stub, request("red")).model_name == "tiny"


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    (held,) = hold_port("127.0.0.1", 0)
    with held, pytest.raises(ServingError, match="give another --grpc-port"):
        held.listen()
        hold_port("127.0.0.1", held.getsockname()[1], "--grpc-port")


def test_a_port_that_cannot_be_listened_on_is_reported() -> None:
    model = ServedModel("tiny", source("tiny"))
    failures: list[Exception] = []
    loop = asyncio.new_event_loop()
    application = Application({"tiny": model}, is_listening=lambda: server.listening)
    server = new_server(application, "192.0.2.1:1", lambda: False, failures.append)
    server.start(loop)
    server.close()
    loop.close()
    assert len(failures) == 1
    assert not server.listening


def test_workers_share_the_port_over_tls_and_drain(tmp_path: Path) -> None:
    certificate, key = new_certificate(tmp_path)
    port = free_port()
    words = (str(save_tiny(tmp_path / "tiny", predict_s=0.002, slow_s=1.5)), "--replicas", "2")
    words += ("--grpc-port", str(port), "--drain-s", "0.5")
    words += ("--tls-cert", str(certificate), "--tls-key", str(key))
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())

    def channel() -> Any:
        own = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own
        return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=own)

    with started(tmp_path / "scratch", *words) as served, ThreadPoolExecutor(8) as pool:
        assert f"gRPC on 127.0.0.1:{port}" in served.banner + str(served.process.stdout.readline())

        def score(text: str) -> str:
            with channel() as own:
                answer = Stub(own).call("ModelInfer", request(text), timeout=START_S)
                return str(answer.raw_output_contents[0][4:].decode())

        assert list(pool.map(score, ["red", "blue"] * 8)) == ["red", "blue"] * 8
        ready = f"{served.url}/v2/health/ready"
        until(lambda: requests.get(ready, verify=certificate, timeout=10).status_code == 200)
        slow = [pool.submit(score, "slow red") for _ in range(4)]
        metrics = f"{served.url}/metrics"
        until(
            lambda: (
                'in_flight{model="tiny"} 4.0'
                in requests.get(metrics, verify=certificate, timeout=10).text
            )
        )
        served.process.send_signal(signal.SIGTERM)
        with channel() as own:
            probe = messages.ServerReadyRequest()
            until(lambda: not Stub(own).call("ServerReady", probe).ready)
        assert [each.result() for each in slow] == ["red"] * 4
        assert served.process.wait(60) == 0


def test_a_row_without_device_memory_is_unavailable(tmp_path: Path) -> None:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny", full_on="slow"))))
    model.open()
    with (
        serving(Application({"tiny": model})) as address,
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError, match="a row needs more memory") as error,
    ):
        Stub(channel).call("ModelInfer", request("red", "slow"))
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert ("retry-after", "1") in error.value.trailing_metadata()

"""Clients of the Open Inference Protocol that others wrote; run by a Python that has them.

    python inference_clients.py triton|kserve HTTP_URL GRPC_ADDRESS

Prints what each way of asking gave, as one JSON object. The two are run in processes of their own:
both register the messages of the protocol. Imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np

MODEL, TEXTS = "tiny", ["red", "green blue blue", "blue ü"]


def main() -> None:
    name, url, address = sys.argv[1:]
    found = triton(url, address) if name == "triton" else asyncio.run(kserve(url, address))
    print(json.dumps(found))


def triton(url: str, address: str) -> dict[str, Any]:
    import tritonclient.grpc
    import tritonclient.http

    def ask(client: Any, new_tensor: Any, shape: list[int], **options: Any) -> Any:
        tensor = new_tensor("text", shape, "BYTES")
        texts = np.array(TEXTS, dtype=object).reshape(shape)
        tensor.set_data_from_numpy(texts, **options)
        answer = client.infer(MODEL, [tensor], request_id="my id")
        return _plain(answer.as_numpy("label"), answer.as_numpy("score"))

    http = tritonclient.http.InferenceServerClient(url.partition("://")[2])
    rpc = tritonclient.grpc.InferenceServerClient(address)
    found = {
        "http": ask(http, tritonclient.http.InferInput, [3]),
        "http, column": ask(http, tritonclient.http.InferInput, [3, 1]),
        "http, JSON": ask(http, tritonclient.http.InferInput, [3], binary_data=False),
        "grpc": ask(rpc, tritonclient.grpc.InferInput, [3]),
        "grpc, column": ask(rpc, tritonclient.grpc.InferInput, [3, 1]),
    }
    for kind, client in (("http", http), ("grpc", rpc)):
        probes = [client.is_server_live(), client.is_server_ready(), client.is_model_ready(MODEL)]
        found[f"{kind}, probes"] = probes
        tensor = getattr(tritonclient, kind).InferInput("text", [1], "BYTES")
        tensor.set_data_from_numpy(np.array(["red"], dtype=object))
        found[f"{kind}, error"] = _message(client, tensor)
    found["http, metadata"] = http.get_model_metadata(MODEL)["inputs"]
    found["grpc, metadata"] = rpc.get_model_metadata(MODEL, as_json=True)["inputs"]
    return found


def _message(client: Any, tensor: Any) -> str:
    """The error of a request for an unknown model."""
    from tritonclient.utils import InferenceServerException

    try:
        client.infer("unknown", [tensor])
    except InferenceServerException as error:
        return str(error.message())
    return ""


async def kserve(url: str, address: str) -> dict[str, Any]:
    from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
    from kserve.inference_client import RESTConfig

    def request(binary: bool) -> Any:
        tensor = InferInput("text", [3], "BYTES")
        tensor.set_data_from_numpy(np.array(TEXTS, dtype=object), binary_data=binary)
        return InferRequest(model_name=MODEL, infer_inputs=[tensor])

    rest, rpc = InferenceRESTClient(RESTConfig(protocol="v2")), InferenceGRPCClient(address)
    found: dict[str, Any] = {}
    for binary in (True, False):
        answer = await rest.infer(url, request(binary), model_name=MODEL)
        found[f"http, binary {binary}"] = _plain(*(each.as_numpy() for each in answer.outputs))
        answer = await rpc.infer(request(binary))
        found[f"grpc, binary {binary}"] = _plain(*(each.as_numpy() for each in answer.outputs))
    found["http, probes"] = [
        await rest.is_server_live(url),
        await rest.is_server_ready(url),
        await rest.is_model_ready(url, MODEL),
    ]
    found["grpc, probes"] = [
        await rpc.is_server_live(),
        await rpc.is_server_ready(),
        await rpc.is_model_ready(MODEL),
    ]
    return found


def _plain(labels: Any, scores: Any) -> list[list[Any]]:
    """Pairs of label and score; gRPC gives labels as bytes."""
    texts = [each.decode() if isinstance(each, bytes) else str(each) for each in labels.ravel()]
    return [list(pair) for pair in zip(texts, scores.ravel().tolist(), strict=True)]


if __name__ == "__main__":
    main()

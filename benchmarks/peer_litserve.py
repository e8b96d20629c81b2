"""LitServe on MLflow's protocol, for `open_loop.py --peer`; run it with a Python that has LitServe.

    python benchmarks/open_loop.py ... \
        --peer 'LitServe, eager=VENV/bin/python benchmarks/peer_litserve.py {port} HF_FOLDER' \
        --peer 'LitServe, ours=VENV/bin/python benchmarks/peer_litserve.py {port} models:/NAME@champion'

A folder with a config.json runs in PyTorch, eager fp32; everything else is loaded by MLflow. Both
are batched by LitServe, up to 32 rows within 5 ms, which is its best on two cores.
"""  # noqa: E501

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found]

Score = Callable[[list[str]], list[Any]]


def eager(folder: str) -> Score:
    """A Hugging Face folder: texts to labels and scores."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    labels = model.config.id2label

    def score(texts: list[str]) -> list[Any]:
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            best = model(**inputs).logits.softmax(1).max(1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": labels[at], "score": value} for at, value in pairs]

    return score


def ours(uri: str) -> Score:
    """Anything that MLflow loads."""
    import mlflow

    predict: Score = mlflow.pyfunc.load_model(uri).predict
    return predict


class Api(litserve.LitAPI):  # type: ignore[misc]
    """LitServe's four verbs."""

    def setup(self, device: str) -> None:
        self.score = (eager if (Path(MODEL) / "config.json").is_file() else ours)(MODEL)

    def decode_request(self, request: dict[str, Any]) -> str:
        return str(request["inputs"][0])

    def predict(self, texts: list[str]) -> list[Any]:
        return self.score(list(texts))

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"predictions": [output]}


PORT, MODEL = (int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else (0, "")

if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.005, api_path="/invocations")
    server = litserve.LitServer(api, accelerator="cpu", healthcheck_path="/ping")
    server.run(port=PORT, generate_client_file=False)

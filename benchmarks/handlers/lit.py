"""LitServe with a handler around the plain teacher or around our artifact.

python lit.py (--teacher HF_FOLDER | --artifact MLFLOW_FOLDER) --port 8000
"""

import argparse

import litserve
from score import make_score


class Classifier(litserve.LitAPI):
    def __init__(self, options: argparse.Namespace) -> None:
        # the same limit as for our batches
        super().__init__(
            max_batch_size=32, batch_timeout=options.batch_timeout_s, api_path="/invocations"
        )
        self._options = options

    def setup(self, device: str) -> None:
        self._score = make_score(self._options.teacher, self._options.artifact)

    def decode_request(self, request: dict) -> str:
        return request["inputs"][0]

    def predict(self, texts: list[str]) -> list[dict]:
        return self._score(texts)

    def encode_response(self, answer: dict) -> dict:
        return {"predictions": [answer]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher")
    parser.add_argument("--artifact")
    parser.add_argument("--batch-timeout-s", type=float, default=0.002)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = litserve.LitServer(Classifier(options), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False)

"""BentoML with a service around the plain teacher or around our artifact.

TEACHER=HF_FOLDER or ARTIFACT=MLFLOW_FOLDER in the environment; bentoml serve bento:Classifier
"""

import os

import bentoml
from score import make_score


@bentoml.service(workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        self._score = make_score(os.environ.get("TEACHER"), os.environ.get("ARTIFACT"))

    @bentoml.api(route="/invocations", batchable=True, max_batch_size=32, max_latency_ms=100)
    def predict(self, inputs: list[str]) -> list[dict]:
        return self._score(inputs)


if __name__ == "__main__":
    import argparse
    import sys
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher")
    parser.add_argument("--artifact")
    parser.add_argument("--port", default="3000")
    options = parser.parse_args()
    for name in ("teacher", "artifact"):
        if value := getattr(options, name):
            os.environ[name.upper()] = value
    os.environ["BENTOML_DO_NOT_TRACK"] = "true"
    os.chdir(Path(__file__).parent)
    words = ["serve", "bento:Classifier", "--host", "127.0.0.1", "--port", options.port]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *words])

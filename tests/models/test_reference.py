"""Resolving references: folders, and a small hub server on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.models.reference import locate
from mlflow_pt_deploy.training.inference import predict_logits

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves the files of a folder as `shop/model`; `shop/gated` is forbidden."""

    folder: Path
    requested: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requested.append(self.path)
        if self.path.startswith("/api/models/shop/model"):
            files = [
                {"type": "file", "rfilename": it.name, "path": it.name, "oid": "1", "size": 1}
                for it in sorted(self.folder.iterdir())
            ]
            model = {"id": "shop/model", "sha": COMMIT, "siblings": files}
            self._answer(json.dumps(files if "/tree/" in self.path else model).encode())
        elif self.path.startswith(f"/shop/model/resolve/{COMMIT}/"):
            self._answer((self.folder / self.path.rpartition("/")[2]).read_bytes())
        elif "gated" in self.path:
            self._answer(b"", 403, "GatedRepo")
        else:
            self._answer(b"", 404, "RepoNotFound")

    def _answer(self, body: bytes, status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Paths that the hub received."""
    Hub.folder, Hub.requested = tiny_model, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    _own_cache(tmp_path, monkeypatch)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Hub.requested
    server.shutdown()
    thread.join()
    server.server_close()


def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_hub_model(hub: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = load_classifier("shop/model")
    expected = predict_logits(load_classifier(str(tiny_model)), ["my card"])
    assert (predict_logits(classifier, ["my card"]) == expected).all()
    files = [path.rpartition("/")[2] for path in hub if "resolve" in path]
    assert max(map(files.index, ("config.json", "tokenizer.json"))) < files.index(
        "model.safetensors"
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no server
    assert (predict_logits(load_classifier("shop/model"), ["my card"]) == expected).all()


def test_wrong_task_is_rejected_before_weights_are_downloaded(
    hub: list[str], tmp_path: Path, tiny_model: Path
) -> None:
    Hub.folder = tmp_path / "files"
    Hub.folder.mkdir()
    for path in tiny_model.iterdir():
        (Hub.folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((Hub.folder / "config.json").read_text(encoding="utf8"))
    config["architectures"] = ["BertForQuestionAnswering"]
    (Hub.folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    with pytest.raises(ModelError, match="^shop/model is a model for question answering"):
        load_classifier("shop/model")
    assert not any("safetensors" in path for path in hub)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("shop/nothing", "the hub has no such model or it is private .set HF_TOKEN"),
        ("shop/gated", "accept its licence on the hub and set HF_TOKEN"),
    ],
)
def test_errors_of_the_hub(hub: list[str], reference: str, problem: str) -> None:
    with pytest.raises(ModelError, match=f"^{reference}: no classifier can be loaded.*{problem}"):
        load_classifier(reference)


def test_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_cache(tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"cannot be reached \(.*refused\).*HTTPS_PROXY or HF_END"):
        load_classifier("shop/model")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "reference", ["./model", "/no/model", "~/no/model", "a/b/c", "https://hf.co/a/b", "two words"]
)
def test_paths_are_not_requested_from_the_hub(hub: list[str], reference: str) -> None:
    with pytest.raises(ModelError, match=r"there is no such folder"):
        load_classifier(reference)
    assert hub == []


def test_paths_that_look_like_hub_ids(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no such folder"):
        load_classifier("models/bert")  # a folder `models` exists, so this is a path
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="^file is a file. Give the folder that contains it"):
        load_classifier("file")
    with pytest.raises(ModelError, match="^no model is given"):
        load_classifier(" ")
    assert hub == []
    assert locate("models") == (Path("models"), False)

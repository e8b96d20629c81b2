"""TorchServe with a handler around the plain teacher or around our artifact.

python torchserve.py (--teacher HF_FOLDER | --artifact MLFLOW_FOLDER) --folder NEW --port 8080

Packs itself and score.py into an archive and replaces itself by TorchServe's Java process, whose
only worker loads the handler from there. Needs Java 17 or 11. TorchServe answers 503 when its queue
of 100 is full.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

NAME = "classifier"
# thread counts are TorchServe's defaults: one HTTP thread per core
CONFIG = """
inference_address=http://127.0.0.1:{port}
management_address=http://127.0.0.1:{port}
metrics_address=http://127.0.0.1:{free[0]}
grpc_inference_address=127.0.0.1
grpc_management_address=127.0.0.1
grpc_inference_port={free[1]}
grpc_management_port={free[2]}
disable_token_authorization=true
enable_envvars_config=false
enable_metrics_api=false
disable_system_metrics=true
model_store={folder}
load_models={name}.mar
"""
# by default it writes a line per request to each of two files
QUIET = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="WARN">
  <Appenders>
    <Console name="console" target="SYSTEM_OUT"><PatternLayout pattern="%p %c - %m%n"/></Console>
  </Appenders>
  <Loggers><Root level="warn"><AppenderRef ref="console"/></Root></Loggers>
</Configuration>
"""


class Classifier:
    def initialize(self, context) -> None:
        from score import make_score  # lies beside this file in the archive

        options = context.model_yaml_config["handler"]
        self._score = make_score(options["teacher"], options["artifact"])

    def handle(self, requests: list[dict], context) -> list[dict]:
        texts = [request["body"]["inputs"][0] for request in requests]
        return [{"predictions": [answer]} for answer in self._score(texts)]


def write_archive(folder: Path, options: argparse.Namespace) -> None:
    """Write the .mar file; batches of at most 32 rows like ours, and a batch delay of 2 ms."""
    here = Path(__file__).resolve()
    config = folder / "model-config.yaml"
    settings = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": 32,
        "maxBatchDelay": 2,
        "handler": {"teacher": options.teacher, "artifact": options.artifact},
    }
    config.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    command = [str(Path(sys.executable).with_name("torch-model-archiver")), "--model-name", NAME]
    command += ["--version", "1.0", "--handler", str(here), "--config-file", str(config)]
    command += ["--extra-files", str(here.parent / "score.py"), "--export-path", str(folder), "-f"]
    subprocess.run(command, check=True)


def free_ports(count: int) -> list[int]:
    """Free TCP ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports


def become_torchserve(folder: Path, port: int) -> None:
    """Start the process of `torchserve --foreground`, which would use one common pid file."""
    import ts

    config, log = folder / "config.properties", folder / "log4j2.xml"
    config.write_text(CONFIG.format(port=port, free=free_ports(3), folder=folder, name=NAME))
    log.write_text(QUIET)
    home = Path(ts.__file__).resolve().parents[1]
    java = ["java", f"-Dmodel_server_home={home}", f"-Djava.io.tmpdir={folder}"]
    java += [f"-Dlog4j.configurationFile={log.as_uri()}", "-cp", f"{home}/ts/frontend/*"]
    options = ["--python", sys.executable, "-f", str(config), "-s", str(folder), "-ncs"]
    os.chdir(folder)
    os.execvp(java[0], [*java, "org.pytorch.serve.ModelServer", *options])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher")
    parser.add_argument("--artifact")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_archive(folder, options)
    become_torchserve(folder, options.port)

"""The open-loop load generator against a real server, and the search for the highest rate."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import batch
import rates
import servers
import tables

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")


def point(rate: float, p99_ms: float | None, refused_share: float = 0.0) -> rates.Point:
    times = dict.fromkeys(("p50_ms", "p99_ms", "p999_ms", "p99_all_ms"), p99_ms)
    names = ("refused_p50_ms", "refused_p99_ms", "refused_after_p99_ms")
    refused = zip(names, (2.0, 4.5, 4.1) if refused_share else (None,) * 3, strict=True)
    return rates.Point(
        rate=rate,
        answered_share=1 - refused_share,
        good_per_s=(1 - refused_share) * rate,
        refused_share=refused_share,
        sent_late_p99_ms=0.3,
        errors=0,
        cpu_us=1.0,
        **times,
        **dict(refused),
    )


def fire(program: Path, url: str, bodies: Path, rate: float) -> dict[str, Any]:
    host, port = url.removeprefix("http://").split(":")
    words = [rate, 1, 7, host, port, "/invocations", bodies, 64, 5000]
    command = [str(word) for word in (program, *words)]
    found: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    )
    return found


def test_every_request_is_counted_once_and_late_answers_are_seen(tmp_path: Path) -> None:
    program = rates.build_generator(tmp_path)
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text('{"inputs": ["red"]}\n{"inputs": [7]}\n')
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny", predict_s=0.05))))
    model.open()
    with running(Application({"tiny": model})) as url:
        seen = fire(program, url, bodies, 40)
    assert seen["errors"] == 0
    assert sum(seen["statuses"].values()) == seen["sent"]
    assert seen["statuses"]["200"] == -(-seen["sent"] // 2), "bodies are sent in turn"
    assert seen["in_time"] == seen["statuses"]["200"]
    assert seen["p50_ms"] >= 50
    assert 0 <= seen["sent_late_p99_ms"] < seen["p50_ms"]
    assert seen["p99_all_ms"] is None, "what is not answered with 200 is infinitely late"


def test_a_server_that_is_not_there_is_errors(tmp_path: Path) -> None:
    program = rates.build_generator(tmp_path)
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text("{}\n")
    seen = fire(program, "http://127.0.0.1:9", bodies, 50)
    assert seen["errors"] == seen["sent"] > 0
    assert seen["p99_ms"] is None


def test_the_search_finds_the_rate_at_which_the_tail_breaks() -> None:
    asked: dict[float, rates.Point] = {}
    loads: list[float] = []

    def load(rate: float) -> rates.Point:
        loads.append(rate)
        return point(rate, 20.0 if rate <= 100 else 70.0 if rate <= 300 else None)

    slow, fast = (rates.search(load, 8, limit, asked) for limit in (40, 100))
    assert 90 <= slow <= 100
    assert 270 <= fast <= 300
    assert rates.search(load, 8, 10, asked) == 0
    assert {rate for rate in asked if loads.count(rate) == 1} == {
        rate for rate in asked if asked[rate].keeps(40) or (rate > 128 and asked[rate].keeps(100))
    }, "a rate over the limit is measured twice, other rates once"


def test_a_pause_of_the_machine_does_not_end_the_search() -> None:
    paused: set[float] = set()

    def load(rate: float) -> rates.Point:
        first = rate == 32 and rate not in paused
        paused.add(rate)
        return point(rate, 500.0 if first else 20.0 if rate <= 100 else None)

    assert 90 <= rates.search(load, 8, 40, {}) <= 100


def test_a_server_that_did_not_start_is_a_row_with_its_reason() -> None:
    good = tables.Result("good", "", 1.5, [point(16, 9.0)], {40: 16, 100: 16}, point(32, 99.0, 0.5))
    lines = tables.table([good, tables.Result("bad", "no such module")]).splitlines()
    cells = "| good | 1.5 | 16 | 16 | 9.0, 9.0, 9.0 | 1 | - | 16 | 50% | 2.0, 4.5 (4.1) | 0 |"
    assert lines[2] == cells
    assert lines[3].startswith("| bad | no such module |")
    assert len({line.count("|") for line in lines}) == 1
    row = "| good | 16 | 9.0 | 9.0 | 9.0 | none | 0.3 |"
    assert tables.rates_table([good]).splitlines()[2:] == [row]


def test_a_batch_job_tells_what_a_row_costs_and_the_server_is_held_against_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(save_tiny(tmp_path / "tiny")), "--data", "catalog", "--seconds", "0"]
    batch.main(words)
    seen = json.loads(capsys.readouterr().out)
    assert seen["rows_per_s"] > 0
    assert 0 < seen["cpu_us"] < 1e6
    ours = tables.Result(servers.PT_DEPLOY, "", 1.5, [point(16, 9.0)], {40: 16})
    assert "0.50 of what `pt-deploy` takes at its highest rate." in tables.beside_batch([ours], 0.5)
    ours.overload = replace(point(32, 99.0, 0.5), cpu_us=0.8)
    assert "highest rate and 0.62 where twice" in tables.beside_batch([ours], 0.5)


def test_each_handler_is_asked_with_our_artifact_and_with_the_teacher(tmp_path: Path) -> None:
    folder = Path(servers.__file__).parent / "handlers"
    handlers = {path.name for path in folder.glob("*.py")} - {"score.py", "http_server.py"}
    assert handlers == set(servers.HANDLERS.values())
    model, teacher = save_tiny(tmp_path / "tiny"), tmp_path / "teacher"
    pythons = {"LitServe": None, "TorchServe": "other/python"}
    found = servers.handler_commands(pythons, str(model), teacher, tmp_path)
    assert list(found) == ["TorchServe, our artifact", "TorchServe, eager teacher"]
    ours, eager = found.values()
    assert ours[0] == "other/python"
    assert (Path(ours[-1]) / "MLmodel").is_file(), "the artifact was fetched"
    assert eager[-2:] == ["--teacher", str(teacher)]
    assert [servers.path_of(name) for name in (*found, "LitServe, eager teacher")] == [
        *2 * ["/predictions/classifier"],
        "/invocations",
    ]


def test_a_server_is_awaited_at_its_own_path_and_ends_with_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # the tiny model's code
    model, log = save_tiny(tmp_path / "tiny"), tmp_path / "log"
    command = servers.commands(str(model), tmp_path)[servers.PT_DEPLOY]
    with servers.running(command, log, "/models/tiny/invocations") as run:
        answer = servers.ask(run.url + run.path, "red")
        assert answer["label"] == "red"  # type: ignore[index]
        assert servers.cpu_seconds(run.pid) > 0
    with pytest.raises(OSError):
        servers.ask(run.url + run.path, "red", timeout=5)


def test_the_others_answer_as_we_do_with_our_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(servers.__file__).parent / "handlers")
    from score import make_score

    folder = save_tiny(tmp_path / "tiny")
    texts = ["red", "blue blue green"]
    expected = mlflow.pyfunc.load_model(str(folder)).predict(texts)
    assert make_score(None, str(folder))(texts) == expected

"""Batch prediction: formats, rejected rows, stop and continue, what it imports."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from tiny.artifact import SAVED
from tiny.serving import save_tiny

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.artifacts import write_variant
from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.errors import DataError, PtDeployError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.prediction.options import PredictionOptions
from mlflow_pt_deploy.prediction.runner import PredictionResult, predict_table
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino

TEXTS = ["red red red", "green green", "blue", "red blue blue"]
LABELS = ["red", "green", "blue", "blue"]
WAIT_S = 60.0


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_tiny(tmp_path / "model"))


def write_csv(file: Path, texts: list[str] = TEXTS, name: str = "text") -> str:
    with file.open("w", newline="", encoding="utf8") as opened:
        table = csv.writer(opened)
        table.writerow(["id", name])
        table.writerows([number, text] for number, text in enumerate(texts))
    return str(file)


def write_lines(file: Path, *records: object) -> str:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf8")
    return str(file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]


def read_rows(file: Path) -> list[dict[str, str]]:
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


def predict(model: str, source: str, target: Path, **options: Any) -> PredictionResult:
    return predict_table(model, source, str(target), PredictionOptions(**options))


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".jsonl", ".parquet"])
def test_every_format_of_the_output(model: str, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    done = predict(model, write_csv(tmp_path / "in.csv"), out)
    assert (done.rows, done.rejected, done.rejected_file, done.continued) == (4, 0, None, 0)
    if suffix == ".parquet":
        rows = pq.read_table(out).to_pylist()
    else:
        rows = read_lines(out) if suffix == ".jsonl" else read_rows(out)
    assert [row["label"] for row in rows] == LABELS
    assert [row["text"] for row in rows] == TEXTS and [row["id"] for row in rows] == list("0123")
    assert list(rows[0]) == ["id", "text", "label", "score"]
    assert 0.5 < float(rows[0]["score"]) < 1
    assert {path.name for path in tmp_path.iterdir()} == {"model", "in.csv", out.name}


def test_parquet_keeps_types_and_order(model: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "when": pa.array([1, 2, 3, 4], pa.timestamp("s")),
            "text": pa.array(TEXTS).dictionary_encode(),
            "tags": [["a"], [], None, ["b", "c"]],
        }
    ).replace_schema_metadata({"huggingface": "{}", "owner": "shop"})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    predict(model, str(tmp_path / "in.parquet"), tmp_path / "out.parquet", top_k=2)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(["when", "text", "tags"]).equals(pq.read_table(tmp_path / "in.parquet"))
    assert found.schema.metadata == {b"owner": b"shop"}
    assert [row[0] for row in found["label"].to_pylist()] == LABELS
    assert found.schema.field("score").type == pa.list_(pa.float64())
    predict(model, str(tmp_path / "in.parquet"), tmp_path / "out.csv", top_k=2)
    row = read_rows(tmp_path / "out.csv")[0]
    assert (row["when"], row["tags"]) == ("1970-01-01T00:00:01", '["a"]')
    assert (row["label_1"], row["text"]) == ("red", "red red red")
    assert list(row)[3:] == ["label_1", "score_1", "label_2", "score_2"]


def test_predictions_do_not_replace_columns(model: str, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        {"text": "red", "score": 0.1},
        *[{"text": "green", "new": 1}] * 255,  # the names of the first 256 rows count
        {"text": "blue", "predicted_label": "x"},
    )
    done = predict(model, source, tmp_path / "out.jsonl")
    rows = read_lines(tmp_path / "out.jsonl")
    assert rows[0] == {"text": "red", "score": 0.1, **_predicted(rows[0], "red")}
    assert rows[1] == {"text": "green", "new": 1, **_predicted(rows[1], "green")}
    assert len(rows) == 256
    assert done.rejected_file is not None
    assert read_lines(done.rejected_file) == [
        {"row": 257, "line": 257, "reason": "has a key with the name of a prediction"}
    ]
    both = write_lines(tmp_path / "both.jsonl", {"text": "", "label": 1, "predicted_score": 2})
    with pytest.raises(DataError, match="with and without the prefix"):
        predict(model, both, tmp_path / "both-out.jsonl")


def _predicted(row: dict[str, Any], label: str) -> dict[str, Any]:
    return {"predicted_label": label, "predicted_score": row["predicted_score"]}


def test_rows_that_cannot_be_used_are_kept_apart(model: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [b'{"text": "red"}', b"", b"{", b"[1]", b'{"text": "\xff"}', b'{"text": null}']
    lines += [b'{"text": " "}', b'{"text": 5}', b'{"other": "x"}', b'{"text": "explode"}']
    source.write_bytes(b"\n".join([*lines, b'{"text": "nan"}', b'{"text": "blue"}']))
    done = predict(model, str(source), tmp_path / "out.jsonl")
    assert (done.rows, done.rejected) == (11, 9)
    assert [row["label"] for row in read_lines(tmp_path / "out.jsonl")] == ["red", "blue"]
    assert done.rejected_file == tmp_path / "out.jsonl.rejected.jsonl"
    rejected = read_lines(done.rejected_file)
    assert rejected[0] == {"row": 2, "line": 3, "reason": "is not JSON"}
    assert [entry["reason"] for entry in rejected] == [
        "is not JSON",
        "is not a JSON object",
        "is not UTF-8",
        "`text` is missing or blank",
        "`text` is missing or blank",
        "`text` is not a string",
        "`text` is missing or blank",
        "the model failed at it (RuntimeError)",
        "the model failed at it (ServingError)",
    ]
    with pytest.raises(DataError, match="row 2, line 3: is not JSON. Correct it, or leave out"):
        predict(model, str(source), tmp_path / "strict.jsonl", strict=True)
    assert not (tmp_path / "strict.jsonl").exists()
    assert predict(model, str(source), tmp_path / "strict.jsonl").rejected == 9


def test_parquet_with_nulls_and_broken_texts(model: str, tmp_path: Path) -> None:
    buffers = pa.array([b"red", None, b"\xff", b"blue"], pa.binary()).buffers()
    bad = pa.Array.from_buffers(pa.string(), 4, buffers)
    pq.write_table(pa.table({"text": bad}), tmp_path / "in.parquet")
    done = predict(model, str(tmp_path / "in.parquet"), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["label"].to_pylist() == ["red", "blue"]
    assert done.rejected_file is not None
    assert read_lines(done.rejected_file) == [
        {"row": 2, "reason": "`text` is missing or blank"},
        {"row": 3, "reason": "is not UTF-8"},
    ]
    with pytest.raises(DataError, match="no column `other`"):
        predict(model, str(tmp_path / "in.parquet"), tmp_path / "out.jsonl", column="other")
    pq.write_table(pa.table({"text": ["red"] * 4, "note": bad}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match="not UTF-8 in rows 1 to 4. Write .parquet, which keeps"):
        predict(model, str(tmp_path / "in.parquet"), tmp_path / "out.jsonl")


def test_images_as_names_bytes_and_structs(tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "model", images=True))
    red, blue = picture("RGB", (6, 6), (250, 0, 0)), picture("RGB", (6, 6), (0, 0, 250))
    (tmp_path / "blue.png").write_bytes(blue)
    source = write_lines(
        tmp_path / "in.jsonl",
        {"picture": "blue.png"},
        {"picture": "none.png"},
        {"picture": "in.jsonl"},
    )
    done = predict(model, source, tmp_path / "out.jsonl", column="picture")
    assert [row["label"] for row in read_lines(tmp_path / "out.jsonl")] == ["blue"]
    assert done.rejected_file is not None
    reasons = [entry["reason"] for entry in read_lines(done.rejected_file)]
    assert reasons[0].startswith("`picture` does not name a file in the folder")
    assert reasons[1].startswith("`picture` is not an image of a supported format")
    for cells in ([red, b"", blue], [{"bytes": red}, {"bytes": None}, {"bytes": blue}]):
        pq.write_table(pa.table({"image": cells}), tmp_path / "in.parquet")
        predict(model, str(tmp_path / "in.parquet"), tmp_path / "out.parquet", overwrite=True)
        found = pq.read_table(tmp_path / "out.parquet")
        assert found["label"].to_pylist() == ["red", "blue"]
    predict(model, str(tmp_path / "in.parquet"), tmp_path / "base64.jsonl")
    assert read_lines(tmp_path / "base64.jsonl")[0]["image"]["bytes"].startswith("iVBOR")


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (["id", "body"], "has no column `text`; it has id, body. Name the one to score with"),
        (["text", "text_pair"], "more than one text per row .* with --column text"),
        (["text", "text"], "several columns with the name 'text'"),
    ],
)
def test_columns(model: str, tmp_path: Path, columns: list[str], match: str) -> None:
    (tmp_path / "in.csv").write_text(",".join(columns) + "\nred,blue\n")
    with pytest.raises(DataError, match=match):
        predict(model, str(tmp_path / "in.csv"), tmp_path / "out.csv")
    if columns[1] == "body":
        predict(model, str(tmp_path / "in.csv"), tmp_path / "out.csv", column="body")
        assert read_rows(tmp_path / "out.csv")[0]["label"] == "blue"


def test_names_that_are_refused(model: str, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv")
    cases = {
        (source, "out.tsv"): "out.tsv has an unsupported format",
        (source, "none/out.csv"): "the folder of .* does not exist",
        (source, "in.csv"): "is the input too",
        (source, "model/MLmodel.csv"): "exists. Give another name, or replace it with --overwrite",
        (str(tmp_path / "none.csv"), "out.csv"): "none.csv is not a file",
    }
    (tmp_path / "model" / "MLmodel.csv").touch()
    for (given, target), match in cases.items():
        with pytest.raises(DataError, match=match):
            predict(model, given, tmp_path / target)
    with pytest.raises(PtDeployError, match="'top_k' must be a whole number from 1 to 3"):
        predict(model, source, tmp_path / "out.csv", top_k=4)
    with pytest.raises(PtDeployError, match="cannot be fetched or opened"):
        predict(str(tmp_path / "none"), source, tmp_path / "out.csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="it is not a Parquet file, or is damaged"):
        predict(model, str(tmp_path / "bad.parquet"), tmp_path / "out.csv")


def test_tables_without_rows(model: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,id\n")
    predict(model, str(tmp_path / "in.csv"), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "text,id,label,score\n"
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "n": pa.array([], pa.int8())}),
        tmp_path / "in.parquet",
    )
    predict(model, str(tmp_path / "in.parquet"), tmp_path / "out.parquet")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert [str(field.type) for field in schema] == ["string", "int8", "string", "double"]
    with pytest.raises(DataError, match="no row could be scored, .* was not written"):
        predict(model, write_csv(tmp_path / "blank.csv", ["", " "]), tmp_path / "blank-out.csv")
    assert len(read_lines(tmp_path / "blank-out.csv.rejected.jsonl")) == 2


def test_json_lines_to_parquet(model: str, tmp_path: Path) -> None:
    records = [{"text": "red", "n": 1}] * 300 + [{"text": "blue", "n": 0.5, "more": "x"}]
    predict(model, write_lines(tmp_path / "in.jsonl", *records), tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["text", "n", "more", "label", "score"]
    assert found["n"].to_pylist()[-2:] == [1.0, 0.5]
    done = predict(model, str(tmp_path / "in.jsonl"), tmp_path / "out.csv")
    assert done.rejected == 1  # CSV has no place for the later key
    mixed = write_lines(
        tmp_path / "mixed.jsonl", {"text": "red", "n": 1}, {"text": "red", "n": "x"}
    )
    with pytest.raises(DataError, match="column `n` has values of different types in rows 1 to 2"):
        predict(model, mixed, tmp_path / "mixed.parquet")


def test_standard_input(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b'{"text": "red"}\n{"text": "blue"}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    predict(model, "-", tmp_path / "out.csv")
    assert [row["label"] for row in read_rows(tmp_path / "out.csv")] == ["red", "blue"]


def test_command(model: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    source, out = write_csv(tmp_path / "in.csv", [*TEXTS, ""]), tmp_path / "out.csv"
    assert main(["predict", model, source, str(out), "-C", "num_threads=1", "--json"]) == 0
    shown = capfdbinary.readouterr().out.decode().splitlines()
    assert shown[0].startswith(f"{out}: 4 rows by {model}, ")
    assert shown[1] == f"1 of 5 rows were rejected; {out}.rejected.jsonl says why"
    document = json.loads(shown[2])
    assert (document["rows"], document["rejected"], document["continued"]) == (5, 1, 0)
    assert main(["predict", model, source, str(out)]) == 1
    assert b"--overwrite" in capfdbinary.readouterr().err
    assert main(["predict", model, source, "-", "--top-k", "2"]) == 0
    printed = capfdbinary.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["label"][0] for row in rows] == LABELS
    assert b'rejected {"row": 5, "line": 6, "reason": ' in printed.err
    assert main(["predict", model, source, "-", "--json"]) == 1


def start(model: Path, source: str, target: Path) -> subprocess.Popen[str]:
    """A slow prediction in another process, after its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow_pt_deploy.cli", "predict", str(model), source, str(target)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    state, until = Path(f"{target}.part", "state.json"), time.monotonic() + WAIT_S
    while time.monotonic() < until and process.poll() is None:
        if state.exists() and json.loads(state.read_text())["done"]["rows"]:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.parametrize(
    ("number", "suffix"), [(signal.SIGTERM, ".csv"), (signal.SIGKILL, ".parquet")]
)
def test_a_killed_prediction_continues(
    tmp_path: Path, number: signal.Signals, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model", predict_s=0.05)
    texts = [f"{LABELS[at % 4]} {'green ' * (at % 3)}{at}" for at in range(8_000)]
    source, out = write_csv(tmp_path / "in.csv", [*texts, ""]), tmp_path / f"out{suffix}"
    process = start(model, source, out)
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    assert not out.exists() and ("terminated" in errors) == (number == signal.SIGTERM)
    (model / "habits.json").write_text("{}")  # fast from now on
    done = predict(str(model), source, out)
    assert 0 < done.continued < 8_000 and (done.rows, done.rejected) == (8_001, 1)
    assert f"continues after {done.continued:,} rows" in capsys.readouterr().err
    predict(str(model), source, tmp_path / f"whole{suffix}")
    if suffix == ".parquet":
        assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole.parquet"))
    else:
        assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not Path(f"{out}.part").exists()


def test_another_prediction_is_not_continued(model: str, tmp_path: Path) -> None:
    records = [*[{"text": "red"}] * 256, 5]
    source, out = write_lines(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl"

    def stop(**options: Any) -> None:
        with pytest.raises(DataError, match="leave out --strict"):
            predict(model, source, out, strict=True, **options)

    stop()
    with pytest.raises(DataError, match="begun with other options. Delete it, or .* --restart"):
        predict(model, source, out, top_k=2)
    os.utime(source, (1, 1))
    with pytest.raises(DataError, match="begun with another input"):
        predict(model, source, out)
    other = str(save_tiny(tmp_path / "other"))
    (tmp_path / "other" / "variant" / "manifest.json").write_text("{ }")
    with pytest.raises(DataError, match="begun with another input and another model"):
        predict(other, source, out)
    assert predict(model, source, out, restart=True).rows == 257
    stop(overwrite=True)
    assert read_lines(out)[0]["label"] == "red"  # the earlier output is still there


@pytest.mark.slow
def test_torch_and_pyarrow_are_not_needed(tmp_path: Path, tiny_model: Path) -> None:
    models = [str(SAVED)]
    classifier = load_classifier(str(tiny_model))
    rows = ["a card", "a refund please for my card"]
    example = classifier.preprocessor(rows)
    for variant in (OnnxRuntime("fp32"), OpenVino("fp32")):
        folder, model = tmp_path / f"{variant.runtime}-variant", tmp_path / variant.runtime
        write_variant(
            variant, classifier, folder, model="teacher", example=example, golden_rows=rows
        )
        flavor.save_model(folder, model)
        models.append(str(model))
    source = write_csv(tmp_path / "in.csv", ["my card is lost"])
    calls = [["predict", model, source, f"{tmp_path}/{at}.csv"] for at, model in enumerate(models)]
    code = (
        "import sys\n"
        "from mlflow_pt_deploy.cli import main\n"
        f"for words in {calls}: assert main(words) == 0\n"
        "assert not {'torch', 'transformers', 'pyarrow.parquet', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    for *_, out in calls:
        assert read_rows(Path(out))[0]["label"] == "card"

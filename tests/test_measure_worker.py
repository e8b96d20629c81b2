"""Real worker processes around a tiny real variant: ONNX Runtime, a word votes for a colour."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mlflow_pt_deploy.data.splits import Split, Splits
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.measure import Bench, Result, Worker, measure
from mlflow_pt_deploy.measure.timing import draw_rows, interleave, throughput, warm
from mlflow_pt_deploy.preprocess import TextPreprocessor
from mlflow_pt_deploy.variants import write_variant
from mlflow_pt_deploy.variants.onnxruntime import FILE, OnnxRuntime

LABELS = ("blue", "green", "red")
VOCABULARY = {"[PAD]": 0, "sea": 1, "leaf": 2, "blood": 3, "thing": 4}
ROWS = ("sea sea leaf", "leaf", "blood thing thing blood sea", "thing sea")
ANSWERS = [0, 1, 2, 0]  # the colour with most votes; "thing" votes for none


@dataclass(frozen=True)
class Votes(OnnxRuntime):
    """Logits are the votes of a row's words; `stubborn` always answers green."""

    def export(self, module, example, calibration, folder):
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        weights = [
            numpy_helper.from_array(module.votes, "votes"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "length"),
        ]
        nodes = [
            helper.make_node("Gather", ["votes", "input_ids"], ["each"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
            helper.make_node("Mul", ["each", "wide"], ["real"]),
            helper.make_node("ReduceSum", ["real", "length"], ["logits"], keepdims=0),
        ]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ]
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
        graph = helper.make_graph(nodes, "votes", inputs, [output], weights)
        opset = helper.make_opsetid("", 18)
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), folder / FILE)


class Ballot(SimpleNamespace):
    """The model of `Votes`."""

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (torch.from_numpy(self.votes)[ids] * mask[..., None]).sum(1)


def export(folder: Path, *, stubborn: bool = False) -> Path:
    votes = np.zeros((5, 3), dtype=np.float32)
    votes[[1, 2, 3], [0, 1, 2]] = 1
    if stubborn:
        votes[:, 1] = 10
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="thing"))
    tokenizer.pre_tokenizer = Whitespace()
    preprocessor = TextPreprocessor(tokenizer, max_length=16, pad_id=0)
    module = Ballot(preprocessor=preprocessor, labels=LABELS, votes=votes)
    write_variant(
        Votes(),
        module,
        folder,
        model=folder.name.partition("-")[0],
        example={},
        golden_rows=["sea leaf"],
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("variants") / "teacher-onnxruntime-fp32")


@pytest.fixture(scope="module")
def worker(folder: Path):
    with Worker(folder, ROWS[0], threads=1) as worker:
        worker.load_rows(ROWS)
        yield worker


def start_and_ask(folder: Path, timeout_s: float = 60.0) -> Worker:
    worker = Worker(folder, ROWS[0], threads=1, timeout_s=timeout_s)
    worker.load_rows(ROWS)
    return worker


def test_a_worker_knows_its_variant_and_how_long_it_took_to_start(worker: Worker) -> None:
    assert (worker.model, worker.runtime, worker.precision) == ("teacher", "onnxruntime", "fp32")
    assert 0.05 < worker.load_s < 30


def test_answers_come_in_the_order_of_the_rows_although_batches_are_sorted(worker: Worker) -> None:
    assert worker.predict(0, 4).labels.tolist() == ANSWERS
    assert worker.predict(1, 3).labels.tolist() == ANSWERS[1:3]


def test_every_row_of_every_pass_is_timed(worker: Worker) -> None:
    elapsed = worker.time([0, 2, 3], passes=4)
    assert len(elapsed) == 12
    assert min(elapsed) > 0


def test_memory_is_that_of_the_worker_and_not_of_its_parent(folder: Path) -> None:
    ballast = np.ones(40_000_000)  # 320 MB in this process, which the worker must not inherit
    with start_and_ask(folder) as worker:
        assert 20e6 < worker.memory() < 160e6
    assert ballast.nbytes == 320e6


def test_a_worker_imports_neither_torch_nor_transformers(worker: Worker) -> None:
    maps = Path(f"/proc/{worker.pid}/maps")
    if not maps.exists():
        pytest.skip("needs Linux's /proc")
    assert "onnxruntime" in maps.read_text()
    assert "libtorch" not in maps.read_text()


def test_threads_are_set_for_every_runtime_before_the_start(worker: Worker) -> None:
    environ = Path(f"/proc/{worker.pid}/environ")
    if not environ.exists():
        pytest.skip("needs Linux's /proc")
    assert {b"OMP_NUM_THREADS=1", b"RAYON_NUM_THREADS=1"} <= set(environ.read_bytes().split(b"\0"))


def test_an_error_in_the_variant_is_told_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(VariantError, match="teacher-onnxruntime-fp32: IndexError: list index"):
        worker.time([99])
    assert worker.predict(0, 1).labels.tolist() == [0]


def test_a_variant_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="nothing-here-fp32 is not a variant"):
        Worker(tmp_path / "nothing-here-fp32", ROWS[0])


def test_a_killed_worker_is_explained_and_reaped(folder: Path) -> None:
    with start_and_ask(folder) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(VariantError, match=r"killed \(SIGKILL\), most likely because memory"):
            worker.predict(0, 4)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_crash_names_its_signal(folder: Path) -> None:
    with start_and_ask(folder) as worker:
        os.kill(worker.pid, signal.SIGSEGV)
        with pytest.raises(VariantError, match="crashed with SIGSEGV, at 'predict'"):
            worker.predict(0, 4)


def test_a_worker_that_hangs_is_ended_in_time(folder: Path) -> None:
    with start_and_ask(folder, timeout_s=5.0) as worker:
        worker._timeout_s = 0.2
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(VariantError, match=r"no answer to 'predict' within 0\.2 s"):
            worker.predict(0, 4)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_no_message_repeats_a_row(worker: Worker) -> None:
    long = f"cannot take {ROWS[2]!r} here\nsecond line"
    assert worker._lines_without_rows(long) == [
        "(left out: repeats a row of the data)",
        "second line",
    ]
    assert worker._lines_without_rows("bad token 'leaf'")[0].startswith("(left out")
    assert worker._lines_without_rows("no leaf quoted") == ["no leaf quoted"]


def test_rounds_time_the_same_rows_on_both_sides(folder: Path, worker: Worker) -> None:
    with start_and_ask(folder) as other:
        warm(worker, [0, 1, 2, 3])
        rounds = interleave(other, worker, [0, 1, 2, 3], seconds=0.3)
    assert len(rounds.ratios) >= 7
    assert len(rounds.samples_ms) % (4 * len(rounds.ratios)) == 0
    assert 0.3 < float(np.median(rounds.ratios)) < 3  # the same variant on both sides


def test_throughput_is_tried_at_each_batch_size(worker: Worker) -> None:
    rates = throughput(worker, [0, 1, 2, 3] * 40, row_s=0.3e-3, seconds=0.1)
    assert sorted(rates) == [8, 32, 128]
    assert all(rate > 100 for found in rates.values() for rate in found)
    # One pass of 128 rows would take longer than the whole budget.
    assert sorted(throughput(worker, [0, 1, 2, 3] * 40, row_s=1e-3, seconds=0.1)) == [8, 32]


def test_rows_are_drawn_once_each_and_always_the_same() -> None:
    assert sorted(draw_rows(10, among=4)) == [0, 1, 2, 3]
    assert draw_rows(5, among=100) == draw_rows(5, among=100)
    assert len(set(draw_rows(5, among=100))) == 5


@pytest.fixture(scope="module")
def splits() -> Splits:
    validation = Split(ROWS * 5, np.array(ANSWERS * 5))  # the teacher is right everywhere
    test = Split(ROWS, np.array([0, 1, 1, 1]))  # the teacher on two of four, the student on two
    return Splits("colours", "here", LABELS, validation, validation, test)


@pytest.fixture(scope="module")
def results(folder: Path, splits: Splits) -> list[Result]:
    student = export(folder.parent / "student-onnxruntime-fp32", stubborn=True)
    broken = folder.parent / "student-onnxruntime-broken"
    shutil.copytree(student, broken)
    (broken / FILE).write_bytes(b"not a graph")
    folders = {path.name: path for path in (student, broken, folder)}
    return measure(folders, baseline=folder.name, splits=splits, seconds=0.4, threads=1)


def test_one_broken_variant_does_not_stop_the_others(results: list[Result]) -> None:
    student, broken, teacher = results
    assert [each.reason for each in (student, teacher)] == ["", ""]
    assert "model.onnx is not the file that was exported" in broken.reason
    assert (broken.model, broken.runtime, broken.measurements) == ("student", "onnxruntime", ())


def test_quality_is_measured_against_targets_and_against_the_baseline(
    results: list[Result],
) -> None:
    student, _, teacher = results
    assert teacher.value("accuracy", "validation") == 1
    assert teacher.value("accuracy", "test") == 0.5
    assert student.value("accuracy", "validation") == 0.25  # one of ROWS is green
    assert student.value("accuracy", "test") == 0.75
    assert student.value("agreement", "test") == 0.25
    assert student.value("accuracy_drop", "test") == -0.25
    assert student.get("accuracy", "test").samples == (0, 1, 1, 1)


def test_the_baseline_is_about_as_fast_as_itself(results: list[Result]) -> None:
    speedup = results[2].get("speedup")
    assert 0.3 < speedup.value < 3
    assert speedup.low <= speedup.value <= speedup.high


def test_every_metric_is_there_under_its_name(results: list[Result]) -> None:
    assert sorted(results[0].metrics()) == [
        "artifact_mb",
        "best_batch_rows",
        "latency_mean_ms",
        "latency_p50_ms",
        "latency_p95_ms",
        "latency_p99_ms",
        "load_s",
        "peak_rss_mb",
        "speedup",
        "speedup_high",
        "speedup_low",
        "throughput_rows_per_s",
    ]
    assert sorted(results[0].metrics("test")) == [
        "accuracy",
        "accuracy_drop",
        "accuracy_drop_high",
        "accuracy_drop_low",
        "agreement",
        "confidence",
        "macro_f1",
    ]


def test_results_survive_json(results: list[Result]) -> None:
    assert [Result.from_json(json.loads(json.dumps(r.to_json()))) for r in results] == results


def test_without_its_baseline_nothing_is_measured(folder: Path, splits: Splits) -> None:
    with pytest.raises(VariantError, match="baseline teacher-eager-fp32 is not among"):
        measure({folder.name: folder}, baseline="teacher-eager-fp32", splits=splits)


def test_a_baseline_that_cannot_be_loaded_is_an_error(tmp_path: Path, splits: Splits) -> None:
    gone = tmp_path / "teacher-eager-fp32"
    with pytest.raises(VariantError, match="is not a variant"):
        measure({gone.name: gone}, baseline=gone.name, splits=splits)


def test_a_baseline_that_was_killed_is_started_again(folder: Path, splits: Splits) -> None:
    with Bench(folder, splits, seconds=0.2, threads=1) as bench:
        first = bench.worker.pid
        os.kill(first, signal.SIGKILL)
        (result,) = bench.measure({folder.name: folder})
        assert bench.worker.pid != first
    assert not result.reason
    assert result.value("speedup")

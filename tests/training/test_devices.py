"""Training by device: what the CPU does, fp16 with scaled gradients, memory that is full, GPUs.

fp16 and a full memory are tried on the CPU, too: autocast and the scaler are the same there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import TrainingError, UnsupportedError
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.system.progress import progress
from mlflow_pt_deploy.system.ranks import Ranks
from mlflow_pt_deploy.training import optimization, training_state
from mlflow_pt_deploy.training.distillation import (
    add_similarity_loss,
    distillation_loss,
    label_with_teacher,
)
from mlflow_pt_deploy.training.inference import predict_logits
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.process_group import ALONE, joined
from mlflow_pt_deploy.training.qat import int8_rounding
from mlflow_pt_deploy.training.trainer import cross_entropy, fit
from mlflow_pt_deploy.training.training_state import Epoch, TrainingState

SHORT = Schedule(epochs=2, learning_rate=3e-3, batch_size=30)  # 3 steps an epoch
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


@pytest.fixture
def in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "compute_dtype", lambda device: torch.float16)


@contextmanager
def device_of(model: torch.nn.Module, rows: int, calls: int = 0) -> Iterator[None]:
    """A device that has no memory for more rows than these, after some calls."""
    left = iter(range(calls))

    def allocate(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if next(left, None) is None and len(inputs[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = model.register_forward_pre_hook(allocate)
    try:
        yield
    finally:
        hook.remove()


def weights(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().clone() for name, tensor in classifier.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def losses(epochs: list[Epoch]) -> list[float]:
    return [epoch.train_loss for epoch in epochs]


def test_on_the_cpu_a_step_is_the_plain_one(
    tiny_model: Path, tiny_splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "cpu_flags", frozenset)
    schedule = Schedule(epochs=1, learning_rate=3e-3, batch_size=30, warmup=0.4)
    trained = load_classifier(str(tiny_model))
    entropy, batches = cross_entropy(tiny_splits.train.targets), []

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: tuple[torch.Tensor, ...] = ()):
        batches.append((rows, inputs))
        return entropy(logits, rows, inputs)

    (epoch,) = fit(trained, tiny_splits, loss, schedule)
    plain = load_classifier(str(tiny_model)).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    rates = iter([3e-3, 3e-3, 3e-3 / 2])
    torch.manual_seed(0)
    found = []
    for rows, inputs in batches:
        optimizer.param_groups[0]["lr"] = next(rates)
        targets = torch.from_numpy(tiny_splits.train.targets)[rows]
        value = torch.nn.functional.cross_entropy(plain(*inputs), targets)
        value.backward()
        optimization.clip_gradients(plain, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.item())
    assert epoch.train_loss == np.mean(found)
    assert_same(weights(trained), weights(plain))


def test_precision_by_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimization, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    assert optimization.compute_dtype("cpu") == torch.bfloat16
    monkeypatch.setattr(optimization, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert optimization.compute_dtype("cpu") == torch.float32
    for dtype, enabled in ((torch.float32, False), (torch.bfloat16, False), (torch.float16, True)):
        assert optimization.new_grad_scaler("cpu", dtype).is_enabled() == enabled


class Stopped(Exception):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("device", DEVICES)
def test_training_in_fp16_resumes_as_if_uninterrupted(
    tiny_model: Path, tiny_splits: Splits, tmp_path: Path, in_fp16: None, device: str
) -> None:
    loss = cross_entropy((tiny_splits.train.targets + 1) % 3)
    straight = load_classifier(str(tiny_model))
    expected = fit(straight, tiny_splits, loss, SHORT, device=device)
    assert losses(expected)[1] < losses(expected)[0]
    assert {tensor.dtype for tensor in straight.parameters()} == {torch.float32}

    checkpoint = tmp_path / "checkpoint.pt"

    def stop(epoch: Epoch) -> None:
        raise Stopped

    stopped = load_classifier(str(tiny_model))
    with pytest.raises(Stopped):
        fit(
            stopped,
            tiny_splits,
            loss,
            SHORT,
            device=device,
            checkpoint=checkpoint,
            on_epoch=stop,
        )
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["scaler"]["scale"] <= 2**16
    assert (saved["device_random"] is None) == (device == "cpu")
    resumed = load_classifier(str(tiny_model))
    torch.manual_seed(12345)  # as in a new process
    found = fit(resumed, tiny_splits, loss, SHORT, device=device, checkpoint=checkpoint)
    if device == "cpu":
        assert losses(found) == losses(expected)
        assert_same(weights(resumed), weights(straight))
    else:  # sums of a GPU come in any order
        assert losses(found) == pytest.approx(losses(expected), rel=0.05)


def test_a_step_that_overflows_changes_no_weight(
    classifier: Classifier, tiny_splits: Splits, in_fp16: None
) -> None:
    before = weights(classifier)
    state = TrainingState(classifier, tiny_splits.train, SHORT, "cpu", ALONE)
    entropy = cross_entropy(tiny_splits.train.targets)

    def steep(logits: torch.Tensor, rows: torch.Tensor, inputs: tuple[torch.Tensor, ...] = ()):
        logits.register_hook(lambda gradient: gradient * 1e30)
        return entropy(logits, rows, inputs)

    scale = state.scaler.get_scale()
    with progress("training", 3, "batches", shown=False) as bar:
        state.run_epoch(steep, None, bar)
    assert_same(weights(classifier), before)
    assert state.scaler.get_scale() == scale / 2**3
    assert np.isfinite(state.mean_loss())


def test_checkpoints_of_the_cpu_continue_in_fp16(
    tiny_model: Path, tiny_splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, checkpoint = cross_entropy(tiny_splits.train.targets), tmp_path / "checkpoint.pt"
    state = TrainingState(load_classifier(str(tiny_model)), tiny_splits.train, SHORT, "cpu", ALONE)
    state.save(checkpoint)
    monkeypatch.setattr(training_state, "compute_dtype", lambda device: torch.float16)
    other = load_classifier(str(tiny_model))
    assert len(fit(other, tiny_splits, loss, SHORT, checkpoint=checkpoint)) == 2
    state.save(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)
    for key in ("scaler", "device_random"):  # checkpoints of earlier versions have none
        del saved[key]
    torch.save(saved, checkpoint)
    assert len(fit(other, tiny_splits, loss, SHORT, checkpoint=checkpoint)) == 2


def test_a_full_memory_halves_the_batches_of_a_prediction(
    classifier: Classifier, tiny_splits: Splits, tmp_path: Path
) -> None:
    rows = tiny_splits.train.rows
    expected = predict_logits(classifier, rows)
    labels = label_with_teacher(classifier, tiny_splits.train, tmp_path / "whole")
    with device_of(classifier, rows=7):
        np.testing.assert_allclose(predict_logits(classifier, rows), expected, atol=1e-5)
        again = label_with_teacher(classifier, tiny_splits.train, tmp_path / "halved")
    np.testing.assert_allclose(again.logits, labels.logits, atol=1e-5)
    np.testing.assert_allclose(again.features, labels.features, atol=1e-2)
    with (
        device_of(classifier, rows=0),
        pytest.raises(TrainingError, match="no memory for the model and one row. Free its memory"),
    ):
        predict_logits(classifier, rows)


def test_other_errors_of_a_prediction_stay(classifier: Classifier) -> None:
    def fail(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    classifier.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        predict_logits(classifier, ["a", "b"])


def test_a_full_memory_in_training_names_the_cure_and_resumes(
    tiny_model: Path, tiny_splits: Splits, tmp_path: Path
) -> None:
    loss, checkpoint = cross_entropy(tiny_splits.train.targets), tmp_path / "checkpoint.pt"
    straight = load_classifier(str(tiny_model))
    expected = fit(straight, tiny_splits, loss, SHORT)
    stopped = load_classifier(str(tiny_model))
    message = (
        "cpu has no memory for a training step with --batch-size 30. Give a smaller --batch-size "
        "and start again; or free its memory, or give more --processes, .* --resume."
    )
    calls = 3 + 1 + 1  # an epoch, its evaluation, and a step of the next
    with device_of(stopped, rows=15, calls=calls), pytest.raises(TrainingError, match=message):
        fit(stopped, tiny_splits, loss, SHORT, checkpoint=checkpoint)
    resumed = load_classifier(str(tiny_model))
    torch.manual_seed(12345)
    found = fit(resumed, tiny_splits, loss, SHORT, checkpoint=checkpoint)
    assert losses(found) == losses(expected)
    assert_same(weights(resumed), weights(straight))


def test_processes_without_a_gpu_each_are_refused() -> None:
    count = torch.cuda.device_count() + 1
    with (
        pytest.raises(UnsupportedError, match=f"processes is {count}, and PyTorch sees"),
        joined(Ranks(0, count, 0, count), "cuda"),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["teacher", "static"])
def test_training_on_a_gpu(
    tiny_models: dict[str, tuple[Path, Splits]], tiny_splits: Splits, model: str
) -> None:
    folder = str(tiny_models[model][0])
    seen = set()
    entropy = cross_entropy((tiny_splits.train.targets + 1) % 3)

    def loss(logits: torch.Tensor, rows: torch.Tensor, inputs: tuple[torch.Tensor, ...] = ()):
        seen.add((inputs[0].device.type, torch.get_autocast_dtype("cuda")))
        return entropy(logits, rows, inputs)

    first, second = (
        fit(load_classifier(folder), tiny_splits, loss, SHORT, device=device)
        for device in ("cuda", "cuda:0")
    )
    assert seen == {("cuda", optimization.compute_dtype("cuda"))}
    assert losses(second) == pytest.approx(losses(first), rel=0.05)
    assert losses(first)[1] < losses(first)[0]
    classifier = load_classifier(folder)
    expected = predict_logits(classifier, tiny_splits.test.rows)
    found = predict_logits(classifier, tiny_splits.test.rows, device="cuda")
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.gpu
def test_distillation_on_a_gpu(classifier: Classifier, tiny_splits: Splits, tmp_path: Path) -> None:
    train = tiny_splits.train
    expected = label_with_teacher(classifier, train, tmp_path / "cpu")
    labels = label_with_teacher(classifier, train, tmp_path / "cuda", device="cuda")
    np.testing.assert_allclose(labels.logits, expected.logits, atol=1e-3)
    assert next(classifier.parameters()).device.type == "cpu"
    loss = distillation_loss(labels.logits, labels.split.targets)
    loss = add_similarity_loss(loss, classifier, labels.features, 0.5)
    with int8_rounding(classifier.network):
        epochs = fit(classifier, tiny_splits, loss, SHORT, device="cuda")
    assert np.isfinite(losses(epochs)).all()

"""Fields of a policy, and the policy file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.selection.policy import Policy, read_policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"retain": 99}, r"retain is 99; give the fraction .* from 0 to 1"),
        ({"retain": float("nan")}, "retain is nan"),
        ({"retain": True}, "retain is True"),
        ({"retain_low": 2}, "retain_low is 2; give the fraction"),
        ({"retain": 0.9, "retain_low": 0.95}, r"retain_low is 0.95, above retain \(0.9\)"),
        ({"max_latency_p95_ms": 0}, "max_latency_p95_ms is 0; give a number above 0"),
        ({"max_artifact_mb": -1}, "max_artifact_mb is -1"),
        ({"max_peak_rss_mb": "64"}, "max_peak_rss_mb is '64'"),
        ({"min_class_recall": 50}, "min_class_recall is 50; give a fraction of at most 1"),
        ({"objective": "fun"}, "objective is 'fun'; choose from 'latency', 'throughput', 'size'"),
        ({"objective": "cost"}, "cost and price_per_core_hour belong together"),
        ({"price_per_core_hour": 1.0}, "cost and price_per_core_hour belong together"),
        ({"devices": ("gpu",)}, "devices: gpu is unknown; choose from cpu, cuda"),
        ({"price_per_gpu_hour": 1.0}, "price_per_gpu_hour is for the objective cost"),
        ({"max_peak_device_mb": 0}, "max_peak_device_mb is 0; give a number above 0"),
        ({"runtimes": ("onnx",)}, r"runtimes: onnx is unknown; did you mean onnxruntime\?"),
    ],
)
def test_invalid_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy(**fields)


def test_retain_low_follows_retain() -> None:
    assert Policy().retain_low == 0.97
    assert Policy(retain=0.9).retain_low == 0.88
    assert Policy(retain=0).retain_low == 0


def test_a_file_has_metrics_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "objective: cost\nprice_per_core_hour: 0.05\nretain: 0.98\nlatency_p95_ms: {max: 20}\n"
        "class_recall: {min: 0.5}\nruntimes: [onnxruntime, numpy]\n"
    )
    policy = read_policy(path)
    assert policy == Policy(
        objective="cost",
        price_per_core_hour=0.05,
        retain=0.98,
        max_latency_p95_ms=20,
        min_class_recall=0.5,
        runtimes=("onnxruntime", "numpy"),
    )
    assert policy.digest != Policy().digest
    assert len(policy.digest) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retian: 0.9", r"retian is unknown; did you mean retain\?"),
        ("latency_p59_ms: {max: 1}", r"latency_p59_ms is unknown; did you mean latency_p95_ms\?"),
        ("quality: 1", "quality is unknown; known are agreement_perturbed, artifact_mb"),
        ("latency_p95_ms: 20", r"latency_p95_ms takes a max, e.g. 'latency_p95_ms: {max: 1}'"),
        ("latency_p95_ms: {min: 20}", "latency_p95_ms takes a max"),
        ("class_recall: {min: much}", "min_class_recall is 'much'; give a number"),
        ("runtimes: numpy", r"runtimes must be a list of names"),
        ("- retain", "is not a mapping of metrics to limits"),
        ("retain: [", "cannot be read"),
        ("", "is not a mapping"),
        ("1: 2", "is not a mapping"),
    ],
)
def test_errors_in_a_file_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        read_policy(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none.yaml cannot be read: No such file"):
        read_policy(tmp_path / "none.yaml")
    (tmp_path / "long.yaml").write_text("# " + "x" * 70_000)
    with pytest.raises(PolicyError, match=r"larger than 65536 bytes"):
        read_policy(tmp_path / "long.yaml")


def test_the_digest_of_a_policy_without_devices_is_as_before() -> None:
    assert "devices" not in Policy().to_json()
    assert Policy(devices=("cpu",)).digest != Policy().digest


def test_devices_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "objective: cost\nprice_per_core_hour: 0.05\nprice_per_gpu_hour: 2\n"
        "devices: [cpu, cuda]\npeak_device_mb: {max: 4000}\n"
    )
    policy = read_policy(path)
    assert (policy.devices, policy.price_per_gpu_hour) == (("cpu", "cuda"), 2)
    assert policy.max_peak_device_mb == 4000
    path.write_text("devices: cpu")
    with pytest.raises(PolicyError, match=r"devices must be a list of names, e.g. \[cpu\]"):
        read_policy(path)


def test_the_price_of_a_gpu_is_needed_only_where_one_may_be_chosen() -> None:
    cost = {"objective": "cost", "price_per_core_hour": 0.05}
    with pytest.raises(PolicyError, match="objective cost needs price_per_gpu_hour"):
        Policy(**cost).check_gpu_price()
    Policy(**cost, price_per_gpu_hour=2.0).check_gpu_price()
    Policy(**cost, devices=("cpu",)).check_gpu_price()
    Policy().check_gpu_price()

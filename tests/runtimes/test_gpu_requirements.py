"""What variants need of a GPU, decided from what a machine has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlflow_pt_deploy.artifacts import Manifest
from mlflow_pt_deploy.errors import UnsupportedError
from mlflow_pt_deploy.registry.environment import (
    RUNTIME_LIBRARIES,
    get_default_pip_requirements,
)
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.catalog import GPU_VARIANTS, ON_REQUEST, RUNTIMES, VARIANTS, select
from mlflow_pt_deploy.runtimes.gpu_requirements import (
    NO_DEVICE,
    check_capability,
    chip_too_old,
)
from mlflow_pt_deploy.runtimes.numpy_static import NumPy
from mlflow_pt_deploy.system.device import has_cuda

FOR_A_GPU = [variant for variant in (*GPU_VARIANTS, *ON_REQUEST) if variant.device == "cuda"]


def short(variant: Variant) -> str:
    return variant.name("")[1:]


@pytest.mark.parametrize(
    ("precision", "found", "least"),
    [("bf16", (7, 5), "8.0"), ("fp8-dynamic", (8, 6), "8.9"), ("int8-dynamic", (7, 0), "7.5")],
)
def test_chips_that_are_too_old(precision: str, found: tuple[int, int], least: str) -> None:
    has = "{}.{}".format(*found)
    assert chip_too_old(precision, found) == (
        f"skipped: {precision} needs a GPU of compute capability {least}, and this one has {has}"
    )


def test_chips_that_are_new_enough() -> None:
    assert chip_too_old("fp32", (6, 0)) is None
    assert chip_too_old("bf16", (12, 0)) is None
    assert chip_too_old("fp8-dynamic", (8, 9)) is None
    assert chip_too_old("fp16", (7, 0), least=(7, 5)) is not None


def test_a_package_runs_on_the_chip_that_it_was_compiled_for() -> None:
    check_capability("", "9.0")
    check_capability("9.0", "9.0")
    message = "for a GPU of compute capability 9.0, and the device has 8.6. Choose another variant"
    with pytest.raises(UnsupportedError, match=message):
        check_capability("9.0", "8.6")


@pytest.mark.skipif(has_cuda(), reason="this machine has a GPU")
@pytest.mark.parametrize("variant", FOR_A_GPU, ids=short)
def test_without_a_gpu_each_is_a_row_with_a_reason(variant: Variant) -> None:
    assert variant.unsupported() == NO_DEVICE


@pytest.mark.parametrize("variant", [*VARIANTS, NumPy()], ids=short)
def test_runtimes_of_the_cpu_say_so(variant: Variant, tmp_path: Path) -> None:
    if variant.precision in variant.gpu_precisions:
        pytest.skip("it runs on a GPU")
    message = f"{variant.runtime}-{variant.precision} runs on the CPU only; use device=cpu"
    assert replace(variant, device="cuda").unsupported() == f"skipped: {message}"
    if not isinstance(variant, AOTInductor):  # a package says for which device it was compiled
        with pytest.raises(UnsupportedError, match=message):
            variant.load(tmp_path, device="cuda:1", threads=1)


def test_names_of_variants_for_a_gpu() -> None:
    names = {short(variant) for variant in FOR_A_GPU}
    assert len(names) == len(FOR_A_GPU)
    assert all(name.endswith("-cuda") for name in names)
    selected = {short(variant) for variant in select("torchao-fp8-dynamic-cuda", "cuda")}
    assert selected == {"eager-fp32", "torchao-fp8-dynamic-cuda"}
    assert set(GPU_VARIANTS) < set(select("", "cuda"))
    assert not any(variant.device == "cuda" for variant in select(""))


def test_a_model_names_the_libraries_of_each_runtime() -> None:
    assert RUNTIME_LIBRARIES.keys() == RUNTIMES.keys() - {"cascade", "portable"}


def test_the_manifest_of_a_cpu_package_has_no_capability() -> None:
    assert AOTInductor("bf16").for_this_machine() == AOTInductor("bf16")


@pytest.mark.parametrize("capability", ["", "9.0"])
def test_the_manifest_of_a_package_has_the_capability(capability: str) -> None:
    variant = AOTInductor("bf16", capability=capability, device="cuda")
    options = {"device": "cuda", "capability": capability} if capability else {"device": "cuda"}
    name = variant.name("student")
    manifest = Manifest(name, "student", variant.runtime, "bf16", options, (), {}, {})
    assert manifest.variant() == variant
    assert manifest.device == "cuda"
    assert name == "student-aotinductor-bf16-cuda"


def test_a_model_for_a_gpu_names_the_distribution_for_gpus() -> None:
    for runtimes in (("tensorrt",), ("onnxruntime", "tensorrt")):
        pins = get_default_pip_requirements(*runtimes, gpu_runtime="tensorrt")
        names = [pin.partition("==")[0] for pin in pins]
        assert names.count("onnxruntime-gpu") == 1 and "onnxruntime" not in names
    assert "onnxruntime-gpu" not in " ".join(get_default_pip_requirements("onnxruntime"))

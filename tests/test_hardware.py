from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mlflow_pt_deploy.hardware import cpu_flags, hardware, usable_cores


def test_it_describes_this_machine_in_short_strings() -> None:
    facts = hardware()
    assert facts["cores"] == str(usable_cores())
    assert facts["python"] == platform.python_version()
    assert facts["onnxruntime"] == version("onnxruntime")
    assert facts["os"].startswith(platform.system())
    assert facts["cpu"]
    assert all(isinstance(fact, str) and fact for fact in facts.values())


def test_memory_is_no_more_than_the_machine_has() -> None:
    psutil = pytest.importorskip("psutil")
    assert 0 < float(hardware()["memory_gb"]) <= psutil.virtual_memory().total / 1e9 + 0.1


def test_flags_are_those_of_the_processor() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8"):
        assert (flag in cpu_flags()) == (f" {flag} " in text.replace("\n", " "))
        assert (flag in hardware().get("cpu_flags", "").split()) == (flag in cpu_flags())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's affinity")
def test_cores_are_those_that_this_process_may_use() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import sys; "
        "from mlflow_pt_deploy.hardware import hardware; "
        "print(hardware()['cores'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]

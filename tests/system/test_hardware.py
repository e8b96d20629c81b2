"""Hardware facts: cores, quotas, CPU flags, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mlflow_pt_deploy.system.hardware import _quotas, cpu_flags, hardware, usable_cores


def test_facts_are_short_strings() -> None:
    facts = hardware()
    assert facts["cores"] == str(usable_cores())
    assert facts["python"] == platform.python_version()
    assert facts["onnxruntime"] == version("onnxruntime")
    assert facts["os"].startswith(platform.system())
    assert facts["cpu"]
    assert all(isinstance(fact, str) and fact for fact in facts.values())


def test_memory_is_at_most_that_of_the_machine() -> None:
    psutil = pytest.importorskip("psutil")
    assert 0 < float(hardware()["memory_gb"]) <= psutil.virtual_memory().total / 1e9 + 0.1


def test_cpu_flags_match_proc_cpuinfo() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8"):
        assert (flag in cpu_flags()) == (f" {flag} " in text.replace("\n", " "))
        assert (flag in hardware().get("cpu_flags", "").split()) == (flag in cpu_flags())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_cores_follow_the_affinity_of_the_process() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import sys; "
        "from mlflow_pt_deploy.system.hardware import hardware; "
        "print(hardware()['cores'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


def _cgroups(root: Path, files: dict[str, str]) -> Path:
    """Write a fake root; `files` are paths below ``/sys/fs/cgroup``, or start with ``proc/``."""
    for name, text in files.items():
        path = root / name if name.startswith("proc/") else root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf8")
    return root


OWN = "proc/self/cgroup"
V1 = "12:cpuset:/\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n0::/"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param({"cpu.max": "max 100000"}, None, id="no limit"),
        pytest.param({"cpu.max": "200000 100000"}, 2, id="two cores of a container"),
        pytest.param({"cpu.max": "150000 100000"}, 2, id="one and a half, rounded up"),
        pytest.param({"cpu.max": "20000 50000"}, 1, id="less than one"),
        pytest.param({OWN: "0::/a/b", "a/b/cpu.max": "300000 100000"}, 3, id="systemd unit"),
        pytest.param(
            {OWN: "0::/a/b", "a/b/cpu.max": "400000 100000", "a/cpu.max": "250000 100000"},
            3,
            id="lower limit of the parent",
        ),
        pytest.param(
            {OWN: "0::/a/b", "a/b/cpu.max": "200000 100000", "a/cpu.max": "max 100000"},
            2,
            id="parent without limit",
        ),
        pytest.param(
            {OWN: "0::/a", "other/cpu.max": "100000 100000", "a/b/cpu.max": "100000 100000"},
            None,
            id="limits of other groups",
        ),
        pytest.param({OWN: "0::/docker/ab", "cpu.max": "500000 100000"}, 5, id="path of the host"),
        pytest.param({OWN: "0::/../..", "cpu.max": "max 100000"}, None, id="outside the namespace"),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
            id="v1 in a container",
        ),
        pytest.param(
            {
                OWN: V1,
                "cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "350000",
                "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/docker/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/docker/cpu.cfs_period_us": "100000",
            },
            4,
            id="v1 with own group",
        ),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            None,
            id="v1 without limit",
        ),
        pytest.param({OWN: "0::/a", "unified/a/cpu.max": "100000 100000"}, 1, id="v2 beside v1"),
        pytest.param({OWN: "nonsense", "cpu.max": "nonsense"}, None, id="unparsable"),
        pytest.param({"cpu.max": "0 100000", OWN: "0::/a", "a/cpu.max": "1 0"}, None, id="zeros"),
        pytest.param({}, None, id="no cgroups"),
    ],
)
def test_quota_is_the_minimum_of_all_parent_cgroups(
    tmp_path: Path, files: dict[str, str], cores: int | None
) -> None:
    assert min(_quotas(_cgroups(tmp_path, files)), default=None) == cores


def test_a_quota_only_reduces_the_cores(tmp_path: Path) -> None:
    one = _cgroups(tmp_path / "one", {"cpu.max": "100000 100000"})
    assert usable_cores(one) == 1
    affinity = usable_cores(tmp_path / "nothing there")
    many = _cgroups(tmp_path / "many", {"cpu.max": f"{100000 * (affinity + 1)} 100000"})
    assert usable_cores(many) == affinity
    if hasattr(os, "sched_getaffinity"):
        assert affinity == len(os.sched_getaffinity(0))


def test_an_unreadable_quota_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup/cpu.max").mkdir(
        parents=True
    )  # reading it is an OSError, also to root
    assert list(_quotas(tmp_path)) == []

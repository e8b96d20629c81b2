"""What nvidia-smi says, in its CSV; and what a machine without it says."""

from __future__ import annotations

import pytest

from mlflow_pt_deploy.evaluation.gpu_state import (
    GpuState,
    gpu_processes,
    gpu_state,
    gpu_warnings,
    parse_processes,
    parse_state,
    state_commands,
)

BUSY = "NVIDIA H100 80GB HBM3, 570.86.15, 81559, 1695, 1980, 2619, 688.41, 700.00, 71\n"
OLD_CARD = "NVIDIA GeForce RTX 3080, 460.39, 10240, [N/A], [N/A], [Unknown Error], [N/A], N/A, 54\n"


def test_a_busy_gpu() -> None:
    state = parse_state([BUSY, "0x0000000000000004\n", ""])
    assert state.describe() == "1695 of 1980 MHz, 2619 MHz memory, 688 of 700 W, 71 °C"
    assert state.throttled == ("power limit",)
    assert state.tags() == {
        "hardware.gpu": "NVIDIA H100 80GB HBM3",
        "hardware.gpu_driver": "570.86.15",
        "hardware.gpu_memory_mib": "81559",
        "hardware.gpu_max_sm_mhz": "1980",
        "hardware.gpu_power_limit_w": "700",
    }


def test_what_the_card_does_not_tell_is_left_out() -> None:
    state = parse_state([OLD_CARD, "", "[N/A]\n"])
    assert state.describe() == "54 °C"
    assert state.throttled == ()
    assert sorted(state.tags()) == [
        "hardware.gpu",
        "hardware.gpu_driver",
        "hardware.gpu_memory_mib",
    ]


@pytest.mark.parametrize(
    "output",
    [
        "",
        "\n",
        "No devices were found\n",
        'Field "clocks.sm" is not a valid field to query.\n',
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
    ],
)
def test_other_outputs_say_nothing(output: str) -> None:
    assert parse_state([output, output, output]) == GpuState()
    assert parse_processes(output) == {}
    assert GpuState().describe() == "" and GpuState().tags() == {}


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        ("0x0000000000000000", ()),
        ("0x0000000000000001", ()),  # idle
        ("0x0000000000000060", ("temperature", "temperature, by hardware")),
        ("Active", ()),
    ],
)
def test_reasons_of_a_reduced_clock(mask: str, reasons: tuple[str, ...]) -> None:
    assert parse_state([BUSY, "", mask]).throttled == reasons


def test_processes_and_their_memory() -> None:
    found = parse_processes("4711, 1024\n4712, [N/A]\n")
    assert found == {4711: 2**30, 4712: None}


@pytest.mark.parametrize(
    ("processes", "throttled", "expected"),
    [
        ({1: 5.0, 2: None}, (), []),
        ({1: 5.0, 2: None, 9: 1.0}, (), ["shared its GPU with another process"]),
        ({1: 5.0, 8: None, 9: 1.0}, (), ["shared its GPU with 2 other processes"]),
        ({8: 5.0, 9: 1.0}, (), []),  # ids of the host, seen from a container
        ({}, ("temperature",), ["ran on a GPU with a reduced clock (temperature)"]),
    ],
)
def test_what_makes_timings_doubtful(
    processes: dict[int, float | None], throttled: tuple[str, ...], expected: list[str]
) -> None:
    assert gpu_warnings(GpuState(throttled=throttled), processes, own={1, 2}) == expected


def test_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_state("GPU-0") == GpuState() == gpu_state("")
    assert gpu_processes("GPU-0") == {} == gpu_processes("")
    assert all(command[:3] == ["nvidia-smi", "-i", "GPU-0"] for command in state_commands("GPU-0"))

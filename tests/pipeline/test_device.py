"""The device of a stage on this machine."""

from __future__ import annotations

import pytest
import torch

from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.errors import ModelError, UnsupportedError
from mlflow_pt_deploy.pipeline.device import on_this_machine


def test_auto_is_the_gpu_if_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert on_this_machine(Options()).device == expected
    assert on_this_machine(Options(processes=2, device="cpu")).processes == 2


def test_a_gpu_that_is_not_there() -> None:
    options = Options(device="cuda:98")  # read anywhere: a run may be of another machine
    assert Options.from_json(options.to_json()) == options
    with pytest.raises(UnsupportedError, match="device=cuda:98: PyTorch cannot use it here"):
        on_this_machine(options)


@pytest.mark.gpu
def test_several_processes_are_not_given_one_gpu() -> None:
    with pytest.raises(ModelError, match="each takes a GPU of its own"):
        on_this_machine(Options(processes=2, device="cuda:0"))

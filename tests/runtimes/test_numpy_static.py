"""The arrays of a static student are loaded in slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlflow_pt_deploy.runtimes import numpy_static


@pytest.mark.parametrize("slice_bytes", [1, 100, 2**20])
def test_slices_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int
) -> None:
    monkeypatch.setattr(numpy_static, "_SLICE_BYTES", slice_bytes)
    draw = np.random.default_rng(1)
    saved = {
        "table": draw.normal(size=(37, 5)).astype(np.float32),
        "bias": draw.normal(size=7).astype(np.float32),
    }
    save_file(saved, tmp_path / "arrays.safetensors")
    loaded = numpy_static._load_arrays(tmp_path / "arrays.safetensors")
    assert loaded.keys() == saved.keys()
    for name, array in saved.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == np.float32 and loaded[name].flags.c_contiguous

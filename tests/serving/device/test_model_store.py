"""A model is loaded once for all its users and freed after the last; the rules of loading hold."""

from __future__ import annotations

import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlflow_pt_deploy.artifacts import read_manifest
from mlflow_pt_deploy.errors import ArtifactError, ServingError
from mlflow_pt_deploy.serving.device.model_store import ModelStore, parse_key

from .conftest import VARIANT, key_of

KEY = key_of(read_manifest(VARIANT).digest)


def test_users_share_one_copy_until_the_last_is_gone() -> None:
    store = ModelStore("cpu")
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda _: store.acquire(KEY, VARIANT), range(4)))
    assert len(set(map(id, models))) == 1
    freed = weakref.ref(models.pop())
    models.clear()
    for _ in range(3):
        store.release(KEY)
        assert freed() is not None
    store.release(KEY)
    assert freed() is None
    assert store.acquire(KEY, VARIANT)


def test_other_options_are_another_copy() -> None:
    store = ModelStore("cpu")
    other = KEY._replace(max_batch_rows=64)
    first, second = store.acquire(KEY, VARIANT), store.acquire(other, VARIANT)
    assert first is not second and second.limits.max_batch_rows == 64


def test_a_folder_with_another_digest_is_not_loaded() -> None:
    with pytest.raises(ArtifactError, match="not the one that the worker has checked"):
        ModelStore("cpu").acquire(key_of("0" * 64), VARIANT)


def test_a_changed_file_is_not_loaded_and_later_users_may_try(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(VARIANT, tmp_path / "variant"))
    (folder / "labels.json").write_text("[]")
    store = ModelStore("cpu")
    with pytest.raises(ArtifactError, match=r"labels\.json is not the file that was exported"):
        store.acquire(KEY, folder)
    assert store.acquire(KEY, VARIANT)


@pytest.mark.parametrize(
    "key", [None, [], ["0", False, 0, 32], ["0", 0, 0, 32, 9], ["0", False, 0, 32.0, 9]]
)
def test_a_header_without_a_key_is_refused(key: Any) -> None:
    with pytest.raises(ServingError, match="names no model"):
        parse_key({"key": key})
    assert parse_key({"key": list(KEY)}) == KEY

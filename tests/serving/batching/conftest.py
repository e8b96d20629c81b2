"""Fixtures of the batching tests."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny.batching import GatedModel


@pytest.fixture
def model() -> GatedModel:
    return GatedModel()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor

"""Profiles: counts of rows as a tag of a version."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.evaluation.profile import (
    MAX_LISTED,
    MAX_TAG,
    Profile,
    RowCounts,
    same_classes,
)


def counted(labels: list[int]) -> RowCounts:
    counts = RowCounts()
    for at, rows in enumerate(labels):
        counts.count_rows([(at, 0.9)] * rows, [[[1, 2, 3]] * rows], unknown_id=3)
    return counts


def test_a_profile_survives_its_tag() -> None:
    profile = Profile.of(counted([3, 0, 2]))
    assert Profile.from_tag(profile.to_tag(), "the tag") == profile
    assert (profile.rows, profile.scores[18], profile.lengths[2]) == (5, 5, 5)
    assert (profile.pieces, profile.unknown) == (15, 5)


def test_served_counts_are_read_too() -> None:
    document = {**counted([3, 0, 2]).to_json(), "since": "2026-11-28", "until": "2026-11-29"}
    assert Profile.from_tag(json.dumps(document), "the tag") == Profile.of(counted([3, 0, 2]))


@pytest.mark.parametrize("classes", [1_000, 100_000])
def test_the_tag_of_many_classes_lists_the_largest(classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, 10**9, classes).tolist()
    counts = RowCounts(sum(labels), labels, [10**12] * 20, [10**12] * 16, 10**15, 10**14)
    text = Profile.of(counts).to_tag()
    assert len(text) <= MAX_TAG
    found = Profile.from_tag(text, "the tag")
    assert (found.rows, found.classes, len(found.labels)) == (sum(labels), classes, MAX_LISTED)
    assert found.rest + sum(found.labels.values()) == found.rows
    assert min(found.labels.values()) >= max(set(labels) - set(found.labels.values()))


def test_classes_that_one_of_them_does_not_list_are_one() -> None:
    some = Profile.from_tag(
        '{"rows": 9, "classes": 4, "labels": {"1": 5, "3": 2}, "rest": 2, "scores": '
        f'{[0] * 20}, "lengths": {[0] * 16}, "pieces": 0, "unknown": 0}}',
        "the tag",
    )
    assert same_classes(some, Profile.of(counted([1, 2, 3, 4]))) == ([5, 2, 2], [2, 4, 4])


GOOD = Profile.of(counted([3, 2])).to_tag()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        "{}",
        "[" * 100_000,
        GOOD[:-5],
        GOOD.replace('"rows":5', '"rows":"5"'),
        GOOD.replace('"rows":5', '"rows":true'),
        GOOD.replace('"rows":5', '"rows":-5'),
        GOOD.replace('"rows":5', '"rows":NaN'),
        GOOD.replace('"1":2', '"2":2'),
        GOOD.replace('"1":2', '"x":2'),
        GOOD.replace('"scores":[0,', '"scores":['),
        GOOD.replace('"scores":[', '"scores":7,"x":['),
    ],
)
def test_a_damaged_tag_is_named(text: str) -> None:
    assert text != GOOD
    with pytest.raises(ModelError, match="the tag is damaged.*Promote the version again"):
        Profile.from_tag(text, "the tag")

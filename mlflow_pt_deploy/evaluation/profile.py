"""What a version answers, as counts: of the rows that decided its promotion, and of served rows.

Numbers only, no rows. Both are counted by `RowCounts.count_rows`, so they can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, Self

from mlflow_pt_deploy.errors import ModelError

SCORE_BUCKETS = 20
"""Buckets of equal width from 0 to 1."""

LENGTH_BUCKETS = 16
"""Bucket i holds rows of 2**(i-1) to 2**i - 1 tokens."""

MAX_LISTED = 200
"""Classes with a count of their own in a tag; those with fewer rows share one."""

MAX_TAG = 5000
"""Longest value of a version's tag in MLflow's older databases, in characters."""


@dataclass(slots=True)
class RowCounts:
    """Counts of answered rows.

    Attributes:
        rows: Rows answered.
        labels: Those by best class.
        scores: Those by score of the best class, see `SCORE_BUCKETS`.
        lengths: Those by tokens, see `LENGTH_BUCKETS`; for images all zero.
        pieces: Tokens of these rows.
        unknown: Those that are the tokenizer's unknown token.
    """

    rows: int = 0
    labels: list[int] = field(default_factory=list)
    scores: list[int] = field(default_factory=lambda: [0] * SCORE_BUCKETS)
    lengths: list[int] = field(default_factory=lambda: [0] * LENGTH_BUCKETS)
    pieces: int = 0
    unknown: int = 0

    def count_rows(
        self,
        best: Iterable[tuple[int, float]],
        encoded: Iterable[Iterable[Any]],
        unknown_id: int | None = None,
    ) -> None:
        """Count answered rows.

        Args:
            best: Best class and its score for each row.
            encoded: The rows of each request as token ids; empty for images.
            unknown_id: The tokenizer's unknown token, if there is one.
        """
        labels, scores, lengths = self.labels, self.scores, self.lengths
        for at, score in best:
            if at >= len(labels):
                labels.extend([0] * (at + 1 - len(labels)))
            labels[at] += 1
            scores[min(int(score * SCORE_BUCKETS), SCORE_BUCKETS - 1)] += 1
            self.rows += 1
        for ids in chain.from_iterable(encoded):
            tokens = len(ids)
            lengths[min(tokens.bit_length(), LENGTH_BUCKETS - 1)] += 1
            self.pieces += tokens
            if unknown_id is not None:
                self.unknown += ids.count(unknown_id)

    def plus(self, other: RowCounts, sign: int = 1) -> Self:
        """The sum of both, or with `sign` -1 what came since `other`."""
        return type(self)(
            **{
                each.name: _add(getattr(self, each.name), getattr(other, each.name), sign)
                for each in fields(self)
            }
        )

    def to_json(self) -> dict[str, Any]:
        """All counts by name, for a JSON document."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Counts from the output of `to_json`; missing ones are 0, unknown ones are dropped."""
        names = [each.name for each in fields(cls)]
        return cls(**{name: document[name] for name in names if name in document})


def _add(mine: Any, others: Any, sign: int) -> Any:
    if isinstance(mine, int):
        return mine + sign * others
    longest = max(len(mine), len(others))
    return [
        (mine[at] if at < len(mine) else 0) + sign * (others[at] if at < len(others) else 0)
        for at in range(longest)
    ]


@dataclass(frozen=True)
class Profile:
    """Counts of a version's rows in the form that is kept as a tag.

    Attributes:
        rows: Number of rows.
        classes: Number of classes.
        labels: Rows by class index; rows of classes that are not listed are in `rest`.
        rest: Rows of the classes that are not listed.
        scores, lengths, pieces, unknown: See `RowCounts`.
    """

    rows: int
    classes: int
    labels: Mapping[int, int]
    rest: int
    scores: tuple[int, ...]
    lengths: tuple[int, ...]
    pieces: int
    unknown: int

    @classmethod
    def of(cls, counts: RowCounts) -> Profile:
        """The profile of counts, with all classes listed."""
        return cls(
            counts.rows,
            len(counts.labels),
            dict(enumerate(counts.labels)),
            0,
            tuple(counts.scores),
            tuple(counts.lengths),
            counts.pieces,
            counts.unknown,
        )

    def to_tag(self) -> str:
        """Compact JSON of at most `MAX_TAG` characters; lists the `MAX_LISTED` largest classes."""
        largest = sorted(self.labels, key=lambda at: -self.labels[at])[:MAX_LISTED]
        listed = {at: self.labels[at] for at in sorted(largest)}
        document = {
            "rows": self.rows,
            "classes": self.classes,
            "labels": listed,
            "rest": self.rest + sum(self.labels.values()) - sum(listed.values()),
            "scores": self.scores,
            "lengths": self.lengths,
            "pieces": self.pieces,
            "unknown": self.unknown,
        }
        return json.dumps(document, separators=(",", ":"))

    @classmethod
    def from_tag(cls, text: str, what: str) -> Profile:
        """The profile of a tag: the output of `to_tag`, or of `RowCounts.to_json` as JSON.

        Args:
            text: Value of the tag.
            what: The tag in the error's message.

        Raises:
            ModelError: It is damaged.
        """
        try:
            document = json.loads(text)
            labels = document["labels"]
            found = dict(enumerate(labels)) if isinstance(labels, list) else labels
            profile = cls(
                document["rows"],
                document.get("classes", len(found)),
                {int(at): count for at, count in found.items()},
                document.get("rest", 0),
                tuple(document["scores"]),
                tuple(document["lengths"]),
                document["pieces"],
                document["unknown"],
            )
            valid = profile._is_valid()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise ModelError(
                f"{what} is damaged: it is not the counts of a version's rows. Promote the version "
                "again to write its profile."
            )
        return profile

    def _is_valid(self) -> bool:
        counts = [
            *(self.rows, self.classes, self.rest, self.pieces, self.unknown),
            *self.labels.values(),
            *self.scores,
            *self.lengths,
        ]
        # the sums are not compared: of served rows one request may be half counted
        return (
            all(type(count) is int and count >= 0 for count in counts)
            and all(0 <= at < self.classes for at in self.labels)
            and (len(self.scores), len(self.lengths)) == (SCORE_BUCKETS, LENGTH_BUCKETS)
        )


def same_classes(first: Profile, second: Profile) -> tuple[list[int], list[int]]:
    """Rows of both by class; classes that are not listed in both share the last count."""
    listed = sorted(first.labels.keys() & second.labels.keys())
    return _by_class(first, listed), _by_class(second, listed)


def _by_class(profile: Profile, listed: Sequence[int]) -> list[int]:
    counts = [profile.labels[at] for at in listed]
    return [*counts, profile.rest + sum(profile.labels.values()) - sum(counts)]

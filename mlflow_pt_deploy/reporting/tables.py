"""Format results as tables: for the terminal, as Markdown, as cells."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from mlflow_pt_deploy.evaluation.result import Measurement, Result, find_result
from mlflow_pt_deploy.reporting.plots import plot
from mlflow_pt_deploy.reporting.remarks import headline, promise_on_test, remarks
from mlflow_pt_deploy.search.pareto import CompletedTrial, StudyResult
from mlflow_pt_deploy.selection.choice import Choice
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system.device import CPU

__all__ = ["markdown", "plot", "ranked_cells", "table", "trials_markdown", "trials_table"]

_WIDTH = 138
_REASON_CHARACTERS = 400


class _Column(NamedTuple):
    title: str
    text: Callable[[Result], str]


def table(
    results: Sequence[Result],
    choice: Choice | None = None,
    *,
    dataset: str = "test",
    policy: Policy | None = None,
) -> str:
    """Format results as aligned plain text, fastest first, about 140 columns wide.

    Args:
        results: From `measure`.
        choice: From `choose`; the variant is marked with ``*`` and the reason is added below.
        dataset: Dataset of accuracy, drop and agreement.
        policy: Of the choice; whether the test rows keep its promise is added.
    """
    chosen = choice.variant if choice else None
    columns = _columns(dataset, results)
    header = ["", *(column.title for column in columns)]
    rows = [["*" if r.variant == chosen else "", *_cells(r, columns)] for r in _ranked(results)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_line(row, widths) for row in [header, *rows]]
    lines.insert(1, "-" * max(map(len, lines)))
    for failed in _failed(results):
        reason = f"{failed.variant}: {_shortened(failed.reason)}"
        lines += textwrap.wrap(reason, _WIDTH, initial_indent="! ", subsequent_indent="    ")
    for remark in remarks(results):
        lines += textwrap.wrap(remark, _WIDTH, initial_indent="~ ", subsequent_indent="    ")
    if choice is not None:
        lines += ["", *textwrap.wrap(_explained(results, choice, policy), _WIDTH)]
    warning = headline(results, find_result(results, choice.variant if choice else None), policy)
    return "\n".join([*(f"! {line}" for line in textwrap.wrap(warning, _WIDTH)), *lines])


def markdown(
    results: Sequence[Result],
    choice: Choice | None = None,
    *,
    dataset: str = "test",
    notes: Iterable[str] = (),
    policy: Policy | None = None,
) -> str:
    """Format the reason and the results as a GitHub table, the chosen variant in bold.

    Args:
        results: From `measure`.
        choice: From `choose`.
        dataset: Dataset of accuracy, drop and agreement.
        notes: Lines to add below, e.g. the machine and the data.
        policy: See `table`.
    """
    columns = _columns(dataset, results)
    warning = headline(results, find_result(results, choice.variant if choice else None), policy)
    lines = [
        *([f"**{warning}**", ""] if warning else []),
        *([_explained(results, choice, policy), ""] if choice is not None else []),
        "| " + " | ".join(column.title for column in columns) + " |",
        "|---|" + "---:|" * (len(columns) - 1),
    ]
    for each in _ranked(results):
        cells = _cells(each, columns)
        if choice is not None and each.variant == choice.variant:
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- `{r.variant}` is missing: {_one_line(r.reason)}" for r in _failed(results)]
    below = [*failed, *(f"- {_one_line(note)}" for note in (*remarks(results), *notes))]
    return "\n".join([*lines, *(["", *below] if below else [])]) + "\n"


def ranked_cells(
    results: Sequence[Result], choice: Choice | None, *, dataset: str = "test"
) -> tuple[list[str], list[tuple[bool, list[str]]]]:
    """Return the titles of the table, and for each variant whether it was chosen and its cells."""
    chosen = choice.variant if choice else None
    columns = _columns(dataset, results)
    rows = [(each.variant == chosen, _cells(each, columns)) for each in _ranked(results)]
    return [column.title for column in columns], rows


def trials_table(found: StudyResult, chosen: Sequence[CompletedTrial]) -> str:
    """Format finished trials as aligned plain text, fastest first, then failed ones with reason.

    Args:
        found: From `search`.
        chosen: Selected trials, marked with ``*``; the rest of the front is marked with ``+``.
    """
    header, *rows = _trial_rows(found, chosen)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_line(row, widths) for row in [header, *rows]]
    lines.insert(1, "-" * max(map(len, lines)))
    for trial in found.dropped:
        text = f"trial {trial.number}: {trial.state}: {_shortened(trial.reason)}"
        lines += textwrap.wrap(text, _WIDTH, initial_indent="! ", subsequent_indent="    ")
    return "\n".join(lines)


def trials_markdown(found: StudyResult, chosen: Sequence[CompletedTrial]) -> str:
    """Format the trials as a GitHub table."""
    header, *rows = _trial_rows(found, chosen)
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|---|---|" + "---:|" * (len(header) - 2))
    dropped = [f"- trial {t.number}: {t.state}: {_one_line(t.reason)}" for t in found.dropped]
    return "\n".join([*lines, *(["", *dropped] if dropped else [])]) + "\n"


_TRIAL_TITLES = ("", "trial", "ms", "accuracy", "epochs", "rate", "batch", "T", "soft")


def _trial_rows(found: StudyResult, chosen: Sequence[CompletedTrial]) -> list[list[str]]:
    selected, front = ({trial.number for trial in some} for some in (chosen, found.front))
    rows = [list(_TRIAL_TITLES)]
    for trial in sorted(found.finished, key=lambda each: each.outcome.latency_ms):
        point, outcome = trial.point, trial.outcome
        mark = "*" if trial.number in selected else "+" if trial.number in front else ""
        numbers = (
            f"{outcome.latency_ms:#.3g}",
            f"{outcome.accuracy:.4f}",
            str(point.epochs),
            f"{point.learning_rate:.1e}",
            str(point.batch_size),
            f"{point.temperature:.2g}",
            f"{point.soft_weight:.2f}",
        )
        rows.append([mark, f"{trial.number}: {point}", *numbers])
    return rows


def _columns(dataset: str, results: Sequence[Result]) -> tuple[_Column, ...]:
    """Columns of the table.

    ``flips`` only if a label of some variant depends on the batch; ``device`` and what is measured
    on a GPU only if some variant runs there.
    """

    def on(name: str, of: str, form: Callable[[float], str]) -> Callable[[Result], str]:
        return lambda result: _formatted(result.value(name, of), form)

    def drop(result: Result) -> str:
        return _with_interval(result.get("accuracy_drop", dataset), _points)

    def flips(result: Result) -> str:
        share = result.value("batch_invariance")
        return "-" if share is None else f"{100 * (1 - share):.1f}%"

    on_gpu = any(each.device != CPU and not each.reason for each in results)
    device = [_Column("device", lambda result: result.device)] if on_gpu else []
    gpu = (
        _Column("device ms", on("device_ms", "", _significant)),
        _Column("GPU MB", on("peak_device_mb", "", "{:.0f}".format)),
    )
    measured = {"device ms": "device_ms", "GPU MB": "peak_device_mb"}
    shown = [
        column
        for column in gpu
        if on_gpu and any(each.get(measured[column.title]) for each in results)
    ]
    depends = any((each.value("batch_invariance") or 1.0) < 1 for each in results)
    return (
        _Column("variant", lambda result: result.variant),
        *device,
        _Column("p50 ms", on("latency_p50_ms", "", _significant)),
        _Column("p95 ms", on("latency_p95_ms", "", _significant)),
        _Column("rows/s", on("throughput_rows_per_s", "", "{:,.0f}".format)),
        _Column("speedup", lambda result: _with_interval(result.get("speedup"), _significant)),
        _Column("MB", on("artifact_mb", "", _significant)),
        _Column("RSS MB", on("peak_rss_mb", "", "{:.0f}".format)),
        *shown,
        _Column(f"acc ({dataset})", on("accuracy", dataset, "{:.4f}".format)),
        _Column("drop, points", drop),
        _Column("agree", on("agreement", dataset, "{:.4f}".format)),
        *([_Column("flips", flips)] if depends else []),
    )


def _explained(results: Sequence[Result], choice: Choice, policy: Policy | None) -> str:
    """The reason, and whether the test rows keep the promise; a broken one is in the headline."""
    chosen = find_result(results, choice.variant)
    if chosen is None or policy is None:
        return choice.reason
    kept, text = promise_on_test(chosen, policy)
    return f"{choice.reason} {text}".strip() if kept else choice.reason


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _formatted(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _points(share: float) -> str:
    # + 0.0 turns -0.0 into 0.0
    return f"{round(100 * share, 2) + 0.0:+.2f}"


def _with_interval(found: Measurement | None, form: Callable[[float], str]) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return form(found.value)
    return f"{form(found.value)} [{form(found.low)}, {form(found.high)}]"


def _cells(result: Result, columns: Sequence[_Column]) -> list[str]:
    return [column.text(result) for column in columns]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    mark, name, *numbers = cells
    left = f"{mark:<1} {name:<{widths[1]}}"
    right = (f"{cell:>{width}}" for cell, width in zip(numbers, widths[2:], strict=True))
    return "  ".join([left, *right]).rstrip()


def _ranked(results: Sequence[Result]) -> list[Result]:
    """Return successful results, shortest median latency first."""
    succeeded = [each for each in results if not each.reason]
    return sorted(succeeded, key=lambda each: each.value("latency_p50_ms") or float("inf"))


def _failed(results: Sequence[Result]) -> list[Result]:
    return [each for each in results if each.reason]


def _one_line(reason: str) -> str:
    return " ".join(reason.split())


def _shortened(reason: str) -> str:
    return textwrap.shorten(reason, _REASON_CHARACTERS, placeholder=" ...")

"""What was seen on a GPU, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_measure import Seen


def write_tables(facts: Mapping[str, Any], seen: Sequence[Seen], path: Path) -> None:
    """Write facts, and a table of each model."""
    lines = [f"- {name}: {_fact(fact)}" for name, fact in facts.items()]
    for model in dict.fromkeys(row.model for row in seen):
        lines += [
            "",
            f"## {model}",
            "",
            *_table([row for row in seen if row.model == model], facts),
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")


def _fact(fact: object) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {_fact(part)}" for name, part in fact.items())
    return f"{fact:.1f}" if isinstance(fact, float) else str(fact)


def _table(rows: Sequence[Seen], facts: Mapping[str, Any]) -> Iterator[str]:
    sizes = next((batches for row in rows if (batches := [b.rows for b in row.batches])), [])
    heads = ["variant", "1 row: p50, p95 ms", "x"]
    heads += [
        f"{size} rows/call: rows/s, x (model only; two callers)" for size in sizes if size > 1
    ]
    heads += ["256 x 128: ms, TFLOP/s, share", "same labels", "logits off", "accuracy", "memory MB"]
    yield f"| {' | '.join(heads)} |"
    yield f"|---|{'--:|' * (len(heads) - 1)}"
    for row in rows:
        cells = [row.variant, *(_cells(row, facts) if not row.reason else [row.reason])]
        yield f"| {' | '.join(cells)} |" + " |" * (len(heads) - len(cells))


def _cells(row: Seen, facts: Mapping[str, Any]) -> Iterator[str]:
    rate = facts["matrix product, TFLOP/s"]["bf16"]
    for batch in row.batches:
        if batch.rows == 1:
            yield f"{batch.p50_ms:.3f}, {batch.p95_ms:.3f}"
            yield f"{batch.ratio:.1f}"
        else:
            model = batch.rows / batch.model_ms * 1e3
            own = f"{batch.rows_per_s:,.0f}, {batch.ratio:.1f}"
            callers = f"{batch.callers_rows_per_s:,.0f}"
            yield f"{own} ({model:,.0f}, {batch.model_ratio:.1f}; {callers})"
    yield f"{row.full_ms:.2f}, {row.tflops:.0f}, {row.tflops / rate:.0%}"
    yield f"{row.same_labels:.2%}"
    yield f"{row.off:.2g} of {row.largest:.3g}"
    yield f"{row.accuracy:.2%}"
    yield f"{row.used_mb:,.0f}"

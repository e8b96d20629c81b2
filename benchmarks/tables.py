"""Results of serving benchmarks as Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rates import LIMITS_MS, Point
from servers import PT_DEPLOY


@dataclass
class Result:
    """Measurements of one server, or the reason why it did not start."""

    server: str
    reason: str = ""
    start_s: float | None = None
    points: list[Point] = field(default_factory=list)
    best: dict[int, float] = field(default_factory=dict)
    overload: Point | None = None
    padding_share: float | None = None

    @property
    def peak(self) -> Point | None:
        """The point at the highest rate within the longest of `LIMITS_MS`."""
        best = max(self.best.values(), default=0.0)
        return next((point for point in self.points if point.rate == best), None)


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = [
        "| server | start s | good/s, p99 <= 40 ms | <= 100 ms | p50, p99, p99.9 ms there "
        "| CPU µs/row | padding | at twice that: good/s | 429 | 429's p50, p99 ms (since sent) "
        "| errors |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        if result.reason:
            lines.append(f"| {result.server} | {result.reason} " + "| " * 9 + "|")
            continue
        there, over = result.peak, result.overload
        cells = [
            f"{result.start_s:g}",
            *(f"{result.best.get(limit, 0):g}" for limit in LIMITS_MS),
            f"{there.p50_ms:.1f}, {there.p99_ms:.1f}, {there.p999_ms:.1f}" if there else "-",
            f"{there.cpu_us:g}" if there else "-",
            f"{result.padding_share:.1%}" if result.padding_share is not None else "-",
            f"{over.good_per_s:g}" if over else "-",
            f"{over.refused_share:.0%}" if over else "-",
            _refusals(over) if over else "-",
            f"{over.errors}" if over else "-",
        ]
        lines.append(f"| {result.server} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _refusals(point: Point) -> str:
    times = (point.refused_p50_ms, point.refused_p99_ms, point.refused_after_p99_ms)
    return "-" if None in times else "{:.1f}, {:.1f} ({:.1f})".format(*times)


def rates_table(results: Sequence[Result]) -> str:
    """Latency of the 200s at each rate and the share of other responses, as Markdown.

    The last column is the delay of the load generator, a lower bound of the latency.
    """
    lines = [
        "| server | requests/s offered | p50 ms | p99 ms | p99.9 ms | not answered with 200 "
        "| sent late, p99 ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        for point in result.points:
            times = [point.p50_ms, point.p99_ms, point.p999_ms, point.sent_late_p99_ms]
            *cells, late = ["-" if time is None else f"{time:.1f}" for time in times]
            missing = f"{1 - point.answered_share:.1%}" if point.answered_share < 1 else "none"
            cells = [result.server, f"{point.rate:g}", *cells, missing, late]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def beside_batch(results: Sequence[Result], alone_us: float) -> str:
    """Share of the model in the CPU time of a served row."""
    text = f"Batch inference without a server takes {alone_us:g} CPU µs a row"
    ours = next((r for r in results if r.server == PT_DEPLOY and r.peak), None)
    if ours is None or ours.peak is None or not ours.peak.cpu_us:
        return f"{text}.\n"
    share, busy = alone_us / ours.peak.cpu_us, ours.peak.model_share
    text += f", {share:.2f} of what `{PT_DEPLOY}` takes at its highest rate"
    if ours.overload is not None and ours.overload.cpu_us:
        text += f" and {alone_us / ours.overload.cpu_us:.2f} where twice that is offered"
    text += "."
    if busy is not None:
        limit = "the model" if busy > 0.5 else "HTTP"
        text += f" There the model computes for {busy:.0%} of the time: {limit} is the limit."
    return f"{text}\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw p99 against the offered rate, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        seen = [point for point in result.points if point.p99_ms is not None]
        if seen:
            rates, tails = zip(*((point.rate, point.p99_ms) for point in seen), strict=True)
            axes.plot(rates, tails, marker="o", label=result.server)
    for limit in LIMITS_MS:
        axes.axhline(limit, color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="requests/s offered", ylabel="p99 ms of the 200s")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines
    figure.savefig(path, dpi=120)

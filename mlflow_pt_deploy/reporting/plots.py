"""Plot accuracy against latency, for variants or for the trials of a search.

Matplotlib is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.search.pareto import CompletedTrial, StudyResult
from mlflow_pt_deploy.selection.choice import Choice
from mlflow_pt_deploy.system.device import CPU

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_MODEL_COLORS = {
    "teacher": "#c44e52",
    "student": "#2b6ca3",
    "static": "#b7791f",
    "cascade": "#6b46c1",
}
_OTHER_COLOR = "#777777"
_CHOSEN_COLOR = "#2a9d4a"
_MARKERS = "osD^vPX*<>"
# Candidate offsets of a label in points, best first; the bar to p95 runs beside the point itself.
_LABEL_OFFSETS = [
    (side * (7 + abs(up) / 4), up)
    for up in (8, -8, 18, -18, 28, -28, 40, -40, 53, -53)
    for side in (1, -1)
]


class _Point(NamedTuple):
    """A variant in the plot; accuracies in percent, latencies in ms."""

    result: Result
    p50: float
    p95: float
    accuracy: float
    low: float
    high: float
    baseline: float

    @property
    def color(self) -> str:
        return _MODEL_COLORS.get(self.result.model, _OTHER_COLOR)

    @property
    def label(self) -> str:
        on_gpu = self.result.device != CPU
        return f"{self.result.precision} {self.result.device}" if on_gpu else self.result.precision


def plot(
    results: Sequence[Result],
    path: Path,
    choice: Choice | None = None,
    *,
    dataset: str = "test",
    retain: float | None = None,
) -> None:
    """Plot accuracy against median latency to a PNG file.

    Vertical bars show the paired 95 % interval of the accuracy drop from the baseline; horizontal
    bars reach from the median to the 95th percentile of the latency.

    Args:
        results: From `measure`; results without latency or accuracy are skipped.
        path: PNG file to write.
        choice: From `choose`; the chosen variant is marked with a ring.
        dataset: Dataset of the accuracy.
        retain: Required fraction of the baseline's accuracy, drawn as a line.
    """
    from matplotlib.figure import Figure

    # Not pyplot, which has global state and needs a display.
    figure = Figure(figsize=(10.5, 6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    points = [point for each in results if (point := _point(each, dataset)) is not None]
    runtimes = sorted({point.result.runtime for point in points})
    markers = {name: _MARKERS[at % len(_MARKERS)] for at, name in enumerate(runtimes)}
    for point in points:
        _draw_point(axes, point, markers[point.result.runtime])
    _draw_axes(axes, points, dataset)
    keys = _model_keys(points) + _runtime_keys(markers)
    if retain is not None and points:
        keys.append(_draw_limit(axes, retain, points[0].baseline))
    chosen = [p for p in points if choice is not None and p.result.variant == choice.variant]
    keys += [_draw_ring(axes, point) for point in chosen]
    axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.draw_without_rendering()  # computes the layout and with it the pixel positions
    figure.set_layout_engine("none")
    _draw_labels(axes, points)
    figure.savefig(path, format="png")


def plot_front(
    found: StudyResult, chosen: Sequence[CompletedTrial], path: Path, *, least: float
) -> None:
    """Plot the finished trials of a search and their Pareto front to a PNG file.

    Args:
        found: All trials of the study.
        chosen: Selected trials, marked with a ring.
        path: PNG file to write.
        least: Required validation accuracy, drawn as a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for kind in sorted({trial.point.kind for trial in found.finished}):
        trials = [trial for trial in found.finished if trial.point.kind == kind]
        color = _MODEL_COLORS["static" if kind == "static" else "student"]
        axes.plot(*_coordinates(trials), "o", color=color, ms=7, mec="white", label=kind)
    axes.step(*_coordinates(found.front), where="post", color="#444444", lw=1, label="Pareto front")
    axes.plot(
        *_coordinates(chosen), "o", ms=15, mfc="none", mec=_CHOSEN_COLOR, mew=2, label="selected"
    )
    for trial in found.front:
        spot = (trial.outcome.latency_ms, 100 * trial.outcome.accuracy)
        axes.annotate(
            str(trial.number), spot, xytext=(6, -11), textcoords="offset points", fontsize=8
        )
    axes.axhline(100 * least, color="#444444", ls="--", lw=1, label="required")
    _draw_latency_axis(axes)
    axes.set_ylabel("validation accuracy in %")
    dropped = f", {len(found.dropped)} stopped or failed" if found.dropped else ""
    title = f"{len(found.finished)} finished trials{dropped}; numbers are trials of the front"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.savefig(path, format="png")


def _coordinates(trials: Sequence[CompletedTrial]) -> tuple[list[float], list[float]]:
    """Return latencies in ms and accuracies in percent."""
    latencies = [trial.outcome.latency_ms for trial in trials]
    return latencies, [100 * trial.outcome.accuracy for trial in trials]


def _point(result: Result, dataset: str) -> _Point | None:
    p50, accuracy = result.value("latency_p50_ms"), result.value("accuracy", dataset)
    if result.reason or p50 is None or accuracy is None:
        return None
    p95, drop = result.value("latency_p95_ms"), result.get("accuracy_drop", dataset)
    baseline = accuracy + (drop.value if drop else 0.0)
    low = accuracy if drop is None or drop.high is None else baseline - drop.high
    high = accuracy if drop is None or drop.low is None else baseline - drop.low
    shares = (100 * share for share in (accuracy, low, high, baseline))
    return _Point(result, p50, p50 if p95 is None else p95, *shares)


def _draw_point(axes: Axes, point: _Point, marker: str) -> None:
    axes.vlines(point.p50, point.low, point.high, color=point.color, alpha=0.4, linewidth=1.2)
    axes.hlines(point.accuracy, point.p50, point.p95, color=point.color, alpha=0.4, linewidth=1.2)
    axes.plot(
        point.p50, point.accuracy, marker, color=point.color, markersize=8, markeredgecolor="white"
    )


def _draw_latency_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    # Ticks in steps of 1-2-5
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.14, y=0.1)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("median latency of one row, raw row to label, in ms (log)")


def _draw_axes(axes: Axes, points: Sequence[_Point], dataset: str) -> None:
    _draw_latency_axis(axes)
    axes.set_xlabel("median latency of one row, raw row to label, in ms (log; bar to p95)")
    axes.set_ylabel(f"{dataset} accuracy in % (bar: paired 95 % interval of the drop)")
    where = sorted({f"{p.result.device}, threads: {p.result.threads}" for p in points})
    axes.set_title(f"Accuracy against latency of one row ({'; '.join(where)})", loc="left")


def _draw_limit(axes: Axes, retain: float, baseline: float) -> Artist:
    label = f"{100 * retain:g} % of the\nbaseline's accuracy"
    return axes.axhline(retain * baseline, color="#444444", ls="--", lw=1, label=label)


def _draw_ring(axes: Axes, point: _Point) -> Artist:
    (ring,) = axes.plot(
        point.p50, point.accuracy, "o", ms=16, mfc="none", mec=_CHOSEN_COLOR, mew=2, label="chosen"
    )
    return ring


def _model_keys(points: Sequence[_Point]) -> list[Artist]:
    from matplotlib.patches import Patch

    models = {point.result.model: point.color for point in points}
    return [Patch(color=models[name], label=name) for name in sorted(models, reverse=True)]


def _runtime_keys(markers: dict[str, str]) -> list[Artist]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color="#555555", ls="", marker=marker, label=name)
        for name, marker in markers.items()
    ]


def _draw_labels(axes: Axes, points: Sequence[_Point]) -> None:
    """Write precision and GPU beside each point, at the nearest offset without overlap.

    Colour, marker and label together identify the variant.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    pixels = axes.figure.dpi / 72  # per point
    spots = [axes.transData.transform((point.p50, point.accuracy)) for point in points]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in spots]
    for point, (x, y) in zip(points, spots, strict=True):
        label = axes.annotate(
            point.label,
            (point.p50, point.accuracy),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            color=point.color,
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": point.color, "alpha": 0.5, "lw": 0.6},
        )
        # The extent of the text only: that of an annotation includes its arrow
        size = Text.get_window_extent(label)
        for right, up in _LABEL_OFFSETS:
            left = x + right * pixels - (0 if right > 0 else size.width)
            box = Bbox.from_bounds(left, y + up * pixels - size.height / 2, size.width, size.height)
            if not any(box.overlaps(other) for other in taken):
                break
        label.set(position=(right, up), ha="left" if right > 0 else "right")
        taken.append(box)

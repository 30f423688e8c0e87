"""Charts of a sweep as SVG, in the colors of the HTML report (see `vilseg.evaluation.charts`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tune.search_space import Parameter, Point, format_value
from tune.trial_records import TrialRecord
from vilseg.evaluation.charts import COLOURS, STYLE, WIDTH, to_svg

_BINS = 5
"""Number of bins into which the heat map divides a continuous parameter."""
_MAX_VALUES = 12
"""Maximum number of values that the heat map shows one by one; a parameter with more is binned like a continuous one."""


def parallel_coordinates(
    parameters: Mapping[str, Parameter], lines: Sequence[tuple[Point, float]], *, objective: str
) -> str:
    """Return a parallel coordinates chart as SVG: one line per trial, through its parameter values and its score.

    Better scores have more opaque lines. The best trial has the accent color.

    Args:
        parameters: parameters by configuration key, one axis each, in this order.
        lines: point and score of each trial; at least one.
        objective: name of the objective, for the last axis.
    """
    parallel_axes = [_Axis(key, parameter) for key, parameter in parameters.items()]
    scores = np.array([score for _, score in lines])
    low, span = scores.min(), np.ptp(scores) or 1.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(1.6 * WIDTH, 1.5 * (len(parallel_axes) + 1)), 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.set_xlim(-0.3, len(parallel_axes) + 0.45)
        axes.set_ylim(-0.14, 1.16)
        for index, (point, score) in sorted(enumerate(lines), key=lambda item: item[1][1]):
            heights = [*(axis.height(point) for axis in parallel_axes), (score - low) / span]
            best = score == scores.max()
            axes.plot(
                range(len(heights)),
                heights,
                color=COLOURS["accent" if best else "muted"],
                alpha=1.0 if best else 0.12 + 0.55 * float((score - low) / span),
                linewidth=2.4 if best else 1.3,
                zorder=2 + index / len(lines) if not best else 4,
            )
        for position, axis in enumerate(parallel_axes):
            _draw_axis(axes, position, axis.name, axis.ticks())
        ticks = [(0.0, f"{low:.3f}"), (1.0, f"{scores.max():.3f}")]
        _draw_axis(axes, len(parallel_axes), objective, ticks)
        return to_svg(figure, f"{objective} of all trials by their values")


def heat_map(
    rows: tuple[str, Parameter], columns: tuple[str, Parameter], lines: Sequence[tuple[Point, float]], *, objective: str
) -> str:
    """Return a heat map as SVG: the mean score of the trials by the values of two parameters.

    A cell with several trials also shows their standard deviation and number.

    Args:
        rows: configuration key and parameter of the rows.
        columns: configuration key and parameter of the columns.
        lines: point and score of each trial.
        objective: name of the objective.
    """
    row_cells = _Cells(rows[1])
    column_cells = _Cells(columns[1])
    scores: dict[tuple[int, int], list[float]] = {}
    for point, score in lines:
        cell = (row_cells.index_of(point.get(rows[0])), column_cells.index_of(point.get(columns[0])))
        if None not in cell:
            scores.setdefault(cell, []).append(score)  # type: ignore[arg-type]
    means = {cell: float(np.mean(values)) for cell, values in scores.items()}
    low = min(means.values())
    span = (max(means.values()) - low) or 1.0
    with mpl.rc_context(STYLE):
        height = 0.9 + 0.42 * len(row_cells.names)
        figure = Figure(figsize=(max(WIDTH, 1.4 + 0.68 * len(column_cells.names)), height), layout="constrained")
        axes = figure.add_subplot()
        for (row, column), mean in means.items():
            fraction = (mean - low) / span
            axes.add_patch(
                mpl.patches.Rectangle(
                    (column - 0.48, row - 0.46),
                    0.96,
                    0.92,
                    color=COLOURS["accent"],
                    alpha=0.08 + 0.62 * fraction,
                    linewidth=0,
                )
            )
            count = len(scores[row, column])
            spread = f" ±{np.std(scores[row, column]):.3f}"[: 7 if count > 1 else 0]
            axes.annotate(
                f"{mean:.3f}" + (f"\n{spread.strip()} ({count})" if count > 1 else ""),
                (column, row),
                ha="center",
                va="center",
                fontsize=9 if count == 1 else 7.5,
            )
        axes.set_xlim(-0.5, len(column_cells.names) - 0.5)
        axes.set_ylim(-0.5, len(row_cells.names) - 0.5)
        axes.set_xticks(range(len(column_cells.names)), column_cells.names)
        axes.set_yticks(range(len(row_cells.names)), row_cells.names)
        axes.set_xlabel(columns[0])
        axes.set_ylabel(rows[0])
        axes.spines["bottom"].set_visible(False)
        return to_svg(figure, f"mean {objective} by {rows[0]} and {columns[0]}")


def learning_curves(records: Sequence[TrialRecord], best: Sequence[int], *, objective: str) -> str:
    """Return a chart of the objective over the training steps of every trial, as SVG.

    Args:
        records: trials to show.
        best: numbers of the trials to show in the accent color.
        objective: name of the objective.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        for record in records:
            points = [(entry["step"], entry[objective]) for entry in record.curve if objective in entry]
            is_best = record.number in best
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS["accent" if is_best else "muted"],
                linewidth=2.2 if is_best else 1.1,
                alpha=1 if is_best else 0.45,
                marker="o",
                markersize=3,
                zorder=3 if is_best else 2,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return to_svg(figure, f"{objective} over the steps of all trials")


def importance_bars(importance: Mapping[str, float]) -> str:
    """Return a bar chart, as SVG, of the fraction of the scores' variance that each parameter explains, largest first."""
    names = sorted(importance, key=lambda name: -importance[name])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.32 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(names)), [importance[name] for name in names], height=0.5, color=COLOURS["accent"])
        for row, name in enumerate(names):
            axes.annotate(
                f"{importance[name]:.0%}",
                (importance[name], row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", colors=COLOURS["ink"])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, max(1.14 * max(importance.values()), 0.01))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return to_svg(figure, "importance of the parameters")


class _Axis:
    """Vertical axis of a parameter: numbers on a linear or logarithmic scale, listed values equally spaced in their order."""

    def __init__(self, name: str, parameter: Parameter) -> None:
        self.name = name
        self._log = parameter.loguniform is not None
        self._listed = [format_value(value) for value in parameter.choice] if parameter.choice else None
        bounds = parameter.uniform or parameter.loguniform or parameter.int or (0, 1)
        self._low, self._high = (self._scale(bound) for bound in bounds)

    def _scale(self, value: float) -> float:
        return math.log(value) if self._log else float(value)

    def height(self, point: Point) -> float:
        """Return the height of a point on the axis in 0..1; nan, which leaves a gap, if the point lacks the parameter."""
        value = point.get(self.name)
        if value is None:
            return math.nan
        if self._listed:
            return self._listed.index(format_value(value)) / max(1, len(self._listed) - 1)
        return (self._scale(value) - self._low) / (self._high - self._low)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the height and the label of each tick."""
        if self._listed:
            return [(index / max(1, len(self._listed) - 1), text) for index, text in enumerate(self._listed)]
        marks = [self._low + height * (self._high - self._low) for height in (0, 0.5, 1)]
        return [
            (height, format_value(math.exp(m) if self._log else m))
            for height, m in zip((0.0, 0.5, 1.0), marks, strict=True)
        ]


def _draw_axis(axes: Axes, position: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([position, position], [0, 1], color=COLOURS["line"], linewidth=1.2, zorder=1)
    axes.annotate(name, (position, 1.1), ha="center", va="bottom", fontsize=9, color=COLOURS["ink"])
    for height, text in ticks:
        axes.annotate(
            text,
            (position, height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=COLOURS["muted"],
        )


class _Cells:
    """Rows or columns of the heat map: one per value of a parameter, or one per bin of its range."""

    def __init__(self, parameter: Parameter) -> None:
        self._listed = parameter.values
        if self._listed is not None and len(self._listed) <= _MAX_VALUES:
            self.names = [format_value(value) for value in self._listed]
            return
        self._listed = None
        low, high = parameter.uniform or parameter.loguniform or parameter.int or (0.0, 1.0)
        spaced = np.geomspace if parameter.loguniform else np.linspace
        self._edges = spaced(low, high, _BINS + 1)
        self.names = [
            f"{format_value(float(a))}–{format_value(float(b))}"
            for a, b in zip(self._edges, self._edges[1:], strict=False)
        ]

    def index_of(self, value: Any) -> int | None:
        """Return the index of the row or column of a value; None for None, the value of a point without the parameter."""
        if value is None:
            return None
        if self._listed is not None:
            return self._listed.index(value)
        return int(np.clip(np.searchsorted(self._edges, value, side="right") - 1, 0, _BINS - 1))

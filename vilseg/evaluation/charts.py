"""Charts as inline SVG: drawn by matplotlib, coloured by the page that contains them.

A page has a light and a dark theme, so a chart must not have fixed colours. It is drawn in placeholder colours, which are
then replaced by the page's CSS variables (`--ink`, `--muted`, `--line`, `--accent`, `--second`).
"""

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLOURS = {"ink": "#010101", "muted": "#020202", "line": "#030303", "accent": "#040404", "second": "#050505"}
WIDTH = 4.4  # inches; small enough that 10-point text stays legible when the chart is scaled down to a phone's width
_MOST_POINTS = 240  # per line; more would only enlarge the page

STYLE: Any = {  # Any, because matplotlib types the keys as a Literal of all its settings
    "svg.fonttype": "none",  # keep text as text: selectable, and in the font of the page
    "font.size": 10.0,
    "text.parse_math": False,  # a "$" in a class name does not start a formula
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    label: str,
    percent: bool = False,
    reference: float | None = None,
) -> str:
    """Draw one line over training steps as an SVG element.

    Args:
        points: at least one (step, value), in ascending order of step; more than 240 are reduced by averaging neighbours.
        label: description for screen readers; unique within a page.
        percent: format values in 0..1 as per cent and start the axis at 0.
        reference: value at which to draw a dashed horizontal line; None draws none.
    """
    steps, values = _thin(np.asarray(points, dtype=np.float64))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y")
        marker = "o" if len(steps) <= 20 else None
        axes.plot(steps, values, color=COLOURS["accent"], linewidth=1.8, marker=marker, markersize=4)
        if reference is not None and math.isfinite(reference):
            axes.axhline(reference, color=COLOURS["second"], linewidth=1.6, linestyle=(0, (4, 3)))
        if percent:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return to_svg(figure, label)


def iou_bars(trained: Mapping[str, float], untrained: Mapping[str, float] | None, *, label: str) -> str:
    """Draw the IoU (0..1) of every class as horizontal bars, the best first, as an SVG element.

    Classes whose IoU is nan, because they are in neither ground truth nor prediction, are left out; at least one must remain.
    A thin second bar shows the untrained model, if given.
    """
    names = sorted((name for name in trained if math.isfinite(trained[name])), key=lambda name: -trained[name])
    rows = np.arange(len(names))
    ours = np.array([trained[name] for name in names])
    theirs = np.nan_to_num([untrained.get(name, math.nan) for name in names]) if untrained else np.zeros(len(names))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH * 1.3, 0.5 + 0.27 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="x")
        axes.barh(rows - 0.1 * bool(untrained), ours, height=0.46, color=COLOURS["accent"])
        if untrained:
            axes.barh(rows + 0.26, theirs, height=0.2, color=COLOURS["second"])
        for row, ours_here, longest in zip(rows, ours, np.maximum(ours, theirs), strict=True):
            axes.annotate(
                f"{100 * ours_here:.1f}", (longest, row), xytext=(4, 0), textcoords="offset points", va="center"
            )
        _finish_bars(axes, names, float(max(ours.max(), theirs.max())))
        return to_svg(figure, label)


def _finish_bars(axes: Axes, names: list[str], longest: float) -> None:
    axes.set_yticks(np.arange(len(names)), [name if len(name) <= 24 else name[:23] + "…" for name in names])
    axes.tick_params(axis="y", colors=COLOURS["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(longest * 1.12, 0.01))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None, symbol=" %"))
    axes.spines["bottom"].set_visible(False)


def _thin(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average neighbours of (N, 2) points so that at most `_MOST_POINTS` remain; return steps and values."""
    groups = np.array_split(points, min(len(points), _MOST_POINTS))
    means = np.stack([group.mean(axis=0) for group in groups])
    return means[:, 0], means[:, 1]


def to_svg(figure: Figure, label: str) -> str:
    """Convert a figure to an SVG element without fixed size, fixed colours, namespaces and metadata.

    Args:
        figure: figure drawn in placeholder colours.
        label: description for screen readers; unique within a page.
    """
    buffer = io.StringIO()
    # The hash salt and the id prefix below keep the ids of charts on one page distinct and reproducible.
    with mpl.rc_context({"svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text with its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    body = text[text.index(">", view_box.end()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", label)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", body)
    for name, stand_in in COLOURS.items():
        body = body.replace(stand_in, f"var(--{name})")
    return f'<svg {view_box.group()} role="img" aria-label="{_attribute(label)}">{body.strip()}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")

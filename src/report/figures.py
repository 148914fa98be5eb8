"""The report's figures, drawn by matplotlib: methods as bars and against their cost, curves of tasks, heat maps.

`svg` turns a figure into text for a page; its lines and letters take the page's text colour, also in dark mode.
"""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from report.bootstrap import Interval
from report.runs import Run

# Okabe and Ito's colours, which colour-blind readers can distinguish; dashes or hatches mark a colour's second use.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
INK = "#24292f"  # of text and axes; `svg` replaces it
matplotlib.rcParams |= {
    "svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "gorp", "font.size": 9, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "figure.constrained_layout.use": True, "axes.titlesize": 9, "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip

Styles = Mapping[str, dict]


def styles(methods: Sequence[str]) -> Styles:
    """Colour and line style of each method, the same in every figure of a report."""
    return {method: {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}
            for i, method in enumerate(sorted(methods))}


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element, which works alone and within a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = text.getvalue()[text.getvalue().index("<svg"):]
    return re.sub(r' id="\w+_\d+"', "", element).replace(INK, "currentColor")


def bars(scores: Mapping[str, tuple[float, Interval | None]], look: Styles, title: str) -> Figure:
    """A bar for each method: its average performance in per cent, with its 95 % interval."""
    figure = Figure(figsize=(7, 0.9 + 0.34 * len(scores)))
    axes = figure.subplots()
    for place, (method, (mean, interval)) in enumerate(scores.items()):
        axes.barh(place, mean, 0.7, color=look[method]["color"], hatch="//" * (look[method]["linestyle"] != "-"))
        end = mean
        if interval is not None:
            end = max(end, interval.high)
            axes.plot([interval.low, interval.high], [place, place], color=INK, marker="|", markersize=7)
        axes.text(end + 1.5, place, f"{mean:.1f}", va="center")
    axes.set_yticks(range(len(scores)), scores)
    axes.set(title=title, xlabel="average performance (AP), per cent; line: 95 % interval", xlim=(0, 110))
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    return figure


def costs(points: Mapping[str, tuple[float, float, float]], look: Styles, title: str) -> Figure:
    """Each method's average performance against its training time in seconds and the megabytes that it keeps."""
    figure = Figure(figsize=(7, 2.6 + 0.16 * len(points)))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, label in zip(panels, (1, 2), ("training of an order, seconds", "kept between tasks, MB")):
        for method, values in points.items():
            axes.plot(values[column], values[0], "o" if look[method]["linestyle"] == "-" else "^", label=method,
                      color=look[method]["color"])
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("AP, per cent")
    figure.suptitle(title, fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def curves(runs: Mapping[str, Sequence[Run]], look: Styles, title: str) -> Figure:
    """A panel for each task: its accuracy from its own training on, for each method the mean over its runs and, shaded,
    their range."""
    tasks = next(iter(runs.values()))[0].tasks
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(4, 1.9 * columns), 0.9 + 1.5 * rows + 0.2 * len(runs) / columns))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    numbers = np.arange(1, len(tasks) + 1)
    for column, (axes, task) in enumerate(zip(panels, tasks)):
        for method, own in runs.items():
            values = np.array([run.matrix for run in own], float)[:, column:, column]  # runs, tasks from this one on
            axes.plot(numbers[column:], values.mean(0), marker="o", markersize=4, label=method, **look[method])
            axes.fill_between(numbers[column:], values.min(0), values.max(0), color=look[method]["color"], alpha=0.2)
        axes.set(title=task, ylim=(-4, 104), xlim=(0.6, len(tasks) + 0.4), xticks=numbers[:: -(-len(tasks) // 5)])
        axes.grid(alpha=0.25)
    for axes in panels:  # those without a task
        axes.set_axis_off()
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("tasks trained")
    figure.supylabel("accuracy, per cent", fontsize=9)
    figure.suptitle(title, fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def heat_map(tasks: Sequence[str], matrix: np.ndarray, title: str) -> Figure:
    """The accuracy matrix (tasks, tasks): a row for each task trained, a column for each task tested; NaN is empty."""
    figure = Figure(figsize=(max(1.6 + 0.45 * len(tasks), 0.4 + 0.075 * len(title)), 1.2 + 0.4 * len(tasks)))
    axes = figure.subplots()
    axes.pcolormesh(matrix, cmap="Blues", vmin=0, vmax=100, edgecolors="none")
    for (i, j), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            axes.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center",
                      color="#ffffff" if value > 55 else "#111111")
    places = np.arange(len(tasks)) + 0.5
    axes.set_xticks(places, tasks, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, [f"after {number} {task}" for number, task in enumerate(tasks, 1)])
    axes.set(title=title, aspect="equal")
    axes.invert_yaxis()
    return figure

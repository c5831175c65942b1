# SPDX-License-Identifier: Apache-2.0

"""The plots of a leaderboard: quality against shots, against cost, and against what happens to the photos."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.gallery import plain
from benchmarks.summary import CONDITIONS, MEAN, TITLES

SHOWN = ("image_AUROC", "pixel_AUROC", "AUPRO")
# Colors that color-blind readers tell apart (Okabe and Ito), and shapes besides.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A5C00", "#56B4E9", "#000000", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")


def style(methods: list[str], method: str) -> tuple[str, str, str]:
    """Color, marker and the marker as a letter, the same in all plots."""
    place = methods.index(method)
    return COLORS[place % len(COLORS)], MARKERS[(place + place // 8) % 8], GLYPHS[(place + place // 8) % 8]


def measured(summary: pd.DataFrame, methods: list[str]) -> list[str]:
    """The methods that have a mean to show."""
    found = set(summary.loc[(summary["category"] == MEAN) & summary["image_AUROC"].notna(), "method"])
    return [method for method in methods if method in found]


def _percent_axis(axis: Axes, title: str) -> None:
    axis.set_ylabel(f"{title}, %")
    axis.grid(visible=True, axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def plot_shots(axis: Axes, summary: pd.DataFrame, methods: list[str], metric: str) -> None:
    """One line per method: mean over the categories, bars for the standard deviation over the draws.

    Incomplete methods have hollow markers and broken lines, since their mean is over fewer categories.

    Args:
        axis (Axes): Where to draw.
        summary (pd.DataFrame): As of :func:`benchmarks.summary.summarize`.
        methods (list[str]): All methods.
        metric (str): Column of the summary.
    """
    means = summary[(summary["category"] == MEAN) & summary[metric].notna()]
    shots = sorted(means["shots"].unique())
    for place, method in enumerate(methods):
        own = means[means["method"] == method].sort_values("shots")
        color, marker, _ = style(methods, method)
        aside = 0.03 * (place - (len(methods) - 1) / 2)  # bars of neighbors beside each other
        x = [shots.index(value) + aside for value in own["shots"]]
        bars = 100 * own[f"{metric}_std"].fillna(0)
        line = "-" if own["complete"].all() else "--"
        axis.errorbar(x, 100 * own[metric], bars, color=color, ls=line, lw=1.4, elinewidth=1, capsize=2)
        for filled in (True, False):
            some = [value for value, complete in zip(x, own["complete"], strict=True) if complete == filled]
            face = color if filled else "white"
            y = 100 * own.loc[own["complete"] == filled, metric]
            axis.plot(some, y, ls="", marker=marker, ms=5.5, mec=color, mfc=face, zorder=3)
    axis.set_xticks(range(len(shots)), [str(value) for value in shots])
    axis.set_xlabel("reference photos")
    _percent_axis(axis, TITLES[metric])


def plot_cost(axis: Axes, summary: pd.DataFrame, methods: list[str], shots: int) -> None:
    """Image AUROC against the time of a method as a multiple of its backbone's.

    Args:
        axis (Axes): Where to draw.
        summary (pd.DataFrame): As of :func:`benchmarks.summary.summarize`.
        methods (list[str]): All methods.
        shots (int): Number of reference photos.
    """
    rows = summary[(summary["category"] == MEAN) & (summary["shots"] == shots)]
    rows = rows.dropna(subset=["image_AUROC", "latency_ratio"])
    for _, row in rows.iterrows():
        color, marker, _ = style(methods, row["method"])
        face = color if row["complete"] else "white"
        axis.plot(row["latency_ratio"], 100 * row["image_AUROC"], marker, ms=8, mec=color, mfc=face, ls="")
    axis.set_xscale("log")
    axis.minorticks_off()
    if len(rows):
        low, high = rows["latency_ratio"].min() / 1.5, rows["latency_ratio"].max() * 1.5
        steps = [step * 10**power for power in range(-2, 5) for step in (1, 2, 5) if low < step * 10**power < high]
        axis.set_xticks(steps, [f"{step:g}" for step in steps])
        axis.set_xlim(low, high)
    axis.set_xlabel("time for one photo / time of the backbone alone")
    _percent_axis(axis, TITLES["image_AUROC"])


def plot_condition(axis: Axes, steps: pd.DataFrame, methods: list[str], metric: str = "image_AUROC") -> None:
    """One line per method over the levels of one condition, the clean value first.

    Args:
        axis (Axes): Where to draw.
        steps (pd.DataFrame): Rows of one condition, as of :func:`benchmarks.summary.robustness`.
        methods (list[str]): All methods.
        metric (str): Column of the rows.
    """
    names: list[str] = []
    for method in methods:
        own = steps[(steps["method"] == method)]
        names = ["clean", *(f"{level:g}" for level in own["level"].dropna())]
        color, marker, _ = style(methods, method)
        face = color if own["complete"].all() else "white"
        axis.plot(range(len(own)), 100 * own[metric], color=color, marker=marker, mfc=face, ms=5.5, lw=1.4)
    axis.set_xticks(range(len(names)), names)
    condition = str(steps["condition"].iloc[0])
    axis.set_xlabel(CONDITIONS.get(condition, condition))
    _percent_axis(axis, TITLES[metric])


def inline(paint: Callable[[Axes], None]) -> str:
    """A small plot as the address of an image that a page contains: SVG, the same bytes for the same figures.

    Args:
        paint (Callable[[Axes], None]): Draws it.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    paint(figure.subplots())
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "leaderboard", "font.size": 10}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def draw_shots(summary: pd.DataFrame, methods: list[str], path: Path) -> Path:
    """Write the plots of quality against shots as one PNG.

    Args:
        summary (pd.DataFrame): As of :func:`benchmarks.summary.summarize`.
        methods (list[str]): All methods.
        path (Path): PNG to write.
    """
    shown = [metric for metric in SHOWN if summary[metric].notna().any()]
    figure = Figure(figsize=(4.2 * len(shown), 4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, metric in zip(axes, shown, strict=True):
        plot_shots(axis, summary, methods, metric)
    return _save(figure, summary, methods, 2 * len(shown), path)


def draw_cost(summary: pd.DataFrame, methods: list[str], shots: int, path: Path) -> Path:
    """Write the plot of quality against cost as PNG.

    Args:
        summary (pd.DataFrame): As of :func:`benchmarks.summary.summarize`.
        methods (list[str]): All methods.
        shots (int): Number of reference photos.
        path (Path): PNG to write.
    """
    figure = Figure(figsize=(6, 4.4), layout="constrained")
    plot_cost(figure.subplots(), summary, methods, shots)
    return _save(figure, summary, methods, 3, path)


def _save(figure: Figure, summary: pd.DataFrame, methods: list[str], columns: int, path: Path) -> Path:
    """Add a legend of the methods that were measured, and write the picture whole."""
    # lines and markers are drawn apart; the legend shows both
    handles = [
        Line2D([], [], color=color, marker=marker, label=plain(method))
        for method in measured(summary, methods)
        for color, marker, _ in [style(methods, method)]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns), frameon=False)
    temporary = path.with_suffix(".part.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    return path

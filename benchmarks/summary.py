# SPDX-License-Identifier: Apache-2.0

"""The numbers of a leaderboard: means, spreads and paired differences of its measured cells."""

import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t

from benchmarks.cells import CLEAN, read_cells

TITLES = {
    "image_AUROC": "image AUROC",
    "image_AP": "image AP",
    "image_F1": "image F1-max",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AP": "pixel AP",
    "pixel_F1": "pixel F1-max",
    "AUPRO": "AUPRO",
}
METRICS = tuple(TITLES)
CONDITIONS = {  # and what their levels are
    "noise": "noise, standard deviation (photos in 0..1)",
    "blur": "blur, sigma in pixels",
    "brightness": "brightness, factor",
    "jpeg": "JPEG, quality",
    "rotation": "rotation, degrees",
    "bad_reference": "defective photos among the references",
}
COSTS = ("latency_ms", "backbone_ms", "fit_seconds", "bank_bytes", "peak_bytes")
OTHERS = ("method", "dataset", "category", "shots", "draw", "condition", "level", "status", "error", "references")
COLUMNS = (*OTHERS, *METRICS, *COSTS, "test_images", "seconds")
PAIRED = (
    *("method", "baseline", "shots", "metric", "difference", "low", "high"),
    *("categories", "pairs", "expected_pairs", "complete"),
)
REQUIRED = ("methods", "baseline", "categories", "shots", "draws", "gallery_shots")
COUNTED = {"image_AUROC": "categories", "pixel_AUROC": "masked_categories"}
MEAN = "mean"  # stands in the category column of the rows that are means over categories
CONFIDENCE = 0.95
FOLDERS = re.compile(r"(?<![\w/.:])~?/(?:[^\s/'\"]+/)+")


@dataclass(frozen=True)
class Board:
    """What a leaderboard's settings ask for, and the measured cells of it.

    Args:
        cells (pd.DataFrame): One row for each measured cell that the settings ask for, failed ones too.
        everything (pd.DataFrame): All measured cells, those of earlier settings too.
        settings (dict[str, Any]): Content of ``settings.json``.
        methods (list[str]): In the order of the settings.
        categories (list[str]): Target categories.
        shots (list[int]): Numbers of reference photos, ascending.
        draws (list[int]): Seeds of their draws.
        conditions (dict[str, list[float]]): Levels of each.
    """

    cells: pd.DataFrame
    everything: pd.DataFrame
    settings: dict[str, Any]
    methods: list[str]
    categories: list[str]
    shots: list[int]
    draws: list[int]
    conditions: dict[str, list[float]]

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return str(self.settings["baseline"])

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.everything["dataset"].iloc[0])

    @property
    def gallery_shots(self) -> int:
        """Shots of the gallery and of the conditions."""
        return int(self.settings["gallery_shots"])

    @property
    def detail_shots(self) -> int:
        """Shots of the figures by category and of the comparison with cost: the gallery's, where measured clean."""
        return self.gallery_shots if self.gallery_shots in self.shots else self.shots[-1]

    def finished(self, **values: Any) -> pd.DataFrame:  # noqa: ANN401
        """The cells that did not fail and hold these values in these columns."""
        cells = self.cells[self.cells["status"] == "ok"]
        for column, value in values.items():
            cells = cells[cells[column] == value]
        return cells


def without_folders(text: str) -> str:
    """Text with absolute paths cut down to file names, since reports are published."""
    return FOLDERS.sub("…/", text)


def _read(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Cells and settings of a folder; see :func:`read_board` for the errors."""
    for name in ("cells.jsonl", "settings.json"):
        if not (folder / name).is_file():
            msg = f"{folder / name} is not there; give the folder that a run of the leaderboard has written."
            raise FileNotFoundError(msg)
    cells = pd.DataFrame(read_cells(folder / "cells.jsonl")).reindex(columns=list(COLUMNS))
    failed = cells[cells["status"] != "ok"]
    if len(failed) == len(cells):
        first = f", the first one with: {failed['error'].iloc[0]}" if len(failed) else ""
        msg = f"{folder / 'cells.jsonl'} holds no finished cell and {len(failed)} failed ones{first}. Run it again."
        raise ValueError(msg)
    if cells["dataset"].nunique() > 1:
        msg = f"{folder} holds cells of several data sets, {sorted(cells['dataset'].unique())}; use a folder for each."
        raise ValueError(msg)
    cells[[*METRICS, *COSTS]] = cells[[*METRICS, *COSTS]].astype(float)
    cells["error"] = cells["error"].map(without_folders, na_action="ignore")
    settings = json.loads((folder / "settings.json").read_text())
    missing = [name for name in REQUIRED if name not in settings]
    if missing:
        msg = f"{folder / 'settings.json'} lacks {', '.join(missing)}; run the leaderboard again, it writes them."
        raise ValueError(msg)
    return cells, settings


def read_board(folder: Path) -> Board:
    """Read a leaderboard's folder.

    Settings may change when a leaderboard goes on. Cells beyond the present ones are left out of all means, so that
    every method's mean is over the same categories and draws.

    Args:
        folder (Path): Holds ``cells.jsonl`` and ``settings.json``.

    Raises:
        FileNotFoundError: If one of them is not there.
        ValueError: If no cell is finished, a setting is missing, the baseline is none of the methods, or there are
            several data sets.
    """
    everything, settings = _read(folder)
    methods = list(settings["methods"])
    if settings["baseline"] not in methods:
        msg = f"baseline '{settings['baseline']}' is none of the methods {methods}; correct settings.json."
        raise ValueError(msg)
    asked: dict[str, list[Any]] = {
        "method": methods,
        "category": settings["categories"],
        "shots": sorted({*settings["shots"], settings["gallery_shots"]}),  # the conditions are measured at the latter
        "draw": list(range(settings["draws"])),
    }
    conditions: dict[str, list[float]] = settings.get("conditions") or {}
    levels = {(CLEAN, 0.0)} | {(name, float(level)) for name, values in conditions.items() for level in values}
    found = zip(everything["condition"], everything["level"].astype(float).fillna(0), strict=True)
    within = pd.Series([pair in levels for pair in found], index=everything.index)
    for column, values in asked.items():
        within &= everything[column].isin(values)
    return Board(
        cells=everything[within],
        everything=everything,
        settings=settings,
        methods=methods,
        categories=asked["category"],
        shots=sorted(settings["shots"]),
        draws=asked["draw"],
        conditions=conditions,
    )


def _pivot(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Values of one metric: a row for each category, a column for each draw."""
    return cells.set_index(["category", "draw"])[metric].unstack()


def _cost(cells: pd.DataFrame) -> dict[str, float]:
    """Medians over the cells; the time is also given as a multiple of the backbone's, measured in the same cell."""
    ratio = (cells["latency_ms"] / cells["backbone_ms"]).median()
    return {"latency_ratio": ratio} | {name: cells[name].median() for name in COSTS}


def _row(cells: pd.DataFrame, categories: int, draws: list[int], *, all_draws: bool) -> dict[str, Any]:
    """Mean over the categories of their means over the draws; spread of the draws' means; counts and costs.

    Args:
        cells (pd.DataFrame): Finished clean cells of one method and number of shots.
        categories (int): How many should be there.
        draws (list[int]): Those that should be there.
        all_draws (bool): Leave the categories out that lack a draw.
    """
    row: dict[str, Any] = {}
    for metric in METRICS:
        # a category without masks has no pixel metrics and is left out here, too
        table = _pivot(cells, metric).reindex(columns=draws)
        table = table.dropna(how="any" if all_draws else "all")
        row |= {metric: table.mean(axis=1).mean(), f"{metric}_std": table.mean(axis=0).std(ddof=1)}
        if metric in COUNTED:
            row[COUNTED[metric]] = len(table)
    row |= {"cells": len(cells), "expected_cells": categories * len(draws)}
    row["complete"] = row["cells"] == row["expected_cells"]
    return row | _cost(cells)


def summarize(board: Board) -> pd.DataFrame:
    """Means and spreads of the clean cells, one row for each method, number of shots and category, and their mean.

    The ``mean`` row averages, over the categories that the method has finished for all draws, the mean over the draws.
    ``<metric>_std`` is the standard deviation, over the draws, of the draws' means over those categories. A method
    with fewer cells than asked for has ``complete`` false.
    """
    rows = []
    for method, shots in product(board.methods, board.shots):
        cells = board.finished(method=method, shots=shots, condition=CLEAN)
        head = {"dataset": board.dataset, "method": method, "shots": shots}
        rows.append(head | {"category": MEAN} | _row(cells, len(board.categories), board.draws, all_draws=True))
        for category in board.categories:
            own = cells[cells["category"] == category]
            rows.append(head | {"category": category} | _row(own, 1, board.draws, all_draws=False))
    return pd.DataFrame(rows)


def interval(differences: pd.Series) -> tuple[float, float]:
    """95 % t interval of the mean difference; categories are the independent units.

    Draws of one category share their test photos, so they are averaged first: counting them as units would make the
    interval too narrow. Fewer than two categories give no interval.

    Args:
        differences (pd.Series): One for each category.
    """
    count = len(differences)
    if count < 2:
        return float("nan"), float("nan")
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * differences.std(ddof=1) / count**0.5)
    return differences.mean() - half, differences.mean() + half


def pair(board: Board) -> pd.DataFrame:
    """Differences to the baseline on the same category, shots and draw, which means on the same reference photos.

    Only cells that both have count. ``complete`` is false if there are fewer pairs than asked for; categories where
    nobody has a metric (pixel metrics without masks) are not asked for.

    Returns:
        pd.DataFrame: One row for each method, number of shots and metric: mean over the categories of the mean
            difference over the draws, its interval (:func:`interval`), and how many categories and pairs there are.
    """
    rows = []
    for shots, metric in product(board.shots, METRICS):
        clean = board.finished(shots=shots, condition=CLEAN)
        measurable = clean[metric].notna().groupby(clean["category"]).any().reindex(board.categories, fill_value=True)
        expected = int(measurable.sum()) * len(board.draws)
        baseline = _pivot(clean[clean["method"] == board.baseline], metric)
        for method in board.methods:
            if method == board.baseline:
                continue
            # cells that one of the two lacks become NaN
            difference = _pivot(clean[clean["method"] == method], metric) - baseline
            means = difference.mean(axis=1).dropna()
            low, high = interval(means)
            row = {"method": method, "baseline": board.baseline, "shots": shots, "metric": metric}
            row |= {"difference": means.mean(), "low": low, "high": high, "categories": len(means)}
            pairs = int(difference.notna().sum().sum())
            rows.append(row | {"pairs": pairs, "expected_pairs": expected, "complete": pairs >= expected})
    return pd.DataFrame(rows, columns=list(PAIRED))  # which are there without rows, too, if there is one method


def robustness(board: Board) -> pd.DataFrame:
    """Metrics against the level of each condition, in the settings' order after the clean value (no level).

    All values of a method and condition are means over the same categories and draws: those finished clean and at
    every level. So a curve shows the condition, never a change of categories.
    """
    rows = []
    keys = ["category", "draw"]
    expected = len(board.categories) * len(board.draws)
    for (condition, levels), method in product(board.conditions.items(), board.methods):
        own = board.finished(method=method, shots=board.gallery_shots)
        steps = [own[own["condition"] == CLEAN].set_index(keys)]
        steps += [own[(own["condition"] == condition) & (own["level"] == level)].set_index(keys) for level in levels]
        common = steps[0].index
        for step in steps[1:]:
            common = common.intersection(step.index)
        for level, step in zip([None, *levels], steps, strict=True):
            means = step.loc[common, list(METRICS)].groupby("category").mean().mean()
            row: dict[str, Any] = {"condition": condition, "shots": board.gallery_shots, "method": method}
            row |= {"level": level} | {metric: means[metric] for metric in METRICS}
            row |= {"cells": len(common), "expected_cells": expected}
            rows.append(row | {"complete": len(common) == expected})
    return pd.DataFrame(rows)


def failures(board: Board) -> pd.DataFrame:
    """How often each method failed with each error."""
    failed = board.cells[board.cells["status"] != "ok"].fillna({"error": "no error was recorded"})
    return failed.groupby(["method", "error"], sort=False).size().reset_index(name="cells")

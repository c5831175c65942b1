# SPDX-License-Identifier: Apache-2.0

"""The tables of a leaderboard, as text: the same ones for its Markdown and its page."""

import csv
import html
import math
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.summary import CONDITIONS, CONFIDENCE, MEAN, METRICS, TITLES, Board, failures

PUBLISHED = Path(__file__).with_name("published.csv")
# anomalib's names of data sets, and what the papers call them
PAPER_NAMES = {"Visa": "VisA", "BTech": "BTAD", "BMAD": "BraTS"}
DASH, MINUS, TIED = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
NUMBER = re.compile(r"[\d.]+")


class Entry(NamedTuple):
    """One field of a table.

    Args:
        text (str): What it says.
        value (float | None): What it is sorted by, if not by its text.
        small (str): What it says besides, less loudly.
    """

    text: str
    value: float | None = None
    small: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title (str): Its heading.
        headers (list[str]): Names of the columns.
        rows (list[list[Entry]]): A field for each column.
        words (int): Columns from the left that hold words, not figures.
    """

    title: str
    headers: list[str]
    rows: list[list[Entry]] = field(default_factory=list)
    words: int = 1


def markdown(table: Table) -> str:
    """The table in Markdown, without its title."""
    lines = [table.headers, *([f"{entry.text} {entry.small}".strip() for entry in row] for row in table.rows)]
    head, *body = [f"| {' | '.join(escape(text) for text in line)} |" for line in lines]
    rule = "---|" * table.words + "--:|" * (len(table.headers) - table.words)
    return "\n".join([head, f"|{rule}", *body])


def escape(text: str) -> str:
    """Text that Markdown shows as it is in a table."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def number(value: float, unit: float = 1) -> str:
    """Three digits are enough for a cost."""
    value /= unit
    if math.isnan(value):
        return DASH
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(value: float, spread: float = math.nan) -> Entry:
    """A fraction in per cent, with its standard deviation where there is one."""
    if math.isnan(value):
        return Entry(DASH)
    return Entry(f"{100 * value:.1f}", value, "" if math.isnan(spread) else f"± {100 * spread:.1f}")


def signed(value: float) -> str:
    """Percentage points with a sign."""
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def difference(row: dict[str, Any]) -> Entry:
    """A paired difference with its interval; how many pairs there are, if not all."""
    if math.isnan(row["difference"]):
        return Entry(DASH)
    interval = "" if math.isnan(row["low"]) else f"[{signed(row['low'])},{TIED}{signed(row['high'])}]"
    pairs = "" if row["complete"] else f"({row['pairs']} of {row['expected_pairs']} pairs)".replace(" ", TIED)
    return Entry(signed(row["difference"]), row["difference"], f"{interval} {pairs}".strip())


def why_nothing(board: Board, method: str, shots: int) -> str:
    """Why a method has no finished cell, in a few words."""
    failed = board.cells[(board.cells["method"] == method) & (board.cells["shots"] == shots)]["error"].dropna()
    return str(failed.iloc[0]).partition(" (")[0][:80] if len(failed) else "not measured yet"


def name(board: Board, row: dict[str, Any]) -> Entry:
    """A method, marked where it is incomplete."""
    categories = len(board.categories)
    if row["complete"]:
        return Entry(row["method"])
    if row["cells"] == 0:
        return Entry(row["method"], small=why_nothing(board, row["method"], row["shots"]))
    cells = f"{row['cells']} of {row['expected_cells']} cells"
    return Entry(row["method"], small=f"(partial: {cells}, mean over {row['categories']} of {categories} categories)")


def records(frame: pd.DataFrame, **values: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """The rows that hold these values in these columns."""
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return [{str(column): value for column, value in row.items()} for row in frame.to_dict("records")]


def shots_table(board: Board, summary: pd.DataFrame, paired: pd.DataFrame, shots: int) -> Table:
    """All methods with one number of reference photos; best image AUROC first, incomplete methods last."""
    rows = records(summary, category=MEAN, shots=shots)
    rows.sort(key=lambda row: (not row["complete"], -np.nan_to_num(row["image_AUROC"])))
    against = {row["method"]: difference(row) for row in records(paired, metric="image_AUROC", shots=shots)}
    costs = [("latency_ratio", 1.0), ("fit_seconds", 1.0), ("bank_bytes", 1e6), ("peak_bytes", 1e6)]
    headers = ["method", *TITLES.values(), f"image AUROC vs {board.baseline}"]
    table = Table(
        f"{shots} reference photo{'s' if shots > 1 else ''}",
        [*headers, "time / backbone", "enroll s", "bank MB", "peak MB"],
    )
    for row in rows:
        table.rows.append(
            [
                name(board, row),
                *(percent(row[metric], row[f"{metric}_std"]) for metric in METRICS),
                against.get(row["method"], Entry("baseline")),
                *(Entry(number(row[cost], unit), row[cost]) for cost, unit in costs),
            ]
        )
    return table


def paired_table(board: Board, paired: pd.DataFrame) -> Table:
    """Differences to the baseline, all metrics."""
    table = Table(
        f"Difference to {board.baseline}, points with {100 * CONFIDENCE:.0f} % interval",
        ["method", "shots", *TITLES.values()],
    )
    for method, shots in product(board.methods, board.shots):
        rows = {row["metric"]: difference(row) for row in records(paired, method=method, shots=shots)}
        if any(entry.value is not None for entry in rows.values()):
            table.rows.append([Entry(method), Entry(str(shots), shots), *(rows[metric] for metric in METRICS)])
    return table


def category_table(board: Board, summary: pd.DataFrame, metric: str, shots: int) -> Table:
    """One metric of all methods, category by category."""
    table = Table(f"{TITLES[metric]}, {shots}-shot", ["category", *board.methods])
    rows = {(row["category"], row["method"]): row for row in records(summary, shots=shots)}
    for category in (*board.categories, MEAN):
        fields = []
        for method in board.methods:
            row = rows[category, method]
            entry = percent(row[metric], row[f"{metric}_std"])
            if not row["complete"]:
                unit = "cells" if category == MEAN else "draws"
                entry = entry._replace(small=f"({row['cells']} of {row['expected_cells']} {unit})")
            fields.append(entry)
        table.rows.append([Entry(category), *fields])
    return table


def condition_tables(board: Board, robust: pd.DataFrame) -> list[Table]:
    """Image and pixel AUROC of all methods at each level, one table for each condition."""
    tables = []
    for condition, levels in board.conditions.items():
        headers = ["method", "clean", *(f"{level:g}" for level in levels)]
        table = Table(CONDITIONS.get(condition, condition), headers)
        for method in board.methods:
            rows = records(robust, condition=condition, method=method)
            first = rows[0]
            small = "" if first["complete"] else f"(partial: {first['cells']} of {first['expected_cells']} cells)"
            fields = []
            for row in rows:
                image, pixel = percent(row["image_AUROC"]), percent(row["pixel_AUROC"])
                fields.append(image._replace(small=f"/ {pixel.text}"))
            table.rows.append([Entry(method, small=small), *fields])
        tables.append(table)
    return tables


def failure_table(board: Board) -> Table:
    """How often each method failed, and why."""
    table = Table("Failed cells", ["method", "cells", "error"], words=3)
    for row in records(failures(board)):
        table.rows.append([Entry(row["method"]), Entry(str(row["cells"]), row["cells"]), Entry(row["error"])])
    return table


def published_table(dataset: str) -> tuple[Table, bool]:
    """Published figures on this data set, or else all of them.

    Args:
        dataset (str): The leaderboard's data set.

    Returns:
        tuple[Table, bool]: The table, and whether it is about this data set.
    """
    with PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["dataset"].lower() == PAPER_NAMES.get(dataset, dataset).lower()]
    shown = own or rows
    columns = [column for column in rows[0] if any(row[column] for row in shown)]
    headers = [TITLES.get(column, column.replace("_", " ")) for column in columns]
    table = Table("Published figures, not measured here", headers, words=len(headers))
    for row in shown:
        texts = [row[column] for column in columns]
        table.rows.append([Entry(text or DASH, float(text) if NUMBER.fullmatch(text) else None) for text in texts])
    return table, bool(own)

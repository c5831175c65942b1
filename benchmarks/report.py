# SPDX-License-Identifier: Apache-2.0

"""The report of a leaderboard: CSV files, Markdown, one self-contained page, and pictures.

``python -m benchmarks.report <folder>`` makes it again from the cells of a run, finished or not.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse import auto_cli

from anomalib_resad.enrollment.files import write_whole
from benchmarks.gallery import Row, draw, load_rows, save_small
from benchmarks.page import write_page
from benchmarks.plots import SHOWN, draw_cost, draw_shots
from benchmarks.protocol import DISTURBING, PAIRING, PUBLISHING, READING, extent, protocol, title, warnings
from benchmarks.summary import MEAN, Board, pair, read_board, robustness, summarize
from benchmarks.tables import (
    DASH,
    Entry,
    Table,
    category_table,
    condition_tables,
    escape,
    failure_table,
    markdown,
    paired_table,
    percent,
    published_table,
    records,
    shots_table,
)

PAGE_ROWS = 8  # photos of a category in the page's gallery
PICTURE_ROWS, PICTURE_BYTES = 8, 600_000  # of the README's gallery


def write_markdown(path: Path, board: Board, summary: pd.DataFrame, paired: pd.DataFrame, robust: pd.DataFrame) -> None:
    """Write ``leaderboard.md``."""
    parts = [f"# {escape(title(board))}", escape(extent(board)), *map(escape, warnings(board, summary)), READING]
    for shots in board.shots:
        table = shots_table(board, summary, paired, shots)
        parts += [f"## {table.title}", markdown(table)]
    table = paired_table(board, paired)
    parts += [f"## {escape(table.title)}", PAIRING, markdown(table)]
    for metric in SHOWN:
        table = category_table(board, summary, metric, board.detail_shots)
        parts += [f"## {table.title}", markdown(table)]
    if board.conditions:
        parts += ["## Robustness: image AUROC / pixel AUROC", DISTURBING]
    for table in condition_tables(board, robust):
        parts += [f"### {escape(table.title)}", markdown(table)]
    failed = failure_table(board)
    parts += [f"## {failed.title}", markdown(failed)] if failed.rows else []
    published, matches = published_table(board.dataset)
    folded = markdown(published)
    if not matches:
        folded = (
            f"<details><summary>{len(published.rows)} figures on other data sets</summary>\n\n{folded}\n\n</details>"
        )
    parts += [f"## {published.title}", PUBLISHING, folded, "## Protocol"]
    parts += ["\n".join(f"- **{term}.** {escape(text)}" for term, text in protocol(board).items())]
    write_whole(path, ("\n\n".join(parts) + "\n").encode())


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table whole; more than six decimals mean nothing."""
    write_whole(path, frame.round(6).to_csv(index=False).encode())


def write_gallery(rows: dict[str, list[Row]], methods: list[str], path: Path) -> Path | None:
    """Write the README's gallery: few rows and a small file.

    Of each category the middle one of its defective photos, not the best one, and where there is room a good photo.

    Args:
        rows (dict[str, list[Row]]): Rows by category.
        methods (list[str]): The columns.
        path (Path): PNG to write.

    Returns:
        Path | None: The picture; none without rows.
    """
    few = []
    for category, own in list(rows.items())[:PICTURE_ROWS]:
        kinds = [[row for row in own if row.defective], [row for row in own if not row.defective]]
        chosen = [kind[len(kind) // 2] for kind in kinds if kind][: 2 if 2 * len(rows) <= PICTURE_ROWS else 1]
        few += [replace(row, title=f"{category}\n{' '.join(row.title.split())}") for row in chosen]
    return save_small(draw(few, methods), path, PICTURE_BYTES) if few else None


def write_report(folder: Path) -> None:
    """Write the tables, the page and the pictures of a leaderboard beside its cells, each whole or not at all.

    Args:
        folder (Path): Folder of the leaderboard, with ``cells.jsonl``, ``settings.json`` and maybe ``maps``.

    Raises:
        FileNotFoundError: If it is no such folder.
        ValueError: If no cell is finished, or the settings do not fit.
    """
    board = read_board(folder)
    summary, paired, robust = summarize(board), pair(board), robustness(board)
    cells = board.everything.copy()
    cells["references"] = [" ".join(names) if isinstance(names, list) else "" for names in cells["references"]]
    _write_csv(folder / "results.csv", cells)
    _write_csv(folder / "summary.csv", summary)
    _write_csv(folder / "paired.csv", paired)
    if board.conditions:
        _write_csv(folder / "robustness.csv", robust)
    write_markdown(folder / "leaderboard.md", board, summary, paired, robust)
    rows = load_rows(folder / "maps", board.methods, PAGE_ROWS)
    rows = {category: rows[category] for category in board.categories if category in rows}
    drawn = [method for method in board.methods if any(method in row.overlays for own in rows.values() for row in own)]
    write_page(folder / "leaderboard.html", board, summary, paired, robust, rows, drawn)
    write_gallery(rows, drawn, folder / "gallery.png")
    draw_shots(summary, board.methods, folder / "shots.png")
    draw_cost(summary, board.methods, board.detail_shots, folder / "cost.png")


def _read_summary(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a ``summary.csv``, and the methods in their order."""
    rows = records(pd.read_csv(folder / "summary.csv"))
    return rows, list(dict.fromkeys(str(row["method"]) for row in rows))


def _image_and_pixel(row: dict[str, Any], unit: str, *, spread: bool) -> str:
    """Image and pixel AUROC, marked where cells are missing."""
    if row["cells"] == 0:
        return DASH
    parts = []
    for metric in ("image_AUROC", "pixel_AUROC"):
        entry = percent(row[metric], row[f"{metric}_std"] if spread else math.nan)
        parts.append(f"{entry.text} {entry.small}".strip())
    mark = "" if row["complete"] else f" (partial: {row['cells']} of {row['expected_cells']} {unit})"
    return f"{' / '.join(parts)}{mark}"


def readme_table(folder: Path) -> str:
    """A small Markdown table from ``summary.csv`` alone: methods, numbers of references, image AUROC / pixel AUROC.

    Args:
        folder (Path): Holds the ``summary.csv``.
    """
    rows, methods = _read_summary(folder)
    means = {(row["method"], row["shots"]): row for row in rows if row["category"] == MEAN}
    shots = sorted({count for _, count in means})
    table = Table("", ["method", *(f"{count}-shot" for count in shots)])
    for method in methods:
        fields = [Entry(_image_and_pixel(means[method, count], "cells", spread=True)) for count in shots]
        table.rows.append([Entry(method), *fields])
    return markdown(table)


def readme_categories(folder: Path, shots: int) -> str:
    """A Markdown table from ``summary.csv`` alone: categories, methods, image AUROC / pixel AUROC.

    Args:
        folder (Path): Holds the ``summary.csv``.
        shots (int): Number of reference photos.

    Raises:
        ValueError: If there are no figures for this number.
    """
    rows, methods = _read_summary(folder)
    own = {(row["category"], row["method"]): row for row in rows if row["shots"] == shots}
    if not own:
        measured = sorted({row["shots"] for row in rows})
        msg = f"shots={shots} was not measured; {folder / 'summary.csv'} has {measured}."
        raise ValueError(msg)
    table = Table("", ["category", *methods])
    for category in sorted(dict.fromkeys(category for category, _ in own), key=lambda name: name == MEAN):
        unit = "cells" if category == MEAN else "draws"
        fields = [Entry(_image_and_pixel(own[category, method], unit, spread=False)) for method in methods]
        table.rows.append([Entry(category), *fields])
    return markdown(table)


def main(folder: Path) -> None:
    """Make the report of a leaderboard again.

    Args:
        folder: Folder that a run of the leaderboard has written.
    """
    write_report(folder)
    print(readme_table(folder))
    print(f"Report: {folder / 'leaderboard.html'}, {folder / 'leaderboard.md'}")


if __name__ == "__main__":
    auto_cli(main)

# SPDX-License-Identifier: Apache-2.0

"""The page of a leaderboard: one HTML file that needs nothing but itself."""

import base64
import io
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from anomalib_resad.enrollment.files import write_whole
from benchmarks.gallery import Row, draw
from benchmarks.plots import SHOWN, inline, measured, plot_condition, plot_cost, plot_shots, style
from benchmarks.protocol import DISTURBING, PAIRING, PUBLISHING, READING, extent, protocol, title, warnings
from benchmarks.summary import CONDITIONS, TITLES, Board, without_folders
from benchmarks.tables import (
    category_table,
    condition_tables,
    failure_table,
    paired_table,
    published_table,
    shots_table,
)


class Embedded(NamedTuple):
    """A file inside the page."""

    title: str
    source: str


def _embed(title: str, content: bytes, kind: str) -> Embedded:
    return Embedded(title, f"data:{kind};base64,{base64.b64encode(content).decode()}")


def _gallery_pictures(rows: dict[str, list[Row]], methods: list[str]) -> list[Embedded]:
    """One picture for each category."""
    pictures = []
    for category, own in rows.items():
        file = io.BytesIO()
        draw(own, methods).savefig(file, format="webp", dpi=80, pil_kwargs={"quality": 80})
        pictures.append(_embed(category, file.getvalue(), "image/webp"))
    return pictures


def write_page(
    path: Path,
    board: Board,
    summary: pd.DataFrame,
    paired: pd.DataFrame,
    robust: pd.DataFrame,
    rows: dict[str, list[Row]],
    drawn: list[str],
) -> None:
    """Write ``leaderboard.html``, which needs nothing but itself.

    Args:
        path (Path): The page.
        board (Board): The leaderboard.
        summary (pd.DataFrame): As of :func:`benchmarks.summary.summarize`.
        paired (pd.DataFrame): As of :func:`benchmarks.summary.pair`.
        robust (pd.DataFrame): As of :func:`benchmarks.summary.robustness`.
        rows (dict[str, list[Row]]): Gallery by category.
        drawn (list[str]): Methods of the gallery.
    """
    methods, detail = board.methods, board.detail_shots
    plots = [
        Embedded(
            f"{TITLES[metric]} against the number of reference photos",
            inline(partial(plot_shots, summary=summary, methods=methods, metric=metric)),
        )
        for metric in SHOWN
        if summary[metric].notna().any()
    ]
    cost = f"Image AUROC against time, {detail}-shot"
    plots.append(Embedded(cost, inline(partial(plot_cost, summary=summary, methods=methods, shots=detail))))
    published, matches = published_table(board.dataset)
    names = ("results.csv", "summary.csv", "paired.csv", "robustness.csv")
    files = [path.with_name(name) for name in names if path.with_name(name).is_file()]
    shown: dict[str, Any] = {
        "title": title(board),
        "extent": extent(board),
        "warnings": warnings(board, summary),
        "reading": READING,
        "tables": [shots_table(board, summary, paired, shots) for shots in board.shots],
        "styles": [(method, *style(methods, method)[::2]) for method in measured(summary, methods)],
        "plots": plots,
        "paired": paired_table(board, paired),
        "pairing": PAIRING,
        "categories": [category_table(board, summary, metric, detail) for metric in SHOWN],
        "conditions": condition_tables(board, robust),
        "condition_plots": [
            Embedded(
                CONDITIONS.get(name, name),
                inline(partial(plot_condition, steps=robust[robust["condition"] == name], methods=methods)),
            )
            for name in board.conditions
        ],
        "disturbing": DISTURBING,
        "gallery": _gallery_pictures(rows, drawn),
        "gallery_shots": board.gallery_shots,
        "failed": failure_table(board),
        "published": published,
        "published_match": matches,
        "publishing": PUBLISHING,
        "protocol": protocol(board),
        "files": [_embed(file.name, file.read_bytes(), "text/csv") for file in files],
        "settings": without_folders(json.dumps(board.settings, indent=2, ensure_ascii=False)),
    }
    templates = FileSystemLoader(Path(__file__).parent)
    pages = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_whole(path, pages.get_template("report.html.j2").render(shown).encode())

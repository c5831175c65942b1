# SPDX-License-Identifier: Apache-2.0

"""The cells of a leaderboard: one line of JSON each, appended when a cell is finished, so that a killed run goes on."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CLEAN = "clean"


@dataclass(frozen=True)
class Cell:
    """What one measurement is about.

    Args:
        method (str): Name of the method in the leaderboard's configuration.
        dataset (str): Data set of the target.
        category (str): Target category.
        shots (int): Reference photos.
        draw (int): Seed of their draw.
        condition (str): What is done to the photos; ``"clean"`` for nothing.
        level (float | None): How strongly.
    """

    method: str
    dataset: str
    category: str
    shots: int
    draw: int
    condition: str = CLEAN
    level: float | None = None

    def __str__(self) -> str:
        """Method, category, shots, draw and condition, for progress bars and logs."""
        condition = "" if self.condition == CLEAN else f", {self.condition} {self.level:g}"
        return f"{self.method}: {self.category}, {self.shots}-shot, draw {self.draw}{condition}"


FIELDS = tuple(Cell.__dataclass_fields__)


def key(row: dict[str, Any]) -> Cell:
    """The cell that a line is about."""
    return Cell(**{field: row[field] for field in FIELDS})


def _parse(line: str) -> dict[str, Any] | None:
    """A line's content; none if a kill has torn it."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and set(FIELDS) <= row.keys() else None


def read_cells(path: Path) -> list[dict[str, Any]]:
    """Read the measured cells: of several lines about one cell the last one, torn lines left out.

    Args:
        path (Path): A ``cells.jsonl``; a missing one holds no cells.
    """
    if not path.is_file():
        return []
    rows = [row for line in path.read_text().splitlines() if (row := _parse(line)) is not None]
    return list({key(row): row for row in rows}.values())


def append_cell(path: Path, cell: Cell, figures: dict[str, Any]) -> None:
    """Append one cell, on the disk before this returns."""
    line = json.dumps(asdict(cell) | figures) + "\n"
    torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + line)
        file.flush()
        os.fsync(file.fileno())

# SPDX-License-Identifier: Apache-2.0

"""Results of a folder of photos: a map over each, and a table whose rows are on the disk as soon as they are known."""

import csv
import io
from pathlib import Path
from types import TracebackType
from typing import TextIO

from PIL import Image

from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.enrollment.files import write_whole

COLUMNS = ("photo", "score", "label", "raw_score", "error")
TABLE, MAPS = "results.csv", "maps"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would take a name for


class Results:
    """Writes the table row by row, and the maps whole.

    Args:
        folder (Path): Folder of the results; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        folder.mkdir(parents=True, exist_ok=True)
        # A mark tells spreadsheets that it is UTF-8; names that are no text keep their bytes as \\xe9.
        path = folder / TABLE
        self._file: TextIO = path.open("w", encoding="utf-8-sig", errors="backslashreplace", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._writer.writeheader()

    def __enter__(self) -> "Results":  # noqa: PYI034  # Self needs Python 3.11
        """Nothing more to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the table; its rows are there already."""
        self._file.close()

    def map_of(self, name: str) -> Path:
        """Where the map of a photo is written."""
        return self.folder / MAPS / f"{name}.png"

    def add(self, name: str, found: Prediction, picture: Image.Image) -> None:
        """Write the map of a photo, then its row.

        Args:
            name (str): The photo's path below its folder.
            found (Prediction): What was found.
            picture (Image.Image): The map over the photo.

        Raises:
            OSError: If one cannot be written; the rows before stay.
        """
        path, content = self.map_of(name), io.BytesIO()
        picture.save(content, "PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
        label = "" if found.label is None else ("anomalous" if found.label else "good")
        row = {"score": f"{found.score:.6f}", "label": label, "raw_score": f"{found.raw_score:.6f}"}
        self._write(name, row)

    def fail(self, name: str, error: str) -> None:
        """Write the row of a photo that could not be inspected; a map of an earlier run goes."""
        self.map_of(name).unlink(missing_ok=True)
        self._write(name, {"error": error})

    def _write(self, name: str, row: dict[str, str]) -> None:
        safe = f"'{name}" if name.startswith(FORMULA) else name
        self._writer.writerow({"photo": safe} | row)
        self._file.flush()
        self.count += 1

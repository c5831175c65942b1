# SPDX-License-Identifier: Apache-2.0

"""Every table of figures in README and docs is that of a committed file, which the comment above the table names."""

import json
import re
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import pytest

from benchmarks.report import readme_categories, readme_table
from benchmarks.tables import DASH
from tests.figures import EXPECTED, records

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
NO_FIGURES = "no measured figures"
RESULTS = ROOT / "benchmarks" / "results"


class Table(NamedTuple):
    """A Markdown table, and the comment right above it."""

    document: str
    marker: str | None
    text: str

    @property
    def rows(self) -> list[list[str]]:
        """Cells of each line, the second of which says how columns are aligned."""
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in self.text.strip().splitlines()]

    @property
    def figure_columns(self) -> list[int]:
        """Columns that are aligned to the right."""
        return [number for number, cell in enumerate(self.rows[1]) if cell.endswith("-:") and not cell.startswith(":")]


def tables_in(path: Path) -> list[Table]:
    found = re.findall(r"(?:^<!-- (.+) -->\n)?((?:^\|.*\n)+)", path.read_text(), re.MULTILINE)
    return [Table(path.name, marker or None, text) for marker, text in found]


def check(marker: str, table: Table) -> None:
    """Every figure of a table must be found in the file that its marker names, rounded as shown."""
    name, _, kind = marker.rpartition(": ")
    path = ROOT / name
    shots = re.fullmatch(r"(\d+)-shot by category", kind)
    if shots or kind == "by shots":
        made = readme_categories(path.parent, int(shots[1])) if shots else readme_table(path.parent)
        assert table.text.strip() == made
        settings = json.loads((path.parent / "settings.json").read_text())
        assert settings["source"] == "leave one category out"
        backbone = settings["backbone"].removeprefix("tf_efficientnet_")
        assert backbone.replace("_", "") in name.replace("v2", "v2100")
        return
    header, _, *rows = table.rows
    for cells in rows:
        for column in table.figure_columns:
            shown = re.findall(r"[-+]?\d+(?:\.\d+)?", cells[column])
            expected = EXPECTED[kind](path, cells, header[column])
            assert len(shown) == len(expected), (cells, header[column], expected)
            assert expected or cells[column] == DASH, "a figure that there is none of"
            for text, value in zip(shown, expected, strict=True):
                half = 0.5 * 10 ** -len(text.partition(".")[2])
                assert abs(float(text) - value) <= half + 1e-9, (cells, header[column], expected)


TABLES = [table for path in DOCUMENTS for table in tables_in(path)]
MEASURED = [table for table in TABLES if table.marker not in (None, NO_FIGURES)]


def test_tables_are_found() -> None:
    kinds = {str(table.marker).rpartition(": ")[2] for table in MEASURED}
    assert kinds == {*EXPECTED, "by shots", "4-shot by category", "8-shot by category"}
    lines = [line for path in DOCUMENTS for line in path.read_text().splitlines()]
    assert len(TABLES) == len([line for line in lines if re.fullmatch(r"\|[-:| ]+\|", line)])


def check_marker(table: Table) -> None:
    """A table without a marker has no figure at all; one that says it has no measured ones is not laid out for them."""
    if table.marker is None:
        plain = re.sub(r"`[^`]*`|\]\([^)]*\)", "", table.text)
        assert not re.search(r"\d", plain), "figures need a marker that names their file"
    if table.marker in (None, NO_FIGURES):
        assert not table.figure_columns
        assert "±" not in table.text


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table.document}-{table.rows[0][:2]}")
def test_tables_with_figures_name_their_file(table: Table) -> None:
    check_marker(table)


@pytest.mark.parametrize(
    ("marker", "text"),
    [(None, "| a |\n|---|\n| 81.5 |\n"), (None, "| a |\n|--:|\n| a |\n"), (NO_FIGURES, "| a |\n|--:|\n| 81.5 |\n")],
)
def test_figures_without_a_file_are_found(marker: str | None, text: str) -> None:
    with pytest.raises(AssertionError):
        check_marker(Table("some.md", marker, text))


@pytest.mark.parametrize("table", MEASURED, ids=lambda table: f"{table.document}-{table.marker}")
def test_figures_are_those_of_the_files(table: Table) -> None:
    assert table.marker is not None
    check(table.marker, table)
    last = re.search(r"\d(?=\D*\Z)", table.text)
    assert last is not None
    changed = table.text[: last.start()] + str((int(last[0]) + 2) % 10) + table.text[last.end() :]
    with pytest.raises(AssertionError):
        check(table.marker, table._replace(text=changed))


def test_parity_figures() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    for start, name in (("Exported (ResNet-18", "parity"), ("Rotated products (", "parity_(rotated|turned)")):
        sentence = " ".join(text[text.index(start) :].split("\n\n")[0].split())
        (path,) = [path for path in ROOT.glob("benchmarks/results/edge/*.json") if re.fullmatch(name, path.stem)]
        assert path.relative_to(ROOT).as_posix() in sentence
        parity = json.loads(path.read_text())
        rows, photos = parity["rows"], len(parity["photos"])
        keys = {"OpenVINO FP32": ("score_max", "map_max"), "OpenVINO FP16": ("score_max", "map_max")}
        keys["OpenVINO INT8"] = ("score_max", "map_max")
        if name == "parity":
            keys |= {"ONNX": ("score_max",), "OpenVINO FP32": ("score_max", "map_mean", "map_max")}
        for runtime, figures in keys.items():
            for key in figures:
                assert f"{rows[runtime][key]:.1g}" in sentence, (runtime, key)
            changed = round((1 - rows[runtime]["same_labels"]) * photos)
            assert changed == 0 or (changed == 1 and f"one label of {photos}" in sentence), runtime


def prose(name: str) -> str:
    return " ".join((ROOT / "docs" / name).read_text().split())


def test_differences_in_prose() -> None:
    """Those of the second training."""
    text, folder = prose("results.md"), RESULTS / "shared_resnet18"
    rows = [row for row in records(folder / "summary.csv") if row["category"] == "mean"]
    trainings = [[row for row in rows if row["method"] == name] for name in ("ResAD", "ResAD, second training")]
    keys = ("image_AUROC", "pixel_AUROC")
    most = max(abs(float(one[key]) - float(other[key])) for one, other in zip(*trainings, strict=True) for key in keys)
    assert f"differs from the first by {100 * most:.1f} points at most" in text


def test_other_figures_in_prose() -> None:
    training = records(RESULTS / "training" / "training.csv")
    kept = [float(row["seconds"]) for row in training if row["cache_gb"] == "4"][1:]
    computed = [float(row["seconds"]) for row in training if row["cache_gb"] == "0"][:-1]
    said = f"training runs {60 / mean(kept):.0f} epochs per minute; without them, {60 / mean(computed):.1f}."
    assert said in prose("results.md")
    settings = json.loads((RESULTS / "training" / "training.json").read_text())
    assert f"four products, {settings['images']} images" in prose("results.md")
    rates = [row for row in records(RESULTS / "threshold/shared_resnet18/summary.csv") if row["rule"] == "calibrated"]
    worst = max(rates, key=lambda row: float(row["false_alarm_rate"]) - float(row["rate"]))
    rate, target = (100 * float(worst[key]) for key in ("false_alarm_rate", "rate"))
    assert f"the worst case is {rate:.1f} % for a target of {target:.0f} %" in prose("thresholds.md")

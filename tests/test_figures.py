# SPDX-License-Identifier: Apache-2.0

"""Every table of figures in README and docs is that of a committed file, which the comment above the table names."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import pytest
from scipy.stats import t as student

from benchmarks.report import readme_categories, readme_table

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


def records(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def the(rows: list[dict[str, str]], **wanted: str) -> dict[str, str]:
    """The only row with these values, which are regular expressions."""
    (row,) = [row for row in rows if all(re.fullmatch(value, row[key]) for key, value in wanted.items())]
    return row


def number_of(text: str) -> str:
    return re.sub(r"\D", "", text)


def points_above(path: Path, cells: list[str], column: str) -> list[float]:
    rows, metric = records(path), cells[1].replace(" ", "_")
    means = [
        the(rows, method=re.escape(name), shots=number_of(column), category="mean")[metric]
        for name in ("ResAD", cells[0])
    ]
    return [100 * (float(means[0]) - float(means[1]))]


def time_over_backbone(path: Path, cells: list[str], column: str) -> list[float]:
    row = the(records(path), method=re.escape(cells[0]), shots=number_of(column), category="mean")
    return [float(row["latency_ratio"])]


def rule_of_threshold(path: Path, cells: list[str], column: str) -> list[float]:
    rules = {"the product's own": "calibrated", "stored": "stored", "best": "best possible", "anomalib's": "anomalib.*"}
    (rule,) = [rule for label, rule in rules.items() if cells[0].startswith(label)]
    percent = re.search(r"(\d+) %", cells[0])
    rate = f"{int(percent[1]) / 100:.4f}" if percent else "0.0000"
    row = the(records(path), shots=number_of(column), rule=rule, rate=rate)
    return [100 * float(row[key]) for key in ("false_alarm_rate", "recall", "F1")]


RUNTIMES = {
    "PyTorch": "torch",
    "OpenVINO float32": "openvino f32",
    "OpenVINO bfloat16": "openvino bf16",
    "OpenVINO 8 bits": "openvino int8",
}
ITEMS = {
    "the default": "fused",
    "the same": "fused, (rotated|turned) product",
    "Patchcore, a tenth": "Patchcore 0.1",
    "Patchcore, all": "Patchcore 1",
    "`resad`": "resad",
    "`resad++`": r"resad\+\+",
}
BACKBONES = {"ResNet-18": "resnet18", "WideResNet50": "wide_resnet50_2"}


def cost_over_backbone(path: Path, cells: list[str], column: str) -> list[float]:
    said = f"{cells[0]}, {column}"
    (runtime,) = [name for label, name in RUNTIMES.items() if label in said]
    item = [name for label, name in ITEMS.items() if cells[0].startswith(label)][-1]
    row = the(
        records(path),
        backbone=BACKBONES[column.partition(":")[0]],
        runtime=runtime,
        batch="8" if "batches of 8" in said else "1",
        item=f"{item}: whole" if runtime == "torch" else item,
    )
    return [float(row["ratio"])]


def training_by_epoch(path: Path, cells: list[str], column: str) -> list[float]:
    epoch = str(int(number_of(column)) - 1)
    kept, computed = (the(records(path), cache_gb=size, epoch=epoch) for size in ("4", "0"))
    if cells[0] == "loss of both":
        assert kept["loss"] == computed["loss"]
        return [float(kept["loss"])]
    return [float((kept if cells[0] == "features kept" else computed)["seconds"])]


ON_THE_EDGE = {
    "enroll, s": "enroll_s",
    "enroll for the first time, s": "enroll_first_s",
    "enroll with `rotations=1`, s": "enroll_plain_s",
    "enroll rotated photos, s": "enroll_(rotated|turned)_s",
    "one photo, ms": "photo_ms",
    "one photo over the encoder alone": "ratio",
    "one photo with Patchcore, same backbone and references, ms": "patchcore_ms",
    "bundle, MB": "bundle_mb",
    "bank, MB": "bank_mb",
}


def on_the_edge(path: Path, cells: list[str], column: str) -> list[float]:
    result: dict[str, Any] = json.loads(path.read_text())["results"][BACKBONES[column]]
    if cells[0] == "rows that are searched with `max_patches=1000`, MB":
        return [each["bank_mb"] for each in result["coreset"] if each["max_patches"] == 1000]
    return [value for key, value in result.items() if re.fullmatch(ON_THE_EDGE[cells[0]], key)]


def memory_by_sizes(path: Path, cells: list[str], column: str) -> list[float]:
    keeps = "5000" if "default" in cells[0] else "64"
    return [float(the(records(path), keeps=keeps, sizes=number_of(column))["megabytes"])]


def on_a_new_device(path: Path, cells: list[str], _: str) -> list[float]:
    result: dict[str, Any] = json.loads(path.read_text())
    sizes = {each["name"]: each["mb"] for each in result["packages"]}
    figures = {
        "the wheel, MB": result["wheel_mb"],
        "all that is installed, MB": result["packages_mb"],
        "OpenVINO in it, MB": sizes["openvino"],
        "install, s": result["seconds"]["install"],
        "enroll, s": result["seconds"]["enroll"],
        "inspect one photo, s": result["seconds"]["inspect"],
    }
    return [figures[cells[0]]]


def by_consumer(path: Path, cells: list[str], column: str) -> list[float]:
    row = the(records(path), who=re.escape(cells[0]))
    if column == "same labels":
        return [float(row["same_labels"])]
    return [1e7 * float(row["from_evaluation" if "evaluation" in column else "from_edge"])]


def share_that_moved(path: Path, cells: list[str], column: str) -> list[float]:
    what, shift = re.fullmatch(r"(\w+)(?: by (\d+) %)?", cells[0]).groups()  # type: ignore[union-attr]
    apart = "composite" in column
    rows = [
        row
        for row in records(path)
        if (row["what"], float(row["shift"])) == (what, int(shift or 0) / 100)
        and row["told"] == "True"
        and (row["product"] == "composite_layup") == apart
    ]
    photos, moved = (sum(int(row[name]) for row in rows) for name in ("photos", "moved"))
    return [photos if column == "how many" else 100 * moved / photos]


SHARES = {
    "false alarms": "false_alarm_rate",
    "defects found": "recall",
    "of these shown": "shown",
    "good photos shown": "good_shown",
    "pixel F1": "pixel_F1",
}


def thresholds_of_a_ready_head(path: Path, cells: list[str], column: str) -> list[float]:
    photos, _, target = cells[0].partition(",")
    row = the(records(path), shots=photos, rule="calibrated", rate=f"{int(number_of(target)) / 100:.4f}")
    return [100 * float(row[SHARES[column]])]


EXPECTED: dict[str, Callable[[Path, list[str], str], list[float]]] = {
    "points of ResAD above": points_above,
    "time over the backbone": time_over_backbone,
    "false alarms / found / F1": rule_of_threshold,
    "thresholds of a ready head": thresholds_of_a_ready_head,
    "one photo over the backbone": cost_over_backbone,
    "other precisions and batches": cost_over_backbone,
    "seconds by epoch": training_by_epoch,
    "by backbone": on_the_edge,
    "on a new device": on_a_new_device,
    "megabytes by sizes": memory_by_sizes,
    "by consumer": by_consumer,
    "share that moved": share_that_moved,
}


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
            assert len(shown) == len(expected) > 0, (cells, header[column], expected)
            for text, value in zip(shown, expected, strict=True):
                half = 0.5 * 10 ** -len(text.partition(".")[2])
                assert abs(float(text) - value) <= half + 1e-9, (cells, header[column], expected)


TABLES = [table for path in DOCUMENTS for table in tables_in(path)]
MEASURED = [table for table in TABLES if table.marker not in (None, NO_FIGURES)]


def test_tables_are_found() -> None:
    kinds = {str(table.marker).rpartition(": ")[2] for table in MEASURED}
    assert kinds == {*EXPECTED, "by shots", "4-shot by category"}
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
    """Those of the second training, and the intervals of two differences."""
    text, folder = prose("results.md"), RESULTS / "shared_resnet18"
    rows = [row for row in records(folder / "summary.csv") if row["category"] == "mean"]
    trainings = [[row for row in rows if row["method"] == name] for name in ("ResAD", "ResAD, second training")]
    keys = ("image_AUROC", "pixel_AUROC")
    most = max(abs(float(one[key]) - float(other[key])) for one, other in zip(*trainings, strict=True) for key in keys)
    assert f"differs from the first by {100 * most:.1f} points at most" in text
    pair = the(records(folder / "paired.csv"), method="ResAD", baseline="Patchcore", shots="4", metric="image_AUROC")
    assert f"from {100 * float(pair['low']):+.1f} to {100 * float(pair['high']):+.1f} above Patchcore" in text
    cells = [row for row in records(folder / "results.csv") if row["shots"] == "4"]
    scores = {
        (name, category): mean(
            float(row["image_AUROC"]) for row in cells if (row["method"], row["category"]) == (name, category)
        )
        for name in ("ResAD", "its distance")
        for category in {row["category"] for row in cells}
    }
    differences = [
        score - scores["its distance", category] for (name, category), score in scores.items() if name == "ResAD"
    ]
    reach = stdev(differences) / len(differences) ** 0.5 * student.ppf(0.975, len(differences) - 1)
    low, high = (100 * (mean(differences) + sign * reach) for sign in (-1, 1))
    assert f"from {low:+.1f} to {high:+.1f} above its distance" in text


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

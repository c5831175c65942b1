# SPDX-License-Identifier: Apache-2.0

"""The report of a leaderboard says what its cells say: exact means, marked gaps, and nothing from elsewhere."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.report import readme_categories, readme_table, write_report
from benchmarks.summary import METRICS, interval, pair, read_board, robustness, summarize, without_folders
from benchmarks.tables import PUBLISHED, published_table, shots_table
from tests.conftest import SHARED

BASE, NEW, PARTIAL = "Base", 'New <i>"$&', "Partial|x"
# image AUROC of the draws 0 and 1 in the categories pill and tile
FIGURES: dict[str, dict[str, tuple[float | None, float | None]]] = {
    BASE: {"pill": (0.70, 0.80), "tile": (0.60, 0.60)},
    NEW: {"pill": (0.80, 0.86), "tile": (0.64, 0.66)},
    PARTIAL: {"pill": (0.90, 0.90), "tile": (0.10, None)},
}
SETTINGS: dict[str, Any] = {
    "dataset": "ProductFolder",
    "categories": ["pill", "tile"],
    "source": "leave one category out",
    "methods": {BASE: {}, NEW: {"init_args": {"weights": "/srv/models/net.pth"}}, PARTIAL: {}},
    "shots": [2],
    "draws": 2,
    "backbone": "resnet18",
    "weights": "net.pth",
    "image_size": [32, 32],
    "baseline": BASE,
    "gallery_shots": 2,
    "conditions": {"noise": [0.1]},
    "seed": 0,
    "versions": {"anomalib": "2.7.0"},
    "device": "cpu",
}


def cell(method: str, category: str, draw: int, value: float | None, **changes: Any) -> dict[str, Any]:
    row = {"method": method, "dataset": "ProductFolder", "category": category, "shots": 2, "draw": draw}
    row |= {"condition": "clean", "level": None, "status": "ok", "error": None, "references": ["a.png", "b.png"]}
    row |= dict.fromkeys(METRICS, value)
    if category == "tile":  # has no masks
        row |= dict.fromkeys(("pixel_AUROC", "pixel_AP", "pixel_F1", "AUPRO"))
    row |= {"latency_ms": 30.0 if method == NEW else 10.0, "backbone_ms": 10.0, "fit_seconds": 0.5}
    row |= {"bank_bytes": 2_000_000, "peak_bytes": 5_000_000, "test_images": 10, "seconds": 1.0}
    if value is None:
        row |= dict.fromkeys((*METRICS, "latency_ms", "backbone_ms", "fit_seconds", "bank_bytes", "peak_bytes"))
        row |= {"status": "failed", "error": "FileNotFoundError: /srv/models/net.pth is not there"}
    return row | changes


def cells() -> list[dict[str, Any]]:
    return [
        cell(method, category, draw, value)
        for method, categories in FIGURES.items()
        for category, values in categories.items()
        for draw, value in enumerate(values)
    ]


def noisy() -> list[dict[str, Any]]:
    """New is measured with noise too, but for tile's draw 1; a cell that settings no longer ask for."""
    found = [("pill", 0, 0.5), ("pill", 1, 0.6), ("tile", 0, 0.3)]
    rows = [cell(NEW, category, draw, value, condition="noise", level=0.1) for category, draw, value in found]
    return [*rows, cell(BASE, "pill", 7, 0.0)]


def write_folder(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    return folder


def write_maps(folder: Path, photos: Path) -> None:
    """Maps of a good and a defective photo, of which the latter is gone."""
    (folder / "maps").mkdir()
    (photos / "good").mkdir(parents=True)
    Image.new("RGB", (40, 30), "gray").save(photos / "good" / "000.png")
    for index, method in enumerate((BASE, NEW)):
        np.savez_compressed(
            folder / "maps" / f"{index}--pill.npz",
            method=np.array(method),
            category=np.array("pill"),
            paths=np.array([str(photos / "good" / "000.png"), str(photos / "crack" / "001.png")]),
            labels=np.array([0, 1]),
            scores=np.array([0.25, 0.75], dtype=np.float32),
            maps=np.random.default_rng(index).random((2, 32, 32)).astype(np.float16),
            masks=np.zeros((2, 32, 32), dtype=np.uint8),
            low=np.array(0.5),
            high=np.array(1.0),
        )
    (folder / "maps" / "torn.part.npz").write_bytes(b"torn")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("leaderboard"), [*cells(), *noisy()])
    write_maps(folder, tmp_path_factory.mktemp("photos"))
    write_report(folder)
    return folder


def rows_of(frame: pd.DataFrame, **values: Any) -> dict[str, Any]:
    for column, value in values.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0].to_dict()


def test_means_and_spreads(tmp_path: Path) -> None:
    summary = summarize(read_board(write_folder(tmp_path, cells())))
    row = rows_of(summary, method=NEW, category="mean")
    assert row["image_AUROC"] == pytest.approx((0.83 + 0.65) / 2)
    assert row["image_AUROC_std"] == pytest.approx(0.04 / 2**0.5)  # of the draws' means 0.72 and 0.76
    assert row["pixel_AUROC"] == pytest.approx(0.83)
    assert (row["categories"], row["masked_categories"], row["cells"], row["expected_cells"]) == (2, 1, 4, 4)
    assert (row["latency_ratio"], row["fit_seconds"], row["bank_bytes"], row["complete"]) == (3, 0.5, 2e6, True)
    own = rows_of(summary, method=NEW, category="tile")
    assert own["image_AUROC"] == pytest.approx(0.65)
    assert own["image_AUROC_std"] == pytest.approx(0.02 / 2**0.5)


def test_paired_difference_and_interval(tmp_path: Path) -> None:
    board = read_board(write_folder(tmp_path, cells()))
    row = rows_of(pair(board), method=NEW, metric="image_AUROC")
    # 0.08 in pill, 0.05 in tile; half the interval is t(0.975, 1) = 12.7062 times 0.03 / sqrt(2) / sqrt(2)
    assert row["difference"] == pytest.approx(0.065)
    assert (row["low"], row["high"]) == pytest.approx((0.065 - 0.190593, 0.065 + 0.190593), abs=1e-6)
    assert (row["pairs"], row["expected_pairs"], row["complete"]) == (4, 4, True)
    pixel = rows_of(pair(board), method=NEW, metric="pixel_AUROC")
    assert np.isnan(pixel["low"])  # one category gives no interval
    assert (pixel["pairs"], pixel["expected_pairs"], pixel["complete"]) == (2, 2, True)
    assert all(np.isnan(bound) for bound in interval(pd.Series([0.1])))


def test_gaps_are_marked_and_never_averaged(tmp_path: Path) -> None:
    board = read_board(write_folder(tmp_path, cells()))
    summary, paired = summarize(board), pair(board)
    row = rows_of(summary, method=PARTIAL, category="mean")
    assert row["image_AUROC"] == pytest.approx(0.9)  # tile lacks a draw
    assert (row["categories"], row["cells"], row["expected_cells"], row["complete"]) == (1, 3, 4, False)
    difference = rows_of(paired, method=PARTIAL, metric="image_AUROC")
    assert difference["difference"] == pytest.approx((0.15 - 0.5) / 2)
    assert (difference["pairs"], difference["expected_pairs"], difference["complete"]) == (3, 4, False)
    table = shots_table(board, summary, paired, 2)
    assert [line[0].text for line in table.rows] == [NEW, BASE, PARTIAL]  # the incomplete one last, though highest
    assert table.rows[-1][0].small == "(partial: 3 of 4 cells, mean over 1 of 2 categories)"
    assert "(3\N{NO-BREAK SPACE}of" in table.rows[-1][8].small


def test_conditions_compare_the_same_cells(tmp_path: Path) -> None:
    board = read_board(write_folder(tmp_path, [*cells(), *noisy()]))
    robust = robustness(board)
    clean, noise = (robust[robust["method"] == NEW].iloc[index] for index in (0, 1))
    assert np.isnan(clean["level"])
    assert clean["image_AUROC"] == pytest.approx((0.83 + 0.64) / 2)  # without tile's draw 1
    assert noise["image_AUROC"] == pytest.approx((0.55 + 0.3) / 2)
    assert (noise["cells"], noise["expected_cells"], noise["complete"]) == (3, 4, False)
    assert rows_of(summarize(board), method=NEW, category="mean")["cells"] == 4  # in no clean mean


def test_torn_and_repeated_lines(tmp_path: Path) -> None:
    first = [cell(NEW, "pill", 0, None), *cells()]
    folder = write_folder(tmp_path, first)
    with (folder / "cells.jsonl").open("a") as file:
        file.write(json.dumps(cell(NEW, "pill", 0, 0.9))[:70])
    board = read_board(folder)
    assert len(board.cells) == len(cells())
    assert rows_of(summarize(board), method=NEW, category="mean")["image_AUROC"] == pytest.approx(0.74)


def test_one_method_is_compared_with_none(tmp_path: Path) -> None:
    own = [each for each in cells() if each["method"] == BASE]
    write_report(write_folder(tmp_path, own, methods={BASE: {}}, conditions={}))
    assert "| pill | 75.0" in (tmp_path / "leaderboard.md").read_text()
    assert pd.read_csv(tmp_path / "paired.csv").empty


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cells\.jsonl is not there"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no finished cell and 1 failed ones, the first one with"):
        write_report(write_folder(tmp_path, [cell(NEW, "pill", 0, None)]))
    with pytest.raises(ValueError, match="baseline 'Nobody' is none of the methods"):
        write_report(write_folder(tmp_path, cells(), baseline="Nobody"))
    with pytest.raises(ValueError, match=r"several data sets, \['MVTecAD', 'ProductFolder'\]"):
        write_report(write_folder(tmp_path, [*cells(), cell(NEW, "a", 0, 0.5, dataset="MVTecAD")]))


def test_the_page_needs_nothing_but_itself(report: Path) -> None:
    page = (report / "leaderboard.html").read_text()
    targets = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']?([^"'\s>]*)""", page)
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert not re.search(r"""(?:url\(|@import|https?://)""", page)
    assert "New <i>" not in page
    assert "New &lt;i&gt;" in page
    assert "3 of 4 cells" in page
    assert "image/webp" in page
    assert "since the settings have changed: 1 cell," in page


def test_failed_cells_are_listed(report: Path) -> None:
    line = "| Partial\\|x | 1 | FileNotFoundError: …/net.pth is not there |"
    assert line in (report / "leaderboard.md").read_text()
    assert "FileNotFoundError: …/net.pth is not there" in (report / "leaderboard.html").read_text()


def test_no_paths_of_this_machine(report: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = str(tmp_path_factory.getbasetemp())
    for name in ("results.csv", "summary.csv", "paired.csv", "leaderboard.md", "leaderboard.html"):
        text = (report / name).read_text()
        assert base not in text, name
        assert "/srv/" not in text, name
    assert without_folders("see ~/a/b.pth or https://x.org/y/z") == "see …/b.pth or https://x.org/y/z"


def test_files_are_whole(report: Path) -> None:
    names = {path.name for path in report.iterdir()}
    assert {
        "results.csv",
        "summary.csv",
        "paired.csv",
        "robustness.csv",
        "shots.png",
        "cost.png",
        "gallery.png",
    } <= names
    assert not [name for name in names if ".part" in name]
    with (report / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells()) + len(noisy())
    assert rows[0]["references"] == "a.png b.png"


def test_gallery(report: Path) -> None:
    with Image.open(report / "gallery.png") as picture:
        width, height = picture.size
    assert width > 1.5 * height  # four columns, two rows
    assert (report / "gallery.png").stat().st_size < 600_000


def test_readme_tables_come_from_the_summary_alone(report: Path, tmp_path: Path) -> None:
    shutil.copy(report / "summary.csv", tmp_path)
    table = readme_table(tmp_path)
    assert table.splitlines()[0] == "| method | 2-shot |"
    assert '| New &lt;i&gt;"$&amp; | 74.0 ± 2.8 / 83.0 ± 4.2 |' in table
    assert "| Partial\\|x | 90.0 ± 0.0 / 90.0 ± 0.0 (partial: 3 of 4 cells) |" in table
    lines = readme_categories(tmp_path, 2).splitlines()
    assert lines[2:] == [
        "| pill | 75.0 / 75.0 | 83.0 / 83.0 | 90.0 / 90.0 |",
        "| tile | 60.0 / \N{EN DASH} | 65.0 / \N{EN DASH} | 10.0 / \N{EN DASH} (partial: 1 of 2 draws) |",
        "| mean | 67.5 / 75.0 | 74.0 / 83.0 | 90.0 / 90.0 (partial: 3 of 4 cells) |",
    ]
    with pytest.raises(ValueError, match=r"shots=8 was not measured; .* has \[2\]"):
        readme_categories(tmp_path, 8)


def published() -> list[dict[str, str]]:
    with PUBLISHED.open(newline="") as file:
        return list(csv.DictReader(file))


def test_published_figures() -> None:
    figures = {
        (row["method"], row["dataset"], row["shots"]): (row["image_AUROC"], row["pixel_AUROC"]) for row in published()
    }
    assert len(figures) == len(published())
    assert figures["ResAD", "MVTecAD", "4"] == ("90.5", "95.7")
    assert figures["ResAD", "VisA", "2"] == ("79.9", "96.4")
    assert figures["ResAD++", "MVTec3D", "4"] == ("72.0", "97.7")
    assert figures["InCTRL", "BTAD", "4"] == ("91.7", "")
    assert figures["ResAD†", "ShanghaiTech", "2"] == ("82.4", "91.9")
    assert figures["AdaptCLIP", "VisA", "1"] == ("92.0", "")
    # known from notes only, not checked against the papers
    notes = {"PromptAD", "AnomalyDINO", "UniVAD", "DictAS", "NAGL", "HNQ-GAD", "FoundAD", "SubspaceAD", "DCP-SFR"}
    assert not notes & {method for method, _, _ in figures}
    assert ("ResAD", "MVTecAD", "1") not in figures
    assert "note" not in PUBLISHED.read_text()


@pytest.mark.skipif(not (SHARED / "reference" / "results.md").is_file(), reason="no shared folder beside the checkout")
def test_published_figures_are_those_of_table_1() -> None:
    text = (SHARED / "reference" / "results.md").read_text().split("| K | dataset |")[1].split("\nNote")[0]
    header, _, *lines = [[part.strip() for part in line.strip("| ").split("|")] for line in text.splitlines()]
    expected = {
        (method.split(" (")[0], line[1], line[0]): figures.replace("-", "")
        for line in lines
        if not line[1].startswith("avg")
        for method, figures in zip(header, line[2:], strict=True)
    }
    found = {
        (row["method"], row["dataset"], row["shots"]): f"{row['image_AUROC']}/{row['pixel_AUROC']}"
        for row in published()
        if row["source"].endswith("Table 1")
    }
    assert found == expected


def test_published_figures_are_in_no_mean(tmp_path: Path) -> None:
    ours = [row | {"dataset": "Visa"} for row in cells()]
    board = read_board(write_folder(tmp_path, ours, dataset="Visa"))
    assert set(summarize(board)["method"]) == set(SETTINGS["methods"])
    assert set(pair(board)["method"]) == {NEW, PARTIAL}
    table, matches = published_table("Visa")
    assert matches
    assert {row[1].text for row in table.rows} == {"VisA"}
    table, matches = published_table("ProductFolder")
    assert not matches
    assert len(table.rows) == len(published())

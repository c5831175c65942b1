# SPDX-License-Identifier: Apache-2.0

"""What `resad predict` leaves behind: rows as they come, also where it is stopped or cannot write."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad.deploy import Prediction, ResADInferencer
from anomalib_resad.deploy.results import COLUMNS, Results
from tests.test_edge_commands import resad

FOUND = Prediction(0.7, True, np.zeros((4, 4), np.float32), 1.5)
PICTURE = Image.new("RGB", (8, 8))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def enrolled(bundle: Path, good: list[Path], tmp_path: Path) -> tuple[object, ...]:
    ResADInferencer(bundle, banks=tmp_path / "banks").enroll("tiles", good[:1], rotations=1)
    return ("predict", "--bundle", bundle, "--banks", tmp_path / "banks", "--product", "tiles")


def test_rows_are_there_before_the_end(tmp_path: Path) -> None:
    with Results(tmp_path) as results:
        results.add("a.png", FOUND, PICTURE)
        assert [row["photo"] for row in rows(tmp_path)] == ["a.png"]
        results.fail("b/c.png", "unreadable")
        found = rows(tmp_path)
    assert tuple(found[0]) == COLUMNS
    assert found[0]["label"] == "anomalous"
    assert (found[1]["photo"], found[1]["error"]) == ("b/c.png", "unreadable")
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["a.png.png"]


def test_a_photo_that_fails_keeps_no_map_of_an_earlier_run(tmp_path: Path) -> None:
    with Results(tmp_path) as results:
        results.add("a.png", FOUND, PICTURE)
    with Results(tmp_path) as results:
        results.fail("a.png", "unreadable")
    assert not list((tmp_path / "maps").iterdir())


def test_names_are_safe_in_a_spreadsheet(tmp_path: Path) -> None:
    names = ["=1+1.png", "+x.png", "-x.png", "@x.png", "Prüfteil.png", "产品.png"]
    latin = b"caf\xe9.png".decode("utf8", "surrogateescape")
    with Results(tmp_path) as results:
        for name in [*names, latin]:
            results.fail(name, "")
    written = [row["photo"] for row in rows(tmp_path)]
    assert written == ["'=1+1.png", "'+x.png", "'-x.png", "'@x.png", "Prüfteil.png", "产品.png", "caf\\udce9.png"]
    assert (tmp_path / "results.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "spreadsheets see that it is UTF-8"


def test_its_own_output_is_not_inspected(enrolled: tuple[object, ...], good: list[Path], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(good[1], photos / "a.png")
    for _ in range(2):
        assert "1 of 1 photos inspected" in resad(*enrolled, "--photos", photos, "--output", photos / "found")


def test_an_interrupted_run_keeps_its_rows(enrolled: tuple[object, ...], good: list[Path], tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "found"
    photos.mkdir()
    shutil.copy(good[1], tmp_path / "a.png")
    for number in range(3000):
        os.link(tmp_path / "a.png", photos / f"{number}.png")
    command = [sys.executable, "-m", "anomalib_resad.cli", *enrolled, "--photos", photos, "--output", output]
    words = [str(each) for each in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and not ((output / "results.csv").exists() and len(rows(output)) > 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in said
    found = rows(output)
    assert 0 < len(found) < 3000
    assert f"it was interrupted. {len(found)} of 3000 rows" in " ".join(said.split())
    assert len(list((output / "maps").glob("*.png"))) in (len(found), len(found) + 1)


def test_a_folder_that_cannot_be_made_is_one_sentence(
    enrolled: tuple[object, ...], good: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    said = resad(*enrolled, "--photos", good[1], "--output", tmp_path / "file" / "found", status=2)
    assert said.startswith("Error:")
    assert "Traceback" not in said

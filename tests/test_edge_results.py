# SPDX-License-Identifier: Apache-2.0

"""What `resad predict` leaves behind: rows as they come, also where it is stopped or cannot write."""

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad import cli
from anomalib_resad.deploy import Prediction, ResADInferencer
from anomalib_resad.deploy import results as results_module
from anomalib_resad.deploy.results import Results
from anomalib_resad.enrollment.files import HEADER
from anomalib_resad.enrollment.photos import PhotoError, list_photos
from tests.conftest import SHARED
from tests.photo_cases import shared
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
    assert list(found[0]) == HEADER.split(",")
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
    names = ["=1+1.png", "+x.png", "-x.png", "@x.png", "\tx.png", "Prüfteil.png", "产品.png", "a;=1+1.png", 'a",=b.png']
    latin = b"caf\xe9.png".decode("utf8", "surrogateescape")
    with Results(tmp_path) as results:
        for name in [*names, latin]:
            results.fail(name, f"{name}: unreadable")
        results.add("negative.png", Prediction(0.2, False, FOUND.map, -1.5), PICTURE)
    *_, negative = rows(tmp_path)
    assert float(negative["raw_score"]) == -1.5, "a number is no formula"
    written = [row["photo"] for row in rows(tmp_path)][:-1]
    assert written == [*(f"'{name}" for name in names[:5]), *names[5:], "caf\\udce9.png"]
    assert [row["error"] for row in rows(tmp_path)][:-1] == [f"{name}: unreadable" for name in written]
    lines = (tmp_path / "results.csv").read_text("utf-8-sig").splitlines()
    assert '"a;=1+1.png","","","","a;=1+1.png: unreadable"' in lines, "quoted, where others separate by semicolons"
    assert (tmp_path / "results.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "spreadsheets see that it is UTF-8"


def test_its_own_output_is_not_inspected(enrolled: tuple[object, ...], good: list[Path], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(good[1], photos / "a.png")
    for _ in range(2):
        assert "1 of 1 photos inspected" in resad(*enrolled, "--photos", photos, "--output", photos / "found")


def test_maps_of_any_earlier_run_are_no_photos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also to be enrolled: they show defects. A folder that is only called so is one of photos."""
    for name in ("a.png", "maps/b.png", "lot/maps/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(tmp_path / name)
    (tmp_path / "lot" / "results.csv").write_text("another,table")
    with Results(tmp_path / "monday" / "found") as results:
        results.add("lot/a.png", FOUND, PICTURE)
    assert [path.relative_to(tmp_path).as_posix() for path in list_photos(tmp_path)] == [
        "a.png",
        "lot/maps/c.png",
        "maps/b.png",
    ]
    assert "2 .csv, 1 .jsonl, 1 maps of earlier results" in caplog.text
    for folder in ("monday", "monday/found/maps", "monday/found/maps/lot"):
        with pytest.raises(PhotoError, match="holds no photo"):
            list_photos(tmp_path / folder)


def test_a_run_that_ended_early_is_resumed(
    enrolled: tuple[object, ...], good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photo is inspected again if it, the bank or the model is another one, or its map is gone."""
    photos, output, seen = tmp_path / "photos", tmp_path / "found", []
    photos.mkdir()
    for name, path in zip(("=a.png", "b.png", "c.png", "d.png"), good, strict=False):
        shutil.copy(path, photos / name)
    bundle, banks = enrolled[2], enrolled[4]
    assert isinstance(bundle, Path)
    assert isinstance(banks, Path)
    inspect = ResADInferencer.inspect

    def watched(self: ResADInferencer, path: Path, product: str) -> object:
        seen.append(path.name)
        if len(seen) == stop:
            raise KeyboardInterrupt
        return inspect(self, path, product)

    monkeypatch.setattr(ResADInferencer, "inspect", watched)
    monkeypatch.setattr("anomalib_resad.commands.predict.usual_streams", lambda: 1)  # photo after photo
    stop = 4
    with pytest.raises(ValueError, match=r"interrupted. 3 of 4 rows are .* --resume"):
        cli.predict(bundle, "tiles", photos, output, banks)
    before = rows(output)
    shutil.copy(good[4], photos / "b.png")
    (output / "maps" / "c.png.png").unlink()
    seen.clear()
    stop = 0
    cli.predict(bundle, "tiles", photos, output, banks, resume=True)
    assert seen == ["b.png", "c.png", "d.png"]
    after = {row["photo"]: row for row in rows(output)}
    assert sorted(after) == ["'=a.png", "b.png", "c.png", "d.png"]
    assert after["'=a.png"] == before[0]
    assert after["b.png"] != before[1]
    assert after["c.png"] == before[2]
    ResADInferencer(bundle, banks=banks).set_threshold("tiles", 1.0)
    seen.clear()
    cli.predict(bundle, "tiles", photos, output, banks, resume=True)
    assert len(seen) == 4


def test_a_full_disk_ends_the_run_and_keeps_its_rows(
    enrolled: tuple[object, ...], good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, output, calls = tmp_path / "photos", tmp_path / "found", []
    photos.mkdir()
    for path in good[:4]:
        shutil.copy(path, photos)
    write = results_module.write_whole

    def no_room(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 5:  # both tables, and two maps
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(results_module, "write_whole", no_room)
    with pytest.raises(ValueError, match=r"ended early: .*No space left.* 2 of 4 rows are in"):
        cli.predict(enrolled[2], "tiles", photos, output, enrolled[4])  # type: ignore[arg-type]
    assert [row["photo"] for row in rows(output)] == [path.name for path in good[:2]]
    assert not list(tmp_path.rglob(".*.part"))


def test_a_row_is_whole_or_not_there(tmp_path: Path) -> None:
    """Where a part of it is all that fits; here a file may have 300 bytes."""
    code = """
import resource, sys
from pathlib import Path
from anomalib_resad.deploy import results as results_module
from anomalib_resad.deploy.results import Results
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
with Results(Path(sys.argv[1])) as results:
    try:
        for number in range(100):
            results.fail(f"{number}.png", "unreadable " + "x" * 40)
    except OSError as error:
        print(results.count, error.strerror)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == "3 File too large\n"
    assert [row["photo"] for row in rows(tmp_path)] == ["0.png", "1.png", "2.png"]
    assert (tmp_path / "results.csv").read_bytes().endswith(b'"\n')


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with Results(tmp_path) as results:
        results.fail("a.png", "unreadable")
        with pytest.raises(ValueError, match=r"Another process writes to .*choose another folder"):
            Results(tmp_path)
        results.fail("b.png", "unreadable")
    assert [row["photo"] for row in rows(tmp_path)] == ["a.png", "b.png"]
    with Results(tmp_path):
        pass


def test_a_table_that_cannot_be_begun_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Results(tmp_path) as results:
        results.fail("a.png", "unreadable")

    def no_room(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path), content)

    monkeypatch.setattr(results_module, "write_whole", no_room)
    with pytest.raises(ValueError, match=r"cannot be written .*Read-only file system.* Choose another folder"):
        Results(tmp_path)
    assert [row["photo"] for row in rows(tmp_path)] == ["a.png"]


def test_a_map_whose_name_is_too_long_costs_no_row(
    enrolled: tuple[object, ...], good: list[Path], tmp_path: Path
) -> None:
    photos, output = tmp_path / "photos", tmp_path / "found"
    photos.mkdir()
    fits, long = "f" * 247 + ".png", "l" * 251 + ".png"  # of 255 bytes, which file systems take
    for name in (fits, long, "z.png"):
        shutil.copy(good[1], photos / name)
    said = resad(*enrolled, "--photos", photos, "--output", output, status=1)
    assert "3 of 3 photos inspected" in said
    assert "its map cannot be written (File name too long)" in said
    found = {row["photo"]: row for row in rows(output)}
    assert len({row["score"] for row in found.values()}) == 1
    assert {name for name, row in found.items() if row["error"]} == {long}
    assert {path.name for path in (output / "maps").iterdir()} == {f"{fits}.png", "z.png.png"}


NAMES = ["cam[0].png", "Prüfteil 1.png", "产品.png", "=1+1.png", "-x.png", "a.b.png", os.fsdecode(b"caf\xe9.png")]


@pytest.mark.parametrize("source", ["drawn", "shared"])
def test_photos_of_all_names_have_a_row(
    enrolled: tuple[object, ...], tmp_path: Path, source: str, share: Callable[..., Path]
) -> None:
    photos, output = tmp_path / "names", tmp_path / "found"
    if source == "shared":
        if not (SHARED / "cases/make_cases.py").is_file():
            pytest.skip("no shared folder")
        photos = share("cases_shared", shared) / "names"
    else:
        photos.mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        for name in [*NAMES, "\x1b[31mred\u202e.png"]:
            shutil.copy(tmp_path / "a.png", photos / name)
        (photos / "\x1b[2Jempty.png").touch()
    count = len(list(photos.iterdir()))
    said = resad(*enrolled, "--photos", photos, "--output", output, status=int(source == "drawn"))
    assert not {"\x1b", "\u202e", "\udce9"} & set(said)
    found = rows(output)
    assert len(found) == count
    assert sum(bool(row["score"]) for row in found) == count - (source == "drawn")
    names = {row["photo"] for row in found}
    assert {"cam[0].png", "Prüfteil 1.png", "产品.png", "'=1+1.png", "'-x.png", "caf\\udce9.png"} <= names


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

# SPDX-License-Identifier: Apache-2.0

"""The commands of the edge on a disk that is full: a real one, small, in memory."""

import json
from pathlib import Path

import pytest

from benchmarks.full_disk import ALL, can_mount, run

ROOT = Path(__file__).resolve().parents[1]
SAID = {
    "export": "encoder.xml cannot be written whole (the disk is full, or fails; ",
    "export, nearly": "cannot be written whole (the disk is full, or fails; ",
    "export --replace": "cannot be written whole (the disk is full, or fails; ",
    "enroll": "tiles.safetensors cannot be written ([Errno 28] No space left on device). Pass a folder for `banks`",
    "enroll --mode add": "tiles.safetensors cannot be written ([Errno 28] No space left on device)",
    "predict": "Inspecting ended early: [Errno 28] No space left on device. ",
}


def check(rows: list[dict[str, object]]) -> None:
    for row in rows:
        case = str(row["case"])
        assert (row["status"], row["whole"]) == (2, True), row
        assert SAID[case] in str(row["said"]), row
        assert "unexpected" not in str(row["said"])
        assert not [name for name in row["stayed"] if name.endswith(".part")]  # type: ignore[attr-defined]


def test_each_command_says_so_and_leaves_what_is_whole(trained: Path, bundle: Path, tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("no file system can be mounted here")
    cases = ("export --replace", "enroll", "enroll --mode add", "predict")
    run(tmp_path / "said.json", trained, bundle, cases)
    rows = json.loads((tmp_path / "said.json").read_text())
    assert [row["case"] for row in rows] == list(cases)
    check(rows)


def test_what_was_measured() -> None:
    """The same of the committed run, of a model of usual size."""
    rows = json.loads((ROOT / "benchmarks/results/full_disk/full_disk.json").read_text())
    assert [row["case"] for row in rows] == list(ALL)
    check(rows)

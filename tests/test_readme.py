# SPDX-License-Identifier: Apache-2.0

"""Every figure in the README is backed by a committed file."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.report import readme_categories, readme_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TABLES = re.findall(r"<!-- (benchmarks/results/\S+)/summary\.csv: (.+) -->\n((?:\|.*\n)+)", README)


def test_there_are_tables() -> None:
    assert len(TABLES) >= 2


@pytest.mark.parametrize(("folder", "kind", "table"), TABLES)
def test_tables_are_those_of_the_files(folder: str, kind: str, table: str) -> None:
    shots = re.fullmatch(r"(\d+)-shot by category", kind)
    made = readme_categories(ROOT / folder, int(shots[1])) if shots else readme_table(ROOT / folder)
    assert table.strip() == made
    settings = json.loads((ROOT / folder / "settings.json").read_text())
    assert settings["source"] == "leave one category out"
    assert settings["backbone"].replace("_", "") in folder.replace("v2", "v2100")


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[.*\]\((\S+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture


def test_parity_figures() -> None:
    path = "benchmarks/results/edge/parity.json"
    parity = json.loads((ROOT / path).read_text())
    rows = parity["rows"]
    sentence = " ".join(README[README.index("Exported (ResNet-18") :].split("\n\n")[0].split())
    for name, keys in {
        "ONNX": ("score_max",),
        "OpenVINO FP32": ("score_max", "map_mean", "map_max"),
        "OpenVINO FP16": ("score_max", "map_max"),
        "OpenVINO INT8": ("score_max", "map_max"),
    }.items():
        for key in keys:
            assert f"{rows[name][key]:.1g}" in sentence, (name, key)
        changed = round((1 - rows[name]["same_labels"]) * len(parity["photos"]))
        assert changed == 0 or (changed == 1 and f"one label of {len(parity['photos'])}" in sentence), name
    assert path in sentence

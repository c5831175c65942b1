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
    path = "benchmarks/results/parity/parity.json"
    results = json.loads((ROOT / path).read_text())["results"]
    sentence = " ".join(README[README.index("Exported to OpenVINO") :].split("\n\n")[0].split())
    for name, key in (("f32", "score_max"), ("f32", "map_max"), ("default", "score_max"), ("default", "map_max")):
        assert f"{results[name][key]:.1g}" in sentence, (name, key)
    assert path in sentence

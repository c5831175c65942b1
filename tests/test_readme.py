# SPDX-License-Identifier: Apache-2.0

"""Every figure in the README is backed by a committed file."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.compare import markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TABLES = re.findall(r"<!-- (benchmarks/results/\S+\.csv) -->\n((?:\|.*\n)+)", README)


def test_there_are_tables() -> None:
    assert len(TABLES) == 2


@pytest.mark.parametrize(("source", "table"), TABLES)
def test_tables_are_those_of_the_files(source: str, table: str) -> None:
    assert table.strip() == markdown_table(ROOT / source)
    settings = json.loads((ROOT / source).with_name("settings.json").read_text())
    assert settings["target"] not in settings["source"]


def test_parity_figures() -> None:
    path = "benchmarks/results/first_light/parity.json"
    results = json.loads((ROOT / path).read_text())["results"]
    sentence = " ".join(README[README.index("Exported to OpenVINO") :].split("\n\n")[0].split())
    for name, key in (("f32", "score_max"), ("f32", "map_max"), ("default", "score_max"), ("default", "map_max")):
        assert f"{results[name][key]:.1g}" in sentence, (name, key)
    assert path in sentence

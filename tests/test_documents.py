# SPDX-License-Identifier: Apache-2.0

"""README and docs: links resolve, names and values are those of the code; `test_figures.py` checks the figures."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from anomalib_resad.method.presets import OF_DISTANCE, PRESETS, SETTINGS
from benchmarks import readme_paths
from tests.test_figures import tables_in

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "anomalib_resad"
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")]
WITH_LINKS = [*DOCUMENTS, *OTHERS, *sorted((ROOT / "benchmarks").glob("*.md"))]
NONE = "\N{EN DASH}"  # in the column of a method that does not have the argument
WRITTEN_BY_USERS = ("results/", "found/", "demo/", "photos/", "datasets/")  # what commands read and write


# -- links, paths, names ----------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", WITH_LINKS, ids=lambda path: path.name)
def test_relative_links_resolve(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}"


def test_pictures_are_there() -> None:
    pictures = [link for path in DOCUMENTS for link in re.findall(r"!\[.*\]\((\S+)\)", path.read_text())]
    assert pictures  # that they exist is tested with the other links


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_modules_exist(path: Path) -> None:
    """Files in code spans, of the repository or of the package, and modules and names of the package."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    for span in spans:
        if re.fullmatch(r"[\w.-]+/[\w./-]*", span) and not span.startswith(WRITTEN_BY_USERS) and "." in span:
            assert (ROOT / span).exists() or (PACKAGE / span).exists(), span
        if re.fullmatch(r"anomalib_resad(\.\w+)+", span):
            parent, _, name = span.rpartition(".")
            assert hasattr(import_module(parent), name) or import_module(span), span


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_import_what_there_is(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
        for statement in ast.parse(block).body:
            if isinstance(statement, ast.ImportFrom):
                assert statement.module is not None
                module = import_module(statement.module)
                assert all(hasattr(module, alias.name) for alias in statement.names), statement.module


def test_arguments_are_those_of_the_methods() -> None:
    path = ROOT / "docs" / "methods.md"
    (table,) = [table for table in tables_in(path) if table.rows[0][0] == "argument"]
    header, _, *rows = table.rows
    assert sorted(cells[0].strip("`") for cells in rows) == sorted(SETTINGS)
    for cells in rows:
        for variant, text in zip(header[1:4], cells[1:4], strict=True):
            own, name = PRESETS[variant.strip("`")], cells[0].strip("`")
            assert (name in own) == (text != NONE), (name, variant)
            if name in own and isinstance(own[name], float | int) and not isinstance(own[name], bool):
                assert float(text) == own[name], (name, variant)
            elif name in own:
                assert yaml.safe_load(text) == own[name], (name, variant)
    (sentence,) = re.findall(r"The plain distance has (.*?) of its variant", path.read_text(), re.DOTALL)
    assert re.findall(r"`(\w+)`", sentence) == list(OF_DISTANCE)


# -- form -------------------------------------------------------------------------------------------------------------


def test_readme_is_short_and_names_every_document() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    (table,) = tables_in(README)
    assert sorted(re.findall(r"\]\(docs/(.+?)\)", table.text)) == [path.name for path in DOCUMENTS[1:]]
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in text.splitlines()}


@pytest.mark.parametrize("path", [*DOCUMENTS, *OTHERS], ids=lambda path: path.name)
def test_lines_are_wrapped(path: Path) -> None:
    """At 120 columns, but for tables and code."""
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).splitlines()
    assert [line for line in prose if len(line) > 120 and not line.startswith("|")] == []


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    identifiers = [each["value"] for reference in citation["references"] for each in reference["identifiers"]]
    assert identifiers == ["arXiv:2410.20047", "arXiv:2509.23741"]


def test_the_walk_of_the_readme_knows_its_commands() -> None:
    """`benchmarks.readme_paths` needs minutes and an index: here, that it finds what the README says."""
    walk = Path(readme_paths.__file__).read_text()
    asked = re.findall(r'command_of\("([^"]+)"(?:, (\d))?\)', walk)
    found = [readme_paths.command_of(start, int(number or 0)) for start, number in asked]
    assert len(found) == 9
    assert [command.split()[0] for command in found].count("anomalib") == 3
    assert not [command for command in found if "#" in command]
    assert "ResAD(" in readme_paths.python_block()
    with pytest.raises(IndexError):
        readme_paths.command_of("resad fly")

# SPDX-License-Identifier: Apache-2.0

"""The wheel for devices, built and installed in an environment that holds what it asks for, and nothing else."""

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from anomalib_resad.version import __version__
from tests.test_edge_commands import BLOCKED
from tests.test_rooms import FILES, ROOT, name_of, room

CHECKOUT = ROOT.parent
ON_A_DEVICE = {
    "anomalib_resad",
    "anomalib_resad.cli",
    "anomalib_resad.version",
}  # beside the rooms that need no PyTorch


def build(project: str, folder: Path) -> Path:
    """The wheel of a project of a copy of this checkout, so that no build output is left here."""
    copy = folder / "checkout"
    if not copy.exists():
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("anomalib_resad", "edge"):
            shutil.copytree(CHECKOUT / name, copy / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md", "LICENSE", "anomalib_resad_hook.py"):
            shutil.copy(CHECKOUT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder / "wheels" / project), str(copy / project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "wheels" / project).iterdir()
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("edge", tmp_path_factory.mktemp("edge"))


def metadata_of(wheel: Path) -> tuple[Message, set[str], str]:
    """Metadata, modules, and entry points of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        (info,) = {name.partition("/")[0] for name in file.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(file.read(f"{info}/METADATA").decode())
        modules = {name_of(CHECKOUT / name) for name in file.namelist() if name.endswith(".py")}
        return metadata, modules, file.read(f"{info}/entry_points.txt").decode()


def required(requirements: list[str], extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Names that a distribution requires with some extras, each with the extras that it is required with."""
    for each in map(Requirement, requirements):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield re.sub(r"[-_.]+", "-", each.name).lower(), frozenset(each.extras)


def closure(metadata: Message, extra: str) -> set[str]:
    """All that pip would install with the wheel, of what is installed here."""
    seen = set[tuple[str, frozenset[str]]]()
    todo = list(required(metadata.get_all("Requires-Dist", []), frozenset({extra})))
    while todo:
        each = name, extras = todo.pop()
        if each not in seen:
            seen.add(each)
            todo += required(distribution(name).requires or [], extras)
    return {name for name, _ in seen}


def test_the_wheel_requires_no_torch(wheel: Path) -> None:
    """It is a distribution of the same name, which pip never installs beside the whole one."""
    metadata, modules, entry_points = metadata_of(wheel)
    assert metadata["Name"] == "anomalib-resad"
    assert metadata["Version"] == f"{__version__}+edge"
    (extra,) = re.findall(r"^edge = (\[.*?\])$", (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    plain = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert sorted(map(str, map(Requirement, plain))) == sorted(map(str, map(Requirement, ast.literal_eval(extra))))
    extras = ("api", "edge", "mqtt", "serve")
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras), "of the whole one, as documents name them"
    for extra in extras:
        brought = closure(metadata, extra)
        assert {"openvino", "numpy"} < brought
        assert not brought & {each.lower() for each in BLOCKED} - ({"pandas"} if extra == "serve" else set()), extra
    on_a_device = {name for path in FILES if room(name := name_of(path)) in ("enrollment", "deploy", "commands")}
    assert modules == on_a_device | ON_A_DEVICE
    assert entry_points.split() == ["[console_scripts]", "resad", "=", "anomalib_resad.cli:main"], "no hook in PyTorch"


def test_the_whole_wheel_is_whole(tmp_path: Path) -> None:
    metadata, modules, entry_points = metadata_of(build(".", tmp_path))
    assert (metadata["Name"], metadata["Version"]) == ("anomalib-resad", __version__)
    assert {name for name, _ in required(metadata.get_all("Requires-Dist", []), frozenset())} >= {"torch", "anomalib"}
    assert modules == {*map(name_of, FILES), "anomalib_resad_hook"}
    assert "resad = anomalib_resad.cli:main" in entry_points
    assert "anomalib_resad_hook:install" in entry_points


def test_enroll_and_predict_where_nothing_else_is(
    wheel: Path, bundle: Path, good: list[Path], new: list[Path], tmp_path: Path
) -> None:
    """In an environment of its own; what the wheel requires is linked into it instead of downloaded."""
    venv.create(tmp_path / "venv", with_pip=True)
    python, command = (tmp_path / "venv" / "bin" / name for name in ("python", "resad"))
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    metadata, modules, _ = metadata_of(wheel)
    for name in closure(metadata, "edge"):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))

    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}  # not this checkout

    def run(*arguments: object, status: int = 0) -> str:
        words = [str(each) for each in arguments]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path, env=outside
        )
        assert done.returncode == status, done.stdout + done.stderr
        return " ".join((done.stdout + done.stderr).split())

    pip = (python, "-m", "pip", "install", "--quiet", "--no-index")
    run(*pip, f"{wheel}[edge]")  # what it requires is there, or pip would fail
    assert "site-packages" in run(python, "-c", "import anomalib_resad; print(anomalib_resad.__file__)")
    run(python, "-c", f"import importlib; [importlib.import_module(name) for name in {sorted(modules - page_s())}]")
    for name in BLOCKED:
        assert "ModuleNotFoundError" in run(python, "-c", f"import {name}", status=1)
    (tmp_path / "good").mkdir()
    (tmp_path / "new").mkdir()
    for path, folder in ((good[0], "good"), (good[1], "good"), (new[0], "new")):
        shutil.copy(path, tmp_path / folder)
    common = ("--bundle", bundle, "--banks", "banks", "--product", "tiles")
    assert "tiles: 2 photos" in run(command, "enroll", *common, "--photos", "good")
    assert "1 of 1 photos inspected" in run(command, "predict", *common, "--photos", "new", "--output", "found")
    assert len((tmp_path / "found" / "results.csv").read_text("utf-8-sig").splitlines()) == 2
    said = run(command, "export", "--checkpoint", "model.ckpt", "--output", "bundle", status=2)
    assert "needs PyTorch and anomalib, which this installation is without" in said


def page_s() -> set[str]:
    """Modules of the page and the service, which need the extras [serve] and [api]."""
    return {
        f"anomalib_resad.deploy.{name}"
        for name in (
            "answers",
            "api",
            "bodies",
            "changes",
            "descriptions",
            "drawing",
            "guard",
            "metrics",
            "page",
            "page_changes",
            "serve",
            "service",
            "tabs",
            "turns",
            "uploads",
        )
    }

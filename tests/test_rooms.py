# SPDX-License-Identifier: Apache-2.0

"""The rooms of the package: what each may import, no circles, short files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.awkward_mutations import AWKWARD
from tests.mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1] / "anomalib_resad"
FILES = sorted(ROOT.rglob("*.py"))
# Rooms of ours that a room may import beside itself; modules that stand in no folder are the room "".
MAY_IMPORT = {
    "enrollment": set(),
    "method": {"enrollment"},
    "data": {"enrollment"},
    "deploy": {"enrollment"},
    "training": {"enrollment", "method", ""},
    "export": {"enrollment", "method", "deploy", ""},
    "commands": {"enrollment", "deploy", "export"},
    "": {"enrollment", "method", "data", "training", "export", "deploy", "commands"},
}
# Modules in no folder that others than the top may build on, from the bottom to the top, and the top itself.
LOWER = (
    "version",
    "torch_model",
    "reference_rows",
    "post_processor",
    "pre_processor",
    "checkpoint_io",
    "checkpoint",
    "ready_heads",
)
TOP = ("few_shot_references", "lightning_model", "plugin", "cli", "__init__")
# Libraries that these rooms do without.
FORBIDDEN = {
    "enrollment": {"torch", "torchvision", "anomalib", "lightning", "timm", "openvino", "FrEIA"},
    "deploy": {"torch", "torchvision", "anomalib", "lightning", "timm", "FrEIA"},
    "commands": {"torch", "torchvision", "anomalib", "lightning", "timm", "FrEIA"},
    "method": {"lightning", "torchvision", "openvino", "torchmetrics"},
}
# All that the method has of anomalib: plain modules.
OF_ANOMALIB = {"anomalib.models.components"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path, lazy: bool) -> set[str]:
    """Modules that a file imports; ``lazy`` also those inside of functions."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if not lazy and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: absolute imports only"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    here, allowed = room(module), MAY_IMPORT[room(module)] | {room(module)}
    for found in imports(MODULES[module], lazy=True):
        if found.split(".")[0] == "anomalib_resad":
            assert room(found) in allowed or found == "anomalib_resad.version", f"{module} imports {found}"
            low = here in ("training", "export") and found.removeprefix("anomalib_resad.") in TOP
            assert not low or (here, found.rpartition(".")[2]) in {
                ("export", "lightning_model"),
                ("export", "few_shot_references"),
            }, f"{module} imports {found}, which is above it"
        library = found.split(".")[0]
        assert library not in FORBIDDEN.get(here, ()), f"{module} imports {found}"
        if here == "method" and library == "anomalib":
            assert found in OF_ANOMALIB, f"{module} imports {found}"


def test_every_module_has_its_place() -> None:
    loose = {name.removeprefix("anomalib_resad.") for name in MODULES if room(name) == "" and name != "anomalib_resad"}
    assert loose == {*LOWER, *TOP, "calibration"} - {"__init__"}, "calibration: the name that 0.1.0 had"


def test_no_import_circle() -> None:
    graph = {name: {found for found in imports(path, lazy=False) if found in MODULES} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for found in graph[module]:
                visit(found, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_file_over_300_lines_and_no_function_over_45() -> None:
    long = {name: count for name, path in MODULES.items() if (count := len(path.read_text().splitlines())) > 300}
    assert not long
    functions = {}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                document = (ast.get_docstring(node, clean=False) or "").count("\n")
                is_constructor = node.name == "__init__"  # whose arguments are the command line, one a line
                start = node.body[0].lineno if is_constructor else node.lineno
                assert node.end_lineno is not None
                count = node.end_lineno - start + 1 - document
                if count > 45:
                    functions[f"{name}.{node.name}"] = count
    assert not functions


@pytest.mark.parametrize("mutation", [*MUTATIONS, *AWKWARD], ids=lambda each: f"{each.file} {each.what}")
def test_mutations_still_apply(mutation: Mutation) -> None:
    """The text that each one replaces stands there once, and its tests are there; see tests/mutations.py."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert all((ROOT.parent / "tests" / f"{name}.py").is_file() for name in mutation.tests.split())


def test_enrollment_and_deploy_need_no_torch() -> None:
    """Every module of both is imported where the large libraries cannot be."""
    modules = [name for name in MODULES if room(name) in ("enrollment", "deploy", "commands")]
    assert len(modules) > 10
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(FORBIDDEN["deploy"])}:
            raise ImportError("must not be imported: " + name)
sys.meta_path.insert(0, Blocked())
from importlib import import_module
for name in {modules}:
    import_module(name)
print("all of them")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert result.stdout.strip() == "all of them", result.stderr[-2000:]

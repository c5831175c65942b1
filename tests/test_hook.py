# SPDX-License-Identifier: Apache-2.0

"""The short name: known in every order of import, and harmless to everybody else."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

GET_ALL = """
arguments = dict(backbone="resnet18", pre_trained=False)
specifications = ("ResAD", "res_a_d", {"class_path": "ResAD"}, {"class_path": "anomalib_resad.ResAD"})
from anomalib.models import get_model, list_models
print([type(get_model(one, **arguments)).__name__ for one in specifications], "ResAD" in list_models("pascal"))
"""
KNOWN = "['ResAD', 'ResAD', 'ResAD', 'ResAD'] True"


def python(code: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_entry_point_is_installed() -> None:
    (entry,) = [entry for entry in entry_points(group="torch.backends") if entry.name == "anomalib_resad"]
    assert entry.value == "anomalib_resad_hook:install"


@pytest.mark.parametrize(
    "first",
    [
        "import anomalib.models",
        "import torch",
        "import anomalib_resad",
        "from anomalib_resad import ResAD",
        "from anomalib_resad.few_shot_references import FewShotReferences",
        "from anomalib.engine import Engine",
        "from anomalib.models.image.padim.torch_model import PadimModel",
    ],
)
def test_known_in_every_order_of_import(first: str) -> None:
    result = python(f"{first}\n{GET_ALL}")
    assert KNOWN in result.stdout, result.stderr[-2000:]


def test_can_be_switched_off() -> None:
    code = "import anomalib.models, sys; print('anomalib_resad' in sys.modules)"
    assert python(code).stdout.strip().endswith("True")
    assert python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout.strip().endswith("False")


def test_nothing_is_imported_without_anomalib() -> None:
    result = python("import torch, sys; print([name for name in sys.modules if name.startswith('anomalib')])")
    assert result.stdout.strip() == "['anomalib_resad_hook']"


@pytest.mark.parametrize("first", ["import torch", ""])
def test_a_broken_plugin_breaks_nothing(tmp_path: Path, first: str) -> None:
    """Neither PyTorch nor anomalib's command line, which would silently lose all of its verbs."""
    (tmp_path / "anomalib_resad.py").write_text("raise RuntimeError('broken')")
    code = f"{first}\nfrom anomalib.cli import AnomalibCLI\nprint(sorted(AnomalibCLI.anomalib_subcommands()))"
    result = python(code, cwd=tmp_path)
    assert "['export', 'predict', 'train']" in result.stdout, result.stderr[-2000:]
    assert "not available by its short name: broken" in result.stderr


def test_costs_next_to_nothing() -> None:
    """The hook's own module, without what PyTorch spends on looking up entry points anyhow."""
    code = """
import sys, time
import torch
sys.modules.pop("anomalib_resad_hook")
start = time.perf_counter()
import anomalib_resad_hook
anomalib_resad_hook.install()
print(1000 * (time.perf_counter() - start))
"""
    assert min(float(python(code).stdout) for _ in range(3)) < 20

# SPDX-License-Identifier: Apache-2.0

"""The commands of the edge, in processes without PyTorch, and what they need."""

import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_resad import cli, commands
from anomalib_resad.deploy import BundleError, ResADInferencer
from anomalib_resad.export.edge_bundle import export_bundle
from anomalib_resad.export.parity import STOCK, auroc, compare, table

BLOCKED = ("torch", "torchvision", "anomalib", "lightning", "timm", "FrEIA", "torchmetrics", "pandas", "matplotlib")
RUN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError("the edge must not import " + name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["resad", *{arguments}]
from anomalib_resad.cli import main
main()
"""


def resad(*arguments: object, status: int = 0) -> str:
    """Run the command in a process where PyTorch and anomalib cannot be imported."""
    code = RUN.format(blocked=BLOCKED, arguments=[str(each) for each in arguments])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == status, result.stdout + result.stderr
    return " ".join((result.stdout + result.stderr).split())


def test_commands_without_torch(bundle: Path, good: list[Path], new: list[Path], tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    (tmp_path / "good").mkdir()
    for path in good[:2]:
        shutil.copy(path, tmp_path / "good")
    for path in new:
        (photos / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, photos / path.parent.name)
    common = ("--bundle", bundle, "--banks", tmp_path / "banks")
    assert "tiles: 2 photos" in resad("enroll", *common, "--product", "tiles", "--photos", tmp_path / "good")
    assert "tiles" in resad("products", *common)
    predict = ("predict", *common, "--photos", photos, "--output", output)
    assert f"{len(new)} of {len(new)} photos inspected" in resad(*predict, "--product", "tiles")
    (photos / "empty.png").touch()
    deep = Image.fromarray(np.full((64, 64), 40_000, np.uint16))
    deep.save(photos / "deep.png")
    said = resad(*predict, "--product", "tiles", status=1)
    assert f"{len(new)} of {len(new) + 2} photos inspected" in said
    assert "more than 8 bits" in said
    lines = (output / "results.csv").read_text("utf-8-sig").splitlines()
    assert lines[0] == "photo,score,label,raw_score,error"
    assert len(lines) == len(new) + 3
    for path in new:
        with Image.open(output / "maps" / path.parent.name / f"{path.name}.png") as picture, Image.open(path) as photo:
            assert picture.size == photo.size
    assert "'pill' is not enrolled. Enrolled: tiles." in resad(*predict, "--product", "pill", status=2)
    assert "is no bundle" in resad("products", "--bundle", tmp_path, status=2)


def test_piped_tables_are_whole(bundle: Path, good: list[Path], tmp_path: Path) -> None:
    """However long a name is; a bank that cannot be used is told beside the others."""
    inferencer, name = ResADInferencer(bundle, banks=tmp_path), "a product with a long name " * 7
    inferencer.enroll(name.strip(), good[:1], rotations=1)
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    command = [sys.executable, "-m", "anomalib_resad.cli", "products", "--bundle", bundle, "--banks", tmp_path]
    said = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert "…" not in said
    assert any(name.strip() in line and "the model's" in line for line in said.splitlines())
    assert any("broken.safetensors is truncated or no bank" in line for line in said.splitlines())


def test_errors_are_one_sentence_and_debug_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["resad", *(str(each) for each in arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, 2)
        return " ".join(capsys.readouterr()[ended.value.code // 2].split())

    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert run("products", "--bundle", tmp_path).startswith(f"Error: {tmp_path} is no bundle")
    with pytest.raises(BundleError):
        run("products", "--bundle", tmp_path, "--debug")
    assert "--debug, an error shows where" in run("--help")
    for error, said in (
        (RuntimeError("broken"), "Error: unexpected RuntimeError: broken. Add --debug to see where"),
        (MemoryError(), "Error: unexpected MemoryError"),
        (PermissionError(13, "Permission denied", "a"), "Error: [Errno 13] Permission denied: 'a'"),
        (KeyboardInterrupt(), "Error: Interrupted."),
    ):
        monkeypatch.setattr(commands.products, "ResADInferencer", partial(_raise, error))
        assert run("products", "--bundle", tmp_path).startswith(said)
    assert cli._with_values(["--resume", "--replace", "false"]) == ["--resume", "true", "--replace", "false"]
    assert cli._with_values(["a", "--replace"]) == ["a", "--replace", "true"]
    for option in ("--threshold", "--max_patches", "--rotations"):
        assert "error" in run("enroll", "--bundle", "b", "--product", "p", "--photos", "p", option, "high")


def _raise(error: BaseException, *_: object, **__: object) -> None:
    raise error


def test_export_as_a_command(bundle_default: Path, trained_default: Path, tmp_path: Path) -> None:
    """What it says; a damaged checkpoint is one sentence, no traceback."""
    assert re.search(r"fp32: \d+\.\d MB, fp32\.", " ".join((bundle_default.parent / "printed.txt").read_text().split()))
    assert "FutureWarning" not in (bundle_default.parent / "errors.txt").read_text(), "of timm or anomalib"
    assert ResADInferencer(bundle_default, banks=tmp_path).products == []
    (tmp_path / "cut.ckpt").write_bytes(trained_default.read_bytes()[:9000])
    command = [sys.executable, "-m", "anomalib_resad.cli", "export", "--checkpoint", tmp_path / "cut.ckpt"]
    refused = subprocess.run(
        [*command, "--output", tmp_path / "none"], capture_output=True, text=True, check=False, timeout=300
    )
    assert refused.returncode == 2
    assert "Error:" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        export_bundle(tmp_path / "none.ckpt", tmp_path / "bundle")
    assert not list(tmp_path.iterdir()), "no temporary folder is left"


def test_parity(trained: Path, products: Path, good: list[Path]) -> None:
    photos = sorted((products / "tiles" / "test").glob("*/*.png"))
    rows = compare(trained, good[:2], photos)["rows"]
    assert next(iter(rows)) == "torch"
    assert {"OpenVINO FP32", "OpenVINO FP16", STOCK} < set(rows)
    assert rows[STOCK]["same_labels"] == 1
    assert rows[STOCK]["map_correlation_min"] > 0.99
    for name, row in rows.items():
        assert row["image_auroc"] is not None
        assert row["same_labels"] > 0.7, name
        if name in ("torch", "ONNX", "OpenVINO FP32"):
            assert max(row["score_max"], row["map_max"]) < 1e-4, name
            assert row["image_auroc"] == rows["torch"]["image_auroc"]
    assert table(rows).row_count == len(rows)
    assert auroc([0.1, 0.5, 0.5, 0.9], [False, False, True, True]) == 0.875
    assert auroc([0.1], [False]) is None


def test_importing_is_light() -> None:
    code = (
        "import sys, anomalib_resad, anomalib_resad.deploy\n"
        "print({'torch', 'anomalib', 'gradio'} & set(sys.modules), 'ResAD' in dir(anomalib_resad))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert result.stdout.strip() == "set() True", result.stderr


def test_a_port_that_cannot_be_is_one_sentence(bundle: Path) -> None:
    for port in ("70000", "-1"):
        said = resad("serve", "--bundle", bundle, "--port", port, "--page", "false", status=2)
        assert said.startswith(f"Error: port={port} must lie between 0 and 65535; ")
        assert "Traceback" not in said

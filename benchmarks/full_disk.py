# SPDX-License-Identifier: Apache-2.0

"""What the commands of the edge say and leave where the disk is full: real runs on a small file system in memory.

Needs Linux, and the right to mount in a namespace of one's own (``unshare -rm``), which some containers deny. An
untrained model of usual size stands in: what is said does not depend on what the weights are.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jsonargparse import auto_cli
from PIL import Image
from rich.console import Console

from anomalib_resad.deploy import ResADInferencer, read_manifest

ALL = ("export", "export, nearly", "export --replace", "enroll", "enroll --mode add", "predict")
MARGIN = 2 << 20  # bytes that are free beside what lies there already


def can_mount() -> bool:
    """Whether a file system can be mounted here."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/tmp"]  # noqa: S108
    found = shutil.which("unshare") is not None
    return found and subprocess.run(command, check=False, capture_output=True).returncode == 0  # noqa: S603  # ours


def run(
    output: Path = Path("benchmarks/results/full_disk/full_disk.json"),
    checkpoint: Path | None = None,
    bundle: Path | None = None,
    cases: Sequence[str] = ALL,
) -> None:
    """Run each command on a disk that is too small, and write what it said, its status, and what stayed.

    Args:
        output: JSON file to write.
        checkpoint: A checkpoint to export; by default an untrained model.
        bundle: A bundle of it; by default it is made.
        cases: Which ones.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = checkpoint or _untrained(folder / "model.ckpt")
        if bundle is None:
            _resad("export", "--checkpoint", checkpoint, "--output", folder / "bundle")
        source = bundle or folder / "bundle"
        photos = _photos(folder / "photos")
        ResADInferencer(source, banks=folder / "banks").enroll("tiles", photos / "0.png", rotations=1)
        rows = []
        for case in cases:
            arguments = [case, checkpoint, source, photos, folder / "banks", folder / "disk"]
            command = ["unshare", "-rm", sys.executable, "-m", "benchmarks.full_disk", *map(str, arguments)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
            rows.append(json.loads(done.stdout.replace(name, "...")))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")
    Console().print(f"{output}: {len(rows)} commands.")


def one(case: str, checkpoint: Path, bundle: Path, photos: Path, banks: Path, disk: Path) -> None:
    """Mount the disk, run a command on it, and print what came of it; in a namespace that ends with this process."""
    there = {"export --replace": bundle, "enroll --mode add": banks}.get(case)
    size = MARGIN if there is None else MARGIN // 4 + _size(there)
    size = {"export, nearly": _size(bundle) - MARGIN, "enroll": MARGIN // 4}.get(case, size)
    size = size // 4096 * 4096
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)  # noqa: S603, S607
    if there is not None:
        shutil.copytree(there, disk / there.name)
    export = ("export", "--checkpoint", checkpoint, "--output")
    enroll = ("enroll", "--bundle", bundle, "--product", "tiles", "--photos", photos, "--banks")
    if case == "predict":
        (disk / "filled").write_bytes(bytes(size - MARGIN // 4))  # as other programs do
    commands: dict[str, tuple[object, ...]] = {
        "export": (*export, disk / "bundle"),
        "export, nearly": (*export, disk / "bundle"),
        "export --replace": (*export, disk / bundle.name, "--replace"),
        "enroll": (*enroll, disk / "banks", "--rotations", "8"),
        "enroll --mode add": (*enroll, disk / banks.name, "--mode", "add"),
        "predict": ("predict", *enroll[1:], banks, "--output", disk / "found"),
    }
    done = _resad(*commands[case])
    row = {
        "case": case,
        "disk_mb": round(size / 1e6, 1),
        "status": done.returncode,
        "said": " ".join((done.stdout + done.stderr).split("Error:")[-1].split()),
        "stayed": {path.relative_to(disk).as_posix(): path.stat().st_size for path in _files(disk)},
        "whole": _is_whole(case, disk, bundle, banks),
    }
    print(json.dumps(row))


def _is_whole(case: str, disk: Path, bundle: Path, banks: Path) -> bool:
    """Whether what lies on the disk can be used: the bundle and the bank that were there, or whole rows."""
    if case == "export --replace":
        return ResADInferencer(disk / bundle.name).manifest == read_manifest(bundle)
    if case == "enroll --mode add":
        return len(ResADInferencer(bundle, banks=disk / banks.name).bank("tiles").references) == 1
    if case == "predict":
        rows = (disk / "found" / "results.csv").read_bytes().splitlines(keepends=True)[1:]
        maps = list((disk / "found" / "maps").iterdir())
        return all(row.endswith(b'"\n') for row in rows) and len(rows) == len(maps) > 0
    return all(path.suffix == ".lock" for path in _files(disk))  # empty; who waits for one must find it there


def _resad(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anomalib_resad.cli", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603  # ours


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _size(folder: Path) -> int:
    """Bytes that a folder takes on the disk, in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))


def _photos(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 255, (160, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def _untrained(path: Path) -> Path:
    import torch  # noqa: PLC0415  # the commands of devices are without it

    from anomalib_resad import ResAD  # noqa: PLC0415

    model = ResAD(backbone="resnet18", pre_trained=False, estimator="distance")
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return path


if __name__ == "__main__":
    if len(sys.argv) == 7:
        one(sys.argv[1], *map(Path, sys.argv[2:]))  # in the namespace
    else:
        auto_cli(run, as_positional=False)

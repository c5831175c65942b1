# SPDX-License-Identifier: Apache-2.0

"""The three paths of the README as a new user walks them: its own commands, an empty home, photos, and a clock.

Run it in a fresh environment, in which ``pip install`` of the README's first page is all that was done. The last path
installs the package for devices with pip, which needs the package index, or pip's cache of it.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console

from anomalib_resad.enrollment.files import write_whole
from benchmarks.demo_steps import few_photos, judged
from benchmarks.products import make_product

CHECKOUT = Path(__file__).resolve().parents[1]
OUTPUT = CHECKOUT / "benchmarks" / "results" / "readme" / "readme.json"
TRAINED = "results/ResAD/CrossCategory/latest/weights/lightning/model.ckpt"  # as the README says
SOURCES = ("grain", "pill", "tiles")  # as configs/own_products.yaml names them
TARGET = "weave"


def command_of(start: str, number: int = 0) -> str:
    """A command of the README, without its comment.

    Raises:
        IndexError: If no line of its code blocks begins so.
    """
    blocks = re.findall(r"^```(?:ba)?sh\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(start)]
    return lines[number].partition("  #")[0].rstrip()


def python_block() -> str:
    """The README's example in Python."""
    return re.findall(r"^```python\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]


class Walk:
    """Commands that run in one folder, as a user types them.

    Args:
        folder (Path): Folder that they run in; its ``home`` is the home.
        programs (Path): Folder of the programs of the environment.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "XDG"))}
        (folder / "home").mkdir()
        self.environment = outside | {"HOME": str(folder / "home")}
        self.use(programs)

    def use(self, programs: Path) -> None:
        """Take the programs of another environment from here on."""
        self.environment["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"

    def run(self, path: str, command: str, more: str = "") -> None:
        """Run a command of a path, which has to succeed, with more options than the README's, and note its seconds."""
        Console().print(f"[bold]{path}[/bold]: {command}{more}", highlight=False)
        start = time.perf_counter()
        words = ["bash", "-c", command + more]
        subprocess.run(words, check=True, cwd=self.folder, env=self.environment)  # noqa: S603
        seconds = round(time.perf_counter() - start, 1)
        self.steps.append({"path": path, "command": command, "seconds": seconds})


def prepare(folder: Path, seed: int) -> None:
    """Draw what a user has: photos of a new product, labeled products, and this checkout beside them."""
    products = folder / "datasets" / "products"
    for name in SOURCES:
        make_product(products, name, seed=seed)
    target = make_product(folder / "target", TARGET, seed=seed)
    few_photos(target, 4, folder / "photos" / "good")
    shutil.copytree(target / "test", folder / "photos" / "new")
    shutil.copytree(CHECKOUT / "configs", folder / "configs")
    for part in ("edge", "anomalib_resad"):
        shutil.copytree(CHECKOUT / part, folder / part, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "anomalib_resad_hook.py"):
        shutil.copy(CHECKOUT / file, folder)


def main(weights: Path | None = None, output: Path = OUTPUT, seed: int = 0) -> None:
    """Walk the paths and write what each command took.

    Args:
        weights: File with weights of ResNet-18 for the training, where timm's hub cannot be reached. Without a file,
            the command of the README runs as it stands.
        output: JSON file to write.
        seed: Seed of the drawn photos.
    """
    with TemporaryDirectory() as scratch:
        folder, load = Path(scratch), os.getloadavg()[0]
        prepare(folder, seed)
        walk = Walk(folder, Path(sys.prefix) / "bin")
        walk.run("a few good photos", command_of("resad inspect"))
        found = {"a few good photos": told(folder)}
        shutil.rmtree(folder / "found")
        walk.run("a few good photos", command_of("anomalib predict"))
        walk.run("a few good photos", f"python -c {shlex.quote(python_block())}")
        local = "" if weights is None else f" --model.weights {weights.resolve()}"
        walk.run("labeled products", command_of("anomalib fit"), local)
        with_trained = re.sub(r"results/\S+\.ckpt", TRAINED, command_of("anomalib predict", 1))
        walk.run("labeled products", with_trained)
        walk.run("a device", command_of("resad export").replace("model.ckpt", TRAINED))
        walk.run("a device", command_of("pip wheel"))
        venv.create(folder / "device", with_pip=True)
        walk.use(folder / "device" / "bin")
        walk.run("a device", command_of("pip install wheels"))
        walk.run("a device", command_of("resad enroll"))
        walk.run("a device", command_of("resad predict"))
        found["a device"] = told(folder)
        about = {"seed": seed, "load_at_start": round(load, 1), "weights": weights and weights.name}
        write(output, walk.steps, found, about)


def told(folder: Path) -> dict[str, str]:
    """Alarms among the photos that were inspected."""
    step = judged("", folder / "found", 0.0)
    return {"defects found": step.found, "false alarms": step.false_alarms}


def write(output: Path, steps: list[dict[str, Any]], found: dict[str, Any], about: dict[str, Any]) -> None:
    """Write and print what was measured."""
    paths = {each["path"]: 0.0 for each in steps}
    for each in steps:
        paths[each["path"]] = round(paths[each["path"]] + each["seconds"], 1)
    about |= {"python": platform.python_version(), "cores": os.cpu_count()}
    result = about | {"seconds": paths, "found": found, "steps": steps}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (json.dumps(result, indent=2) + "\n").encode())
    Console().print_json(data=result)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

# SPDX-License-Identifier: Apache-2.0

"""Break the package in small ways, and see whether the tests notice. Run by hand; takes about twenty minutes.

Usage: python -m tests.mutations [--output FILE] [--only WORD] [--workers 2]

Each mutation of :data:`MUTATIONS` and :data:`AWKWARD` replaces one piece of text in a copy of the repository and runs
the tests that should fail then. The table says which were noticed.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.awkward_mutations import AWKWARD
from tests.mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
NOTICED, MISSED, BROKEN = "noticed", "MISSED", "does not apply"


def copy_to(folder: Path) -> Path:
    """The repository's files as they are now, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def try_one(mutation: Mutation, copy: Path) -> dict[str, Any]:
    """Apply a mutation to a copy, run its tests, and undo it."""
    path = copy / "anomalib_resad" / mutation.file
    text = path.read_text()
    start = time.perf_counter()
    if text.count(mutation.old) != 1:
        return {"result": BROKEN, "seconds": 0.0, "why": f"the text is there {text.count(mutation.old)} times"}
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        files = [f"tests/{name}.py" for name in mutation.tests.split()]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files],
            cwd=copy, env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
    finally:
        path.write_text(text)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    why = lines[0].split(" - ")[0].removeprefix("FAILED ").removeprefix("ERROR ") if lines else ""
    result = {0: MISSED, 1: NOTICED}.get(done.returncode, NOTICED if lines else BROKEN)
    return {"result": result, "seconds": round(time.perf_counter() - start, 1), "why": why}


def main(output: Path | None = None, only: str = "", workers: int = 2) -> None:
    """Try all mutations and print the table.

    Args:
        output: JSON file to write, too.
        only: Try those whose file or description holds this word.
        workers: Copies that are tested side by side.
    """
    chosen = [each for each in [*MUTATIONS, *AWKWARD] if only in f"{each.file} {each.what}"]
    found: dict[Mutation, dict[str, Any]] = {}
    copies: Queue[Path] = Queue()
    with TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        for number in range(workers):
            copies.put(copy_to(Path(folder) / str(number)))
        task = progress.add_task("Mutations", total=len(chosen))

        def work(mutation: Mutation) -> None:
            copy = copies.get()
            try:
                found[mutation] = try_one(mutation, copy)
            finally:
                copies.put(copy)
                progress.advance(task)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, chosen))
    table = Table("file", "what is broken", "result", "first test that fails")
    for each in chosen:
        table.add_row(each.file, each.what, found[each]["result"], found[each]["why"].removeprefix("tests/"))
    Console(width=200).print(table)
    noticed = sum(row["result"] == NOTICED for row in found.values())
    Console().print(f"{noticed} of {len(chosen)} noticed.")
    if output is not None:
        rows = [{"file": each.file, "what": each.what, "tests": each.tests} | found[each] for each in chosen]
        output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

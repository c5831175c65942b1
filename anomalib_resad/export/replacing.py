# SPDX-License-Identifier: Apache-2.0

"""Where a bundle is written: in a new folder, or in place of another one, in one step that cannot be half done.

The files of the new model are written into a folder of their own inside of the bundle. Then one file is replaced, the
manifest, which names that folder. Until then the bundle is the former one, from then on the new one, and its products
stay where they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as with_values
from pathlib import Path
from shutil import rmtree
from uuid import uuid4

from filelock import FileLock, Timeout

from anomalib_resad.deploy.bundle import FILES, MANIFEST, Manifest
from anomalib_resad.enrollment.files import PART, new_folder

LOCK = ".export.lock"
Finish = Callable[[Manifest], None]


def check_output(output: Path, replace: bool) -> None:
    """Refuse a folder that is in the way, before anything is computed.

    Raises:
        FileExistsError: If there is one that is not to be replaced, or that is no bundle.
    """
    if output.exists() and not replace:
        msg = f"{output} exists; nothing was changed. Choose another output folder, or replace it (--replace)."
        raise FileExistsError(msg)
    if output.exists() and not (output / MANIFEST).is_file():
        msg = f"{output} is no bundle (it has no {MANIFEST}), so it is not replaced. Choose another output folder."
        raise FileExistsError(msg)


@contextmanager
def bundle_folder(output: Path, replace: bool) -> Iterator[tuple[Path, Finish]]:
    """Where the files of a model are to be written, and what is to be called with their manifest at the end.

    Args:
        output (Path): The bundle.
        replace (bool): Replace it where there is one.

    Raises:
        FileExistsError: As of :func:`check_output`, or if another export replaces the bundle.
    """
    check_output(output, replace)
    if not output.exists():
        with new_folder(output) as folder:
            yield folder, lambda manifest: manifest.write(folder)
        return
    try:
        with FileLock(output / LOCK, timeout=0):
            name = f"model-{uuid4().hex}"
            manifests: list[Manifest] = []
            with new_folder(output / name) as folder:
                yield folder, manifests.append
            _swap(output, with_values(manifests[0], folder=name))
    except Timeout as error:
        msg = f"{output} is being replaced by another export. Nothing was changed."
        raise FileExistsError(msg) from error


def _swap(output: Path, manifest: Manifest) -> None:
    """Make the bundle the new one, then remove what is left of others, also of exports that were killed."""
    try:
        manifest.write(output)
    except BaseException:
        if manifest.folder not in (output / MANIFEST).read_text(encoding="utf-8"):  # else it was interrupted afterwards
            rmtree(output / manifest.folder)
        raise
    for name in FILES:
        (output / name).unlink(missing_ok=True)
    for folder in (*output.glob("model-" + 32 * "[0-9a-f]"), *output.glob(f".model-*{PART}")):  # nothing of a user's
        if folder.name != manifest.folder:
            rmtree(folder)

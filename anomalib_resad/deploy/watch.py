# SPDX-License-Identifier: Apache-2.0

"""Notices files that were replaced since they were read."""

import os
from pathlib import Path

from anomalib_resad.deploy.bundle import MANIFEST, BundleError, dated
from anomalib_resad.deploy.packed import read_file


class Watch:
    """Notices that a bundle was replaced since it was opened; costs one look at a file's date.

    Args:
        bundle (Path): The bundle.
        manifest (bytes): Content of its manifest when it was opened.
    """

    def __init__(self, bundle: Path, manifest: bytes) -> None:
        self._bundle, self._path = bundle, dated(bundle)
        self._content = manifest
        self._seen: os.stat_result | None = None

    def check(self) -> None:
        """Refuse to go on with a model that is no longer that of the folder; one that was moved away may go on.

        Raises:
            BundleError: If the manifest is another one.
        """
        try:
            now = self._path.stat()
            if self._seen is None or stamp(now) != stamp(self._seen):
                if read_file(self._bundle, MANIFEST) != self._content:
                    msg = f"{self._bundle} was replaced after it was opened. Open it again, to use the new model."
                    raise BundleError(msg)
                self._seen = now
        except FileNotFoundError:
            return


def stamp(stat: os.stat_result) -> tuple[int, ...]:
    """What tells that a file was written anew: a copy may keep the date and the size of the other one."""
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino

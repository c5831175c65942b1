# SPDX-License-Identifier: Apache-2.0

"""Inspect the photos that a camera writes into a folder: each of them once, and only when it is complete."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anomalib_resad.deploy.in_flight import in_order
from anomalib_resad.deploy.journal import Journal
from anomalib_resad.deploy.prediction import Prediction
from anomalib_resad.deploy.watch import stamp
from anomalib_resad.enrollment.photos import PhotoError, is_hidden, is_photo_file

logger = logging.getLogger(__name__)
Stamp = tuple[int, ...]


@dataclass
class _Seen:
    """A file as it was when it was looked at last.

    Attributes:
        stamp (Stamp): Its dates and size.
        since (float): Seconds of the clock when it was first seen so.
        problem (str | None): Why it could not be read.
        done (bool): Whether nothing more is to be done about it.
    """

    stamp: Stamp
    since: float
    problem: str | None = None
    done: bool = False


class _Outcome(NamedTuple):
    """What became of a file.

    Attributes:
        digest (str): SHA-256 of its content; empty where it could not be opened.
        found (tuple[Prediction, np.ndarray] | None): What was found, and the pixels; ``None`` if it has a row already.
        problem (str | None): Why it cannot be inspected.
        gone (bool): Whether it is not there any more.
    """

    digest: str = ""
    found: tuple[Prediction, np.ndarray] | None = None
    problem: str | None = None
    gone: bool = False


class FolderWatch:
    """Finds new photos below a folder, and writes a row for each.

    A photo is complete when its size and its dates have not changed for a while. One that cannot be decoded then may be
    of a writer that paused: it is recorded as failed only when nothing has changed for much longer.

    Args:
        folder (Path): The folder.
        journal (Journal): Takes the rows.
        inspect (Callable[[bytes], tuple[Prediction, np.ndarray]]): What is found in the content of a file, and the
            pixels that it was found in.
        keep (Callable[[str, Prediction, np.ndarray], None]): Called before the row of a photo is written.
        settle (float): Seconds without a change after which a file is complete.
        patience (float): Seconds without a change after which an unreadable file is recorded as failed.
        at_once (int): Photos that are inspected at the same time, where several are complete.

    Raises:
        ValueError: If there is no such folder, or a number is impossible.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        inspect: Callable[[bytes], tuple[Prediction, np.ndarray]],
        keep: Callable[[str, Prediction, np.ndarray], None],
        settle: float = 0.5,
        patience: float = 10.0,
        at_once: int = 1,
    ) -> None:
        if not folder.is_dir():
            msg = f"{folder} is no folder. Make it first, or name the one that the camera writes to."
            raise ValueError(msg)
        if not 0 < settle < patience < float("inf"):
            msg = f"settle={settle} must be more than 0 seconds, and less than patience={patience}."
            raise ValueError(msg)
        self.folder, self.journal, self.inspect, self.keep = folder, journal, inspect, keep
        self.settle, self.patience, self.at_once = settle, patience, at_once
        self._seen: dict[str, _Seen] = {}

    def look(self) -> None:
        """Look at the folder once, and inspect what is complete.

        Raises:
            OSError: If the folder is gone, or a row cannot be written.
            ValueError: If the product, or the bundle, cannot be used any more.
        """
        found, due = dict(self._files()), []
        self._seen = {name: seen for name, seen in self._seen.items() if name in found}
        for name, now in sorted(found.items(), key=lambda each: each[1]):  # oldest first
            seen = self._seen.get(name)
            if seen is None or seen.stamp != now:
                self._seen[name] = _Seen(now, time.monotonic())
            elif not seen.done and time.monotonic() - seen.since >= (self.patience if seen.problem else self.settle):
                due.append(name)
        with closing(in_order(self._inspected, due, self.at_once)) as outcomes:
            for name, outcome in zip(due, outcomes, strict=True):
                self._record(name, self._seen[name], outcome)

    def _files(self) -> Iterator[tuple[str, Stamp]]:
        """Photos by their paths below the folder, and when they were written."""
        if not self.folder.is_dir():
            msg = f"{self.folder} is gone. What was found so far is in {self.journal.path}."
            raise FileNotFoundError(msg)
        for root, folders, names in os.walk(self.folder):
            below = Path(root).relative_to(self.folder)
            folders[:] = [each for each in folders if not is_hidden(below / each)]
            for name in names:
                path = Path(root) / name
                try:
                    if not is_hidden(below / name) and is_photo_file(path):
                        yield (below / name).as_posix(), stamp(path.stat())
                except OSError:  # it went meanwhile, or is being renamed
                    continue

    def _inspected(self, name: str) -> _Outcome:
        """What is found in a photo, unless there is a row of it; what is wrong with it otherwise."""
        digest = ""  # of what cannot even be opened
        try:
            content = self._content(name)
            if content is None:
                return _Outcome(gone=True)
            digest = hashlib.sha256(content).hexdigest()
            return _Outcome(digest, None if (name, digest) in self.journal.recorded else self.inspect(content))
        except PhotoError as error:
            return _Outcome(digest, problem=str(error))

    def _record(self, name: str, seen: _Seen, outcome: _Outcome) -> None:
        if outcome.gone:
            return
        if outcome.problem is not None and seen.problem is None:
            seen.problem = outcome.problem  # looked at again later
            return
        if outcome.found is not None:
            self.keep(name, *outcome.found)
            self.journal.add(_row(name, outcome.digest, outcome.found[0]))
        elif outcome.problem is not None and (name, outcome.digest) not in self.journal.recorded:
            logger.warning("%s could not be inspected: %s", name, outcome.problem)
            self.journal.add(_row(name, outcome.digest) | {"error": outcome.problem})
        seen.done = True

    def _content(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            msg = f"unreadable ({error})"
            raise PhotoError(msg) from error


def _row(name: str, digest: str, found: Prediction | None = None) -> dict[str, Any]:
    return {
        "photo": name,
        "sha256": digest,
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "score": None if found is None else found.score,
        "label": None if found is None else found.status,
        "raw_score": None if found is None else found.raw_score,
        "error": None,
    } | ({} if found is None else found.where())

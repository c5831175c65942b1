# SPDX-License-Identifier: Apache-2.0

"""Files that a server keeps for a while: in a folder of its own, which goes with it, or after it."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra [api] is not installed")
from fastapi import testclient

from anomalib_resad.deploy import ResADInferencer
from anomalib_resad.deploy.api import application
from anomalib_resad.deploy.uploads import own_folder

HOLDING = """
import sys
from pathlib import Path
from anomalib_resad.deploy.uploads import own_folder
with own_folder(Path(sys.argv[1])) as folder:
    folder.joinpath("photo.png").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_killed_servers_left_is_removed(tmp_path: Path) -> None:
    """Never what a living one holds, nor what is of others."""
    (tmp_path / "resad-mine").mkdir()
    (tmp_path / f"resad-{'0' * 32}").mkdir()  # as of a server whose lock somebody removed: it may live
    others = set(tmp_path.iterdir())
    with ExitStack() as stack:
        command = [sys.executable, "-c", HOLDING, str(tmp_path)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        servers = [stack.enter_context(subprocess.Popen(command, **pipes)) for _ in range(2)]
        killed, living = (Path(each.stdout.readline().strip()) for each in servers if each.stdout)
        servers[0].kill()
        servers[0].wait()
        assert (killed / "photo.png").exists()
        with own_folder(tmp_path) as folder:
            assert not killed.exists()
            assert (living / "photo.png").exists()
            assert set(tmp_path.glob("resad-*")) == {folder, living, *others}
        servers[1].communicate()
    assert set(tmp_path.iterdir()) == others, "nor is a lock left"


def test_photos_that_are_enrolled_lie_in_the_servers_folder(
    inferencer: ResADInferencer, good: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, enroll = [], inferencer.enroll
    folder = tmp_path / "of the server"
    folder.mkdir()

    def enrolling(name: str, photos: list[Path], *given: Any) -> Any:
        seen.extend(photos)
        return enroll(name, photos, *given)

    monkeypatch.setattr(inferencer, "enroll", enrolling)
    with testclient.TestClient(application(inferencer, folder=folder), base_url="http://127.0.0.1") as client:
        body = {"content": good[0].read_bytes(), "headers": {"Content-Type": "image/png"}}
        assert client.post("/v1/products/tiles?rotations=1", **body).status_code == 201
    assert [folder in path.parents for path in seen] == [True]
    assert not list(folder.iterdir())

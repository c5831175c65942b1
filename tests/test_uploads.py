# SPDX-License-Identifier: Apache-2.0

"""Files that a server keeps for a while: in a folder of its own, which goes with it, or after it."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
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

    def enrolling(name: str, photos: list[Path], *given: Any, **settings: Any) -> Any:
        seen.extend(photos)
        return enroll(name, photos, *given, **settings)

    monkeypatch.setattr(inferencer, "enroll", enrolling)
    with testclient.TestClient(application(inferencer, folder=folder), base_url="http://127.0.0.1") as client:
        body = {"content": good[0].read_bytes(), "headers": {"Content-Type": "image/png"}}
        assert client.post("/v1/products/tiles?rotations=1", **body).status_code == 201
    assert [folder in path.parents for path in seen] == [True]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", [b"image/png", b"multipart/form-data; boundary=b"])
def test_a_client_that_leaves_is_no_error(inferencer: ResADInferencer, good: list[Path], kind: bytes) -> None:
    """Nor is anything held of it: the server would print a traceback, and count its bytes for ever."""
    inferencer.enroll("tiles", good[:1], rotations=1)
    app, sent = application(inferencer), []
    begun = {"type": "http.request", "body": b"--b\r\n", "more_body": True}

    async def ask() -> None:
        coming = iter([begun, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(coming)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"127.0.0.1"), (b"content-type", kind), (b"content-length", b"200000000")]
        path = "/v1/products/tiles/photos"
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        await app(scope, receive, send)

    for _ in range(3):
        anyio.run(ask)
    assert not sent
